"""Inspecting a prepared folder: the report, the histogram, the marked example."""

import json
import sys

import numpy as np
import pytest
from absl import flags

from beacon_jax.cli import inspect as module
from beacon_jax.cli import options
from beacon_jax.data.examples import Example, Rules
from beacon_jax.data.grouped import GroupConfig
from beacon_jax.data.inspect import histogram, marked, report, sample
from beacon_jax.data.prepare import Preparation, prepare
from beacon_jax.resources import load_tokenizer

TOKENIZER = "assets/tiny-base"
CHAT = {
    "conversations": [
        {"role": "user", "content": "What is the pass key?"},
        {"role": "assistant", "content": "It is 71492."},
    ]
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    texts = [{"text": f"row {i} " * (10 + 7 * (i % 9))} for i in range(30)]
    text, chat = folder / "text.jsonl", folder / "chat.jsonl"
    lines = [json.dumps(row) for row in [*texts, texts[0]]]
    text.write_text("\n".join([*lines, "not json"]), encoding="utf-8")
    chat.write_text(json.dumps(CHAT) + "\n", encoding="utf-8")
    return str(text), str(chat)


@pytest.fixture(scope="module")
def data(sources, tmp_path_factory):
    settings = Preparation(sources, TOKENIZER, Rules(10, 200, "no", "cut"))
    return prepare(settings, tmp_path_factory.mktemp("data"), workers=1)


def test_the_report_adds_up(data):
    text = report(data, GroupConfig(32, 4))
    lines = text.splitlines()
    total = data.manifest["total"]
    assert lines[0].startswith("32 examples of 33 rows, ")
    assert f"{total['tokens']:,} tokens" in lines[0]
    assert f"most {data.lengths.max()}" in lines[1]
    assert "examples that another one equals: 1" in lines
    tokens = [int(s["tokens"]) for s in data.manifest["sources"]]
    for uri, n in zip(data.uris, tokens, strict=True):
        assert any(line.split()[0] == f"{n:,}" and uri in line for line in lines[5:])
    assert "         1  bad   not JSON  (first: text.jsonl:32)" in lines
    at = lines.index("windows  batches")
    table = [line.split() for line in lines[at + 1 : -1]]
    batches = sum(int(count) for _, count in table)
    assert lines[at - 1].startswith(f"{batches} steps of 4 rows (strict)")
    left = sum(
        int(x.split(": ")[1]) for x in lines[-1].split("windows: ")[1].split(",")
    )
    assert 4 * batches + left == 32


def test_a_report_says_why_there_are_no_batches(data):
    text = report(data, GroupConfig(32, 99))
    assert "batches: data.batch_size=99: none of the groups of 32 examples" in text


def test_the_histogram_is_a_picture(data, tmp_path):
    histogram(data, 32, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_labelled_stretches_are_marked_and_all_text_is_there(data):
    tokenizer = load_tokenizer(TOKENIZER)
    index = sample(data)
    example = data.read(index)
    assert data.sources[index] == 1
    text = marked(example, tokenizer)
    assert text.startswith("What is the pass key?")
    assert "⟦" in text and text.endswith("⟧") and "71492" in text.split("⟦")[1]
    plain = text.replace("⟦", "").replace("⟧", "")
    assert plain == tokenizer.decode(example.tokens)


def test_long_stretches_are_cut_in_the_middle():
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = np.asarray(tokenizer("a" * 500 + "b" * 500)["input_ids"], np.int32)
    text = marked(Example(tokens, np.ones(len(tokens), bool)), tokenizer, shown=100)
    assert text == "⟦" + "a" * 50 + " [... 900 characters ...] " + "b" * 50 + "⟧"


def test_the_command_prepares_shows_and_writes(sources, tmp_path, monkeypatch, capsys):
    argv = [
        "inspect",
        "--config=configs/llama2_7b_finetune.py",
        f"--config.init_from={TOKENIZER}",
        f"--config.data.sources={sources}",
        "--config.data.chat_template=no",
        "--config.data.min_length=10",
        "--config.data.max_length=200",
        "--workers=1",
        f"--out={tmp_path}",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    module.define_flags(values)
    options.parse(argv, values)
    monkeypatch.setattr(flags, "FLAGS", values)
    module.main(["inspect"])
    out = capsys.readouterr().out
    for words in ("32 examples of 33 rows", "not JSON", "steps of 8 rows", "⟦"):
        assert words in out
    assert (tmp_path / "lengths.png").exists()
    assert (tmp_path / "data" / "manifest.json").exists()
    values["out"].value = ""
    with pytest.raises(SystemExit) as stopped:
        module.main(["inspect"])
    assert "--out='' names no folder" in str(stopped.value)
