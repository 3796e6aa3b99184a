"""Reading prepared folders: the encoding, and what is damaged."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.data.examples import Example
from beacon_jax.data.prepare import Preparation, prepare
from beacon_jax.data.prepared import COUNTS, Prepared, decode, encode, example_hash
from beacon_jax.data.tally import ShardCounts, Tally

TOKENIZER = "assets/tiny-base"
COUNTED = {**dict.fromkeys(COUNTS, 0), "drops": {}}
DROP = {"rows": 1, "bad": False, "first": []}


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"row {i} " * (i + 1)}) for i in range(20)]
    source.write_text("\n".join(rows), encoding="utf-8")
    prepare(Preparation((str(source),), TOKENIZER), tmp_path / "data", workers=1)
    return tmp_path / "data"


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=0, max_size=50
    )
)
def test_an_example_is_what_it_was_before_it_was_encoded(row):
    tokens = np.asarray([token for token, _ in row], np.int32)
    labelled = np.asarray([target for _, target in row], bool)
    made = decode(encode(Example(tokens, labelled)))
    assert made.tokens.dtype == np.int32 and made.labelled.dtype == bool
    assert made.tokens.tolist() == tokens.tolist()
    assert made.labelled.tolist() == labelled.tolist()


def test_bytes_that_are_no_example_are_an_error():
    data = encode(Example(np.arange(9, dtype=np.int32), np.ones(9, bool)))
    for wrong in (b"", data[:-1], data + b"x", b"\xff" * 8):
        with pytest.raises(ValueError, match="are not an example"):
            decode(wrong)


def test_hashes_are_equal_for_equal_examples_only():
    make = lambda *labelled: encode(Example(np.arange(2), np.asarray(labelled)))
    assert example_hash(make(True, False)) == example_hash(make(True, False))
    assert example_hash(make(True, False)) != example_hash(make(True, True))


def test_the_fingerprint_follows_the_examples(folder, tmp_path):
    source = tmp_path / "a.jsonl"
    before = Prepared(folder).fingerprint
    text = source.read_text().replace("row 7", "raw 7", 1)  # as many bytes
    source.write_text(text)
    again = prepare(Preparation((str(source),), TOKENIZER), tmp_path / "b", workers=1)
    assert again.fingerprint != before == Prepared(folder).fingerprint


def test_a_damaged_shard_names_the_example(folder):
    (shard,) = folder.glob("shard-*")
    data = bytearray(shard.read_bytes())
    middle = data.find(b"\x00" * 64, 200)  # the file is padded; damage its records
    for at in range(64, max(middle, 300)):
        data[at] ^= 0xFF
    shard.write_bytes(data)
    prepared = Prepared(folder)
    with pytest.raises(ValueError, match=r"example \d+ is damaged.*copy it again"):
        for i in range(len(prepared)):
            prepared.read(i)


def test_files_that_are_missing_or_do_not_fit_are_errors(folder, tmp_path):
    index = folder / "index.npy"
    whole = index.read_bytes()
    np.save(index, np.load(index)[:-1])
    with pytest.raises(ValueError, match="index.npy does not fit the shards of 20"):
        Prepared(folder)
    index.write_bytes(whole)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 0}))
    with pytest.raises(ValueError, match="has format 0, this version reads 1"):
        Prepared(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    next(folder.glob("shard-*")).unlink()
    with pytest.raises(FileNotFoundError, match="but no file shard-00000-of-00001"):
        Prepared(folder)
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        Prepared(tmp_path)


def test_an_index_that_disagrees_with_a_record_is_an_error(folder):
    index = np.load(folder / "index.npy")
    index["length"][3:5] += np.asarray([1, -1], np.int32)
    index["hash"][5] += 1
    np.save(folder / "index.npy", index)
    prepared = Prepared(folder)
    assert len(prepared.read(2).tokens) == prepared.lengths[2]
    with pytest.raises(ValueError, match=r"example 3 is .*has \d+ tokens, index.npy"):
        prepared.read(3)
    with pytest.raises(ValueError, match="example 5 is damaged.*another one than"):
        prepared.read(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "manifest.json is not JSON"),
        (b"\xff\xfe{\0}\0", "manifest.json is not JSON"),
        (b"[" * 100_000, "manifest.json is not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs"),
        (b"[]", "has list where a JSON object is expected"),
        (b"{}", "has format None, this version reads 1"),
    ],
)
def test_a_manifest_that_is_none_is_named(folder, content, message):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Prepared(folder)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("settings",), None, "manifest.settings is None, not an object"),
        (("total", "examples"), "20", "total.examples is '20', not a whole number"),
        (("total", "tokens"), 7, "index.npy does not fit"),
        (("sources", 0, "drops"), [], r"sources\[0\].drops is \[\], not an object"),
        (("shards", 0, "name"), 3, r"shards\[0\].name is 3, not a text"),
        (("shards", 0, "name"), "../data/x", "no file ../data/x"),
        (("shards", 0, "examples"), -1, r"shards\[0\].examples is -1, not a whole"),
        (("shards",), [], "index.npy does not fit the shards of 0"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named(folder, keys, value, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    inner = manifest
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Prepared(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2, 3]", b"\x93NUMPY\x01\0v\0{'descr': '<f4'}\n", b"PK\3\4", b"\x80N."],
)
def test_an_index_that_is_none_is_named(folder, content):
    (folder / "index.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.npy is no index of examples"):
        Prepared(folder)


def test_damaged_folders_are_replaced_only_if_asked_and_other_files_never(tmp_path):
    source, folder = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_text(json.dumps({"text": "a river"}))
    settings = Preparation((str(source),), TOKENIZER)
    prepare(settings, folder, workers=1)
    others = [
        folder / "shard-of-mine.tar",
        folder / "notes.json",
        folder / ".x.partial",
    ]
    for other in others:
        other.write_text("mine")
    for name, content, message in (
        ("manifest.json", "{", "manifest.json is not JSON"),
        ("index.npy", "", "or prepare it again with --overwrite"),
        ("manifest.json", None, "but no manifest.json.*again with --overwrite"),
    ):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        before = {x.name: x.read_bytes() for x in folder.iterdir()}
        with pytest.raises(ValueError, match=message):
            prepare(settings, folder, workers=1)
        assert {x.name: x.read_bytes() for x in folder.iterdir()} == before
        assert len(prepare(settings, folder, workers=1, overwrite=True)) == 1
    assert [other.read_text() for other in others] == ["mine"] * 3


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"tokenizer": 1, "rules": {}, "sources": []}']
)
def test_how_an_interrupted_run_began_is_read_or_named(tmp_path, content):
    source, folder = tmp_path / "a.jsonl", tmp_path / "data"
    source.write_text(json.dumps({"text": "a river"}))
    folder.mkdir()
    (folder / "unfinished.json").write_text(content)
    settings = Preparation((str(source),), TOKENIZER)
    with pytest.raises(ValueError, match=r"unfinished\.json is .*with --overwrite"):
        prepare(settings, folder, workers=1)
    assert len(prepare(settings, folder, workers=1, overwrite=True)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bad": 7}, "report.bad is 7, not a list"),
        ({"bad": [["a"]]}, ": remove it, and"),
        ({"sources": {"0": {"rows": -1}}}, "report.sources.0.rows is -1, not a whole"),
        ({"sources": {"9": {}}}, "it counts rows of other sources: remove it"),
        ({"sources": {"0": COUNTED | {"drops": {"x": DROP}}}}, "x.tokens is missing"),
        (
            {"sources": {"0": {k: n for k, n in COUNTED.items() if k != "cut"}}},
            "report.sources.0.cut is missing: remove it",
        ),
        ({"largest": "7"}, "report.largest is '7', not a whole number"),
    ],
)
def test_a_damaged_report_of_a_shard_is_named(tmp_path, change, message):
    report = ShardCounts().value | change
    (tmp_path / "shard.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=rf"shard\.json is damaged.*{message}"):
        Tally(["a.jsonl"], 1.0).add(0, tmp_path / "shard.json")
