"""Text sources: deterministic disjoint splits, errors that say what to do."""

import json

import pytest

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
    assert sorted(count for _, count in corpus.skipped) == [1, 2]


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
    with pytest.raises(ValueError, match="add files or change"):
        load_documents(str(folder), "heldout", 1e-12)
