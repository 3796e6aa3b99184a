"""Places that cannot be written are named with the remedy."""

import errno
import os
import re

import pytest

from beacon_jax.paths import check_file, check_folder, new_file, whole_file, write_whole


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "--out={} is a file: name a folder."),
        ("file/a/b", "--out={} lies below {top}/file, which is a file: name a folder."),
        ("link", "--out={}: {top}/link is a broken link: remove it."),
        ("link/a", "--out={}: {top}/link is a broken link: remove it."),
        ("/proc/run", "--out={} cannot be written (No such file or directory): use"),
    ],
)
@pytest.mark.parametrize("check", [check_folder, check_file])
def test_what_cannot_be_written_is_named(check, place, message, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    path, given = tmp_path / place, str(tmp_path / place)
    if check is check_file:
        given = f"{path}/x.jsonl: the folder {path}"
        path = path / "x.jsonl"
    with pytest.raises(OSError, match=re.escape(message.format(given, top=tmp_path))):
        check("--out", path)


@pytest.mark.parametrize("given", ["", "  ", "a\0b", "~/a", "x" * 300])
def test_a_folder_without_a_name_is_not_the_current_one(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--out="):
        check_folder("--out", given)


def test_nothing_stays_of_a_look(tmp_path):
    check_folder("--out", tmp_path / "a" / "b")
    check_file("--out", tmp_path / "c" / "d.jsonl")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="--out=.* is a folder: name a file"):
        check_file("--out", tmp_path)


def test_a_whole_file_has_a_partial_name_that_nobody_else_has(tmp_path):
    path = tmp_path / ("n" * 255)
    mine = tmp_path / f".{'n' * 20}.partial"
    mine.write_text("mine")
    write_whole(tmp_path / ("n" * 20), "one")
    write_whole(path, "two")
    assert (mine.read_text(), path.read_text()) == ("mine", "two")
    assert path.stat().st_mode == mine.stat().st_mode
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "two"
    assert len([*tmp_path.iterdir()]) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_file_that_is_not_written_to_its_end_is_named(tmp_path, number):
    said = f"--out={tmp_path}/a cannot be written .*: make room"
    with pytest.raises(OSError, match=said), new_file(tmp_path / "a", "--out"):
        raise OSError(number, os.strerror(number))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConnectionError, match="none"), new_file(tmp_path / "a"):
        raise ConnectionError("none")
