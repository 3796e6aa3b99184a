"""Runs on sources: every kind of them trains, and such a run resumes bit for bit."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from beacon_jax import hf
from beacon_jax.data.prepared import Prepared
from beacon_jax.training import inputs, trainer
from beacon_jax.training.steps import Programs
from beacon_jax.training.trainer import train
from tests.data.source_files import WRITERS, write_csv
from tests.data.test_sources import TINY
from tests.training.test_processes import run
from tests.training.test_trainer import kill_after_step_3, losses, weights

TURNS = [
    {"role": "user", "content": "word1?"},
    {"role": "assistant", "content": "and 2"},
]


@pytest.fixture
def config(config, text):
    """Two sources' worth of settings: whoever uses it adds to the sources. The texts of
    the folder are cut to 24 tokens, so that all runs have one shape."""
    config.beacon.ratios = (4,)  # each ratio is a branch that takes seconds to compile
    del config.data.stages["stage1"]
    config.data.update({"max_length": 24, "long": "cut", "heldout": 0.0})
    config.data.group = "pad"
    config.data.update({"chat_template": "no", "workers": 1})
    config.save_every = 100
    return config


def json_files(folder):
    for name in ("a.jsonl", "a.json", "a.json.gz", "a.jsonl.zst"):
        WRITERS[name](folder / name)
        yield str(folder / name)


def tables(folder):
    for name in ("a.csv", "a.parquet", "saved", "a.array_record"):
        WRITERS[name](folder / name)
        yield str(folder / name)


def texts(folder):
    for name in ("one/a.txt", "one/b.md", "two/c.rst"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("word1 and 2\n" * 9)
    yield str(folder / "one")
    yield str(folder / "*/c.rst")
    yield "stdlib[5]"
    yield "long-llm:two/c.rst"


def conversations(folder):
    files = {
        "messages": {"conversations": TURNS},
        "sharegpt": {
            "conversations": [
                {"from": "human", "value": "word1?"},
                {"from": "gpt", "value": "and 2"},
            ]
        },
        "alpaca": {"instruction": "word1?", "output": "and 2"},
    }
    for name, row in files.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 9)
        yield str(folder / f"{name}.jsonl")
    rows = [{"chapter": "word1", "summary_text": "and 2"}] * 9
    write_csv(folder / "booksum.csv", rows)
    yield str(folder / "booksum.csv")


@pytest.mark.parametrize(
    "make",
    [
        json_files,
        pytest.param(tables, marks=pytest.mark.slow),
        pytest.param(texts, marks=pytest.mark.slow),
        pytest.param(conversations, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_source_trains(config, tmp_path, make):
    config.data.sources = (*make(tmp_path), *config.data.sources)
    config.data.root = str(tmp_path)
    if make is conversations:  # BookSum's question alone is longer
        config.data.max_length = 64
    made = []
    make_data = inputs.make_data

    def keep(*arguments):
        made.append(make_data(*arguments))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_data", keep)
        summary = train(config, tmp_path / "run")
    ((_, _, batches),) = made
    used = batches.rows[batches.rows >= 0]
    assert sorted(used) == list(range(len(batches.data)))
    assert set(batches.data.sources[used]) == set(range(len(config.data.sources)))
    assert summary["steps"] == -(-len(used) // 8) and np.isfinite(
        summary["last"]["loss"]
    )
    assert summary["base_hash_before"] == summary["base_hash_after"]


@pytest.mark.slow
def test_a_tfds_data_set_trains(config, tmp_path):
    script = tmp_path / "build.py"
    script.write_text(TINY)
    subprocess.run([sys.executable, script, tmp_path], check=True)
    config.data.sources = ("tfds:tiny/plain:train", *config.data.sources)
    config.data.root = str(tmp_path)
    config.data.max_length = 64
    assert train(config, tmp_path / "run")["steps"] == 7  # 40 and 12 rows


@pytest.mark.slow
def test_a_run_on_sources_resumes_bit_for_bit(config, tmp_path, monkeypatch, capsys):
    for name in ("a.jsonl", "a.parquet"):
        WRITERS[name](tmp_path / name)
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "a.parquet"))
    config.data.sources = (*files, *config.data.sources)
    config.data.update({"weights": (2.0, 1.0, 1.0), "steps": 8, "epochs": 0})
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Signals, "after", kill_after_step_3)
        with pytest.raises(SystemExit) as stopped:
            train(config, tmp_path / "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert list(losses(tmp_path / "parts")) == [1, 2, 3]
    # Elsewhere, from a folder that is prepared, without the sources.
    config.data.prepared = str(tmp_path / "whole" / "data")
    for file in files:
        os.unlink(file)
    assert train(config, tmp_path / "parts")["steps_of_this_process"] == 5
    assert "going on from step 3" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_data(config, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("word1 and 2 " * 9)
    config.data.sources = (str(file), *config.data.sources)
    train(config, tmp_path / "run")
    file.write_text("word3 and 4 " * 9)  # as many bytes
    config.data.prepared = str(tmp_path / "again")
    with pytest.raises(ValueError, match="data: '.*' -> '.*'"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_one_compiled_step_serves_batches_of_any_number_of_windows(
    config, tmp_path, monkeypatch
):
    rows = [json.dumps({"text": "word1 and 2 " * n}) for n in range(1, 9) for _ in "ab"]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    config.data.update({"sources": (str(tmp_path / "a.jsonl"),), "max_length": 60})
    config.data.update({"batch_size": 2, "group": "strict"})
    made = []
    plans, draw = [], inputs.draw_plans

    def keep(*arguments):
        plans.append(draw(*arguments))
        return plans[-1]

    monkeypatch.setattr(inputs, "draw_plans", keep)
    monkeypatch.setattr(
        trainer, "Programs", lambda *a: made.append(Programs(*a)) or made[0]
    )
    train(config, tmp_path / "run")
    assert len({len(plan) for plan in plans}) > 3
    assert [len(programs) for programs in made] == [1]


@pytest.mark.slow
def test_a_plain_model_trains_on_sources(config, base, tmp_path):
    config.trainable, config.beacon.use = "all", False
    config.window = 8
    before = hf.load(base / "export").base_hash
    train(config, tmp_path)
    assert hf.load(tmp_path / "export").base_hash != before
    assert len(Prepared(tmp_path / "data")) == 12


def test_bad_rows_stop_a_run_before_it_trains(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "word1"}\nnot json\n')
    config.data.sources = (str(tmp_path / "a.jsonl"),)
    with pytest.raises(ValueError, match=r"1 of 2 rows are bad(.|\n)*a.jsonl:2"):
        train(config, tmp_path / "run")


def test_accumulation_must_divide_the_batch(config, tmp_path):
    config.accumulate = 3
    with pytest.raises(
        ValueError, match="accumulate=3 does not divide data.batch_size=8"
    ):
        train(config, tmp_path)


@pytest.mark.slow
def test_two_processes_that_read_half_of_the_rows_train_as_one(config, tmp_path):
    """The first prepares, the second waits for it."""
    config.mesh.update({"data": 8})
    config.data.update({"steps": 4, "epochs": 0})
    config.compilation_cache = "off"
    found = []
    for name, count in (("one", 1), ("two", 2)):
        codes, outputs = run([config] * count, tmp_path / name, devices=8 // count)
        assert codes == [0] * count, outputs
        assert sum("prepared 12 examples" in output for output in outputs) == 1
        found.append(hf.load(tmp_path / name / "export").variables["beacon"])
    one, two = (x["layers"]["attention"]["k_proj"]["kernel"] for x in found)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
