"""Text sources: deterministic disjoint splits, errors that say what to do."""

import hashlib
import json

import pytest

from beacon_jax.data.fields import UNKNOWN
from beacon_jax.data.text import is_heldout, load_documents, read_corpus


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"doc{i}.txt").write_text(f"document {i}\n")
    return tmp_path


def test_splits_are_disjoint_and_together_hold_every_document(folder):
    train = load_documents(str(folder), "train", 0.3)
    heldout = load_documents(str(folder), "heldout", 0.3)
    assert train and heldout and not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted(load_documents(str(folder), "all"))


def test_a_new_file_moves_no_other_file_to_another_split(folder):
    before = set(load_documents(str(folder), "heldout", 0.3))
    (folder / "another.txt").write_text("new\n")
    assert before <= set(load_documents(str(folder), "heldout", 0.3))


def test_the_standard_library_is_found_and_its_tests_are_left_out():
    names = [name for name, _ in read_corpus("stdlib").documents]
    assert "json/decoder.py" in names
    assert not any(name.startswith(("test/", "idlelib/")) for name in names)
    assert {is_heldout(name, 0.1) for name in names} == {True, False}


def test_bad_files_and_rows_are_skipped_and_counted(folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    rows = [json.dumps({"text": "row"}), "not json", json.dumps({"other": 1})]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    corpus = read_corpus(str(folder))
    assert ("rows.jsonl:000000000", "row") in corpus.documents
    assert [(where, said.partition(":")[0]) for where, said in corpus.skipped] == [
        ("latin.txt", "invalid UTF-8"),
        ("rows.jsonl:2", "not JSON"),
        ("rows.jsonl:3", UNKNOWN),
    ]


def test_what_is_left_out_is_told_once_with_its_places(folder, caplog):
    rows = ['{"text": "row"}', *["not json"] * 7]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "a.pdf").write_bytes(b"x")
    load_documents(str(folder), "all", quiet=True)
    assert caplog.messages == []
    load_documents(str(folder), "all")
    places = ", ".join(f"rows.jsonl:{n}" for n in range(2, 7))
    assert caplog.messages == [
        f"{folder}: left out 8: unknown ending (a.pdf); not JSON ({places} and 2 more)"
    ]


def test_fields_that_are_not_read_are_told(folder, caplog):
    rows = [{"text": "a", "meta": 1}, {"text": "b", "meta": {}}, {"text": "c", "n": 0}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load_documents(str(folder), "all", quiet=True)
    assert caplog.messages == []
    load_documents(str(folder), "all")
    assert caplog.messages == [f"{folder}: not read: meta (1 rows), n (1 rows)"]


def test_names_and_texts_are_those_that_the_shipped_model_was_split_by(tmp_path):
    # Computed with the reader that the shipped model's held-out split came from.
    (tmp_path / "sub").mkdir()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.py").write_text("no\n")
    for i in range(12):
        (tmp_path / f"doc{i}.txt").write_text(f"document {i}\n")
    (tmp_path / "a.md").write_text("# A\n")
    (tmp_path / "sub" / "b.rst").write_text("B\n=\n")
    (tmp_path / "sub" / "c.py").write_text("x = 1\n")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    rows = [json.dumps({"text": f"row {i}"}) for i in range(5)]
    rows.insert(2, "")
    rows.insert(3, "not json")
    rows.insert(5, json.dumps({"other": 1}))
    rows.insert(6, json.dumps({"text": " "}))
    (tmp_path / "sub" / "rows.jsonl").write_text("\n".join(rows) + "\n")
    corpus = read_corpus(str(tmp_path))
    assert _hash(corpus) == "b985d067aa27f144"
    assert [name for name, _ in corpus.documents if is_heldout(name, 0.3)] == [
        "doc1.txt",
        "doc3.txt",
        "doc6.txt",
        "doc7.txt",
        "doc9.txt",
        "sub/b.rst",
    ]
    lines = [f"line {i}\n" for i in range(9000)]
    (tmp_path / "book.txt").write_text("".join([*lines, "\u2028 odd\x0c break\r\nend"]))
    corpus = read_corpus(str(tmp_path / "book.txt"))
    assert _hash(corpus) == "a2460649b8d24863"
    assert len(corpus.documents) == 6


def _hash(corpus):
    digest = hashlib.sha256()
    for name, text in corpus.documents:
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def test_a_large_file_in_a_folder_is_one_document(tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000)) + "\n" * 200_000
    (tmp_path / "book.txt").write_text(text)
    (tmp_path / "other.txt").write_text("other\n")
    documents = read_corpus(str(tmp_path)).documents
    assert documents == (("book.txt", text), ("other.txt", "other\n"))
    (tmp_path / "other.txt").unlink()
    assert read_corpus(str(tmp_path)).documents == (("book.txt", text),)


def test_a_lone_file_is_cut_into_blocks_that_split(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(40_000)))
    train, heldout = (load_documents(str(file), s, 0.3) for s in ("train", "heldout"))
    assert sum(map(len, train + heldout)) == file.stat().st_size


def test_errors_name_the_source_and_the_remedy(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere.*does not exist; name a"):
        load_documents(str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no text among its 0 files"):
        load_documents(str(empty))
    (empty / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="every one of its 1 files was skipped"):
        load_documents(str(empty))
    with pytest.raises(ValueError, match="split='test' is unknown"):
        load_documents(str(folder), "test")
    with pytest.raises(ValueError, match="heldout_fraction=1.0"):
        load_documents(str(folder), "train", 1.0)
    with pytest.raises(ValueError, match="add files, or change"):
        load_documents(str(folder), "heldout", 1e-12)
