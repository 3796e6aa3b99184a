"""What share of the text is used, what is held out of it, and folders made before."""

import dataclasses
import json
from pathlib import Path

import pytest

from beacon_jax.data.examples import Rules
from beacon_jax.data.prepare import Preparation, finished, prepare
from beacon_jax.data.prepared import write_json
from beacon_jax.data.tally import si, usage
from beacon_jax.data.text import load_documents
from beacon_jax.resources import load_tokenizer

TOKENIZER = str(Path(__file__).parents[2] / "assets/tiny-base")
LINES = [f"line {i} of a text about rivers and stones\n" for i in range(4000)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text("".join(LINES[i * 20 : i * 20 + 20]))
    rows = [{"text": line} for line in LINES[200:260]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def prepared(source, out, **rules):
    settings = Preparation((str(source),), TOKENIZER, Rules(**rules))
    return prepare(settings, out, workers=1)


def text_of(data):
    tokenizer = load_tokenizer(TOKENIZER)
    tokens = [data.read(i).tokens for i in range(len(data))]
    return tokenizer.batch_decode(tokens, skip_special_tokens=True)


def test_what_is_cut_off_is_said_with_the_key_that_keeps_it(folder, tmp_path):
    data = prepared(folder, tmp_path / "out", max_length=100, long="cut")
    total = data.manifest["total"]
    seen = total["tokens"] + total["cut"]
    line = usage(data.manifest)
    assert line == (
        f"rows: 68 of 68; tokens: {si(total['tokens'])} of {si(seen)} "
        f"({round(100 * total['tokens'] / seen)} %); {si(total['cut'])} cut off beyond "
        "max_length=100: data.long='split' keeps them"
    )
    # The files' 400 tokens and more: most of them are lost.
    assert total["cut"] > total["tokens"] / 2


def test_what_is_not_read_and_reasons_are_counted_by_a_few_names(tmp_path):
    rows = [{"text": "a", "tools": ["t"], "id": i} for i in range(3)]
    rows += [{"text": "a", f"n{i}": 1} for i in range(60)]
    rows += [{f"other{i}": 1} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = Preparation((str(tmp_path / "a.jsonl"),), TOKENIZER)
    data = prepare(settings, tmp_path / "out", workers=1, max_drop_fraction=1.0)
    line = usage(data.manifest)
    assert (
        "; not read: other fields (12 rows), id (3 rows), tools (3 rows), n0 (" in line
    )
    drops = data.manifest["sources"][0]["drops"]
    assert len(drops) == 51 and drops["unknown fields"]["rows"] == 10


def test_split_text_is_all_of_the_text(folder, tmp_path):
    data = prepared(folder, tmp_path / "out", max_length=100)
    assert sorted("".join(text_of(data))) == sorted(
        "".join(load_documents(str(folder), "all"))
    )
    assert data.lengths.max() == 100 and data.manifest["total"]["cut"] == 0
    assert usage(data.manifest).endswith("(100 %)")


def test_rows_that_the_lengths_leave_out_are_counted_in_tokens(folder, tmp_path):
    rules = {"min_length": 30, "max_length": 100, "long": "drop"}
    with pytest.raises(ValueError, match="no example is left of 68 rows"):
        prepared(folder, tmp_path / "none", **rules)
    data = prepared(folder, tmp_path / "out", min_length=30, max_length=100)
    line = usage(data.manifest)
    assert line.startswith("rows: 8 of 68; tokens: ")
    assert "in 60 rows shorter than min_length=30, left out" in line


@pytest.mark.parametrize("alone", [False, True])
def test_held_out_documents_are_those_of_the_evaluation(folder, tmp_path, alone):
    source = folder
    if alone:  # one file: blocks of it are held out
        source = tmp_path / "book.txt"
        source.write_text("".join(LINES * 3))
    heldout = 0.3
    data = prepared(source, tmp_path / "out", heldout=heldout)
    train = load_documents(str(source), "train", heldout)
    assert sorted("".join(text_of(data))) == sorted("".join(train))
    held = load_documents(str(source), "heldout", heldout)
    assert f"{len(held)} rows held out for evaluation" in usage(data.manifest)
    assert data.manifest["total"]["bad"] == 0
    if alone:  # neighbouring blocks make long rows
        assert len(data) < len(train)


def test_a_folder_of_an_earlier_version_need_not_be_prepared_again(folder, tmp_path):
    settings = Preparation((str(folder),), TOKENIZER, Rules(max_length=100, long="cut"))
    prepare(settings, tmp_path / "out", workers=1)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    rules = manifest["settings"]["rules"]
    del rules["long"], rules["heldout"], manifest["total"]["cut"]
    rules["cut_long"] = True
    write_json(path, manifest)
    data = finished(settings, tmp_path / "out")
    assert data is not None and usage(data.manifest).startswith("rows: 68 of 68; tok")
    other = dataclasses.replace(settings, rules=Rules(max_length=100))
    with pytest.raises(ValueError, match="rules.long: 'cut' -> 'split'"):
        finished(other, tmp_path / "out")


def test_counts_are_short():
    counts = (0, 999, 1000, 9_960, 99_500, 999_500, 2_100_000, 12_345_678, 10**9)
    texts = ["0", "999", "1.0k", "10k", "100k", "1.0M", "2.1M", "12M", "1.0B"]
    assert [si(n) for n in counts] == texts
