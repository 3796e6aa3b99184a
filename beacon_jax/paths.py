"""Checks files: those that are read, and where something is to be written.

The latter before hours of work end there in an error.

A name is that of an argument ("path") or of a flag as the user types it ("--out").
"""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from beacon_jax.forms import unlike
from beacon_jax.names import short

POINTER = b"version https://git-lfs"  # what a pointer of git-lfs begins with
PACK = b'"beacon_pack"'  # is in the first bytes of every beacon pack
# Of a file system that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
LONGEST = 255  # bytes of a name, on all usual file systems


def check_name(path: object, name: str = "path") -> str:
    """Returns a path as text.

    Args:
      name: of the argument ("path") or the flag ("--out"), for messages.

    Raises:
      TypeError: neither a str nor a `Path`.
      ValueError: a name that no file or folder can have.
    """
    if not isinstance(path, str | os.PathLike):
        what = "None" if path is None else f"of type {type(path).__name__}"
        shown = repr(path) if len(repr(path)) <= 60 else f"{repr(path)[:57]}..."
        raise TypeError(f"{name}={shown} is {what}: give the name of a file, a str.")
    text = os.fsdecode(path)
    if not text.strip():
        shown = text if name.startswith("--") else repr(text)
        raise ValueError(
            f"{name}={shown} is empty and names no file or folder: name one."
        )
    if "\0" in text:
        raise ValueError(
            f"{name}={text!r} has a NUL character at {text.index(chr(0))}, which no "
            "name may have: leave it out."
        )
    if text.startswith("~/"):
        raise ValueError(
            f"{name}={text}: only a shell knows ~, and not inside of a flag: write "
            f"{os.path.expanduser(text)}."
        )
    try:
        os.lstat(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"{name}={text!r} has characters that are no text: use another name."
        ) from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise ValueError(
                f"{name}={shown} is too long: a name has at most {LONGEST} bytes, this "
                f"one {max(len(os.fsencode(part)) for part in Path(text).parts)}."
            ) from None
    return text


def check_new(
    path: object, name: str = "path", *, overwrite: bool, remedy: str
) -> Path:
    """Returns where a beacon pack is written: behind links, and nothing but a file.

    Another file than a pack is never replaced: weights, a text, notes.

    Args:
      name: of the argument ("path") or the flag ("--out"), for messages.
      remedy: how to say `overwrite`.

    Raises:
      TypeError, ValueError: as `check_name`; a folder, device or pipe, or a name below
        what is no folder or cannot be written.
      FileExistsError: the file exists, without `overwrite`, or is no pack.
    """
    text = check_name(path, name)
    real = Path(os.path.realpath(text))
    beside = real.parent
    while not beside.exists():
        beside = beside.parent
    if not beside.is_dir():
        raise ValueError(f"{name}={text}: {beside} is a file, not a folder.")
    if real.is_dir():
        raise ValueError(f"{name}={text} is a folder: name a file.")
    if real.exists() and not real.is_file():
        raise ValueError(f"{name}={text} is a device or pipe: name a file.")
    if real.exists() and not overwrite:
        raise FileExistsError(f"{name}={text} exists: name another file, or {remedy}.")
    if real.exists() and not _is_pack(real):
        raise FileExistsError(
            f"{name}={text} is no beacon pack, and would be replaced: name another "
            "file, or move that one away."
        )
    if not os.access(beside, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name}={text}: nothing may be written into {beside}: name a file "
            "elsewhere, or ask for the permission."
        )
    return real


def check_folder(name: str, folder: str | Path) -> None:
    """Checks that a folder can be made, or written into; nothing of it stays.

    Args:
      name: of the argument, as the user types it ("--out").
      folder: as it was given: the `Path` of an empty text is the current folder.

    Raises:
      ValueError: an empty text, or another name that no folder can have.
      OSError: it cannot be written; names the argument, its value and the remedy.
    """
    check_name(folder, name)
    _check(f"{name}={folder}", Path(folder))


def check_file(name: str, file: Path) -> None:
    """Checks that a file can be made or replaced, as `check_folder`."""
    folder = file.absolute().parent
    _check(f"{name}={file}: the folder {folder}", folder)
    if file.is_dir():
        raise IsADirectoryError(f"{name}={file} is a folder: name a file.")


def _check(given: str, folder: Path) -> None:
    try:
        here = folder.absolute()
        while not here.exists():
            if here.is_symlink():
                raise FileExistsError(f"{given}: {here} is a broken link: remove it.")
            here = here.parent
        if not here.is_dir():
            below = "" if here == folder.absolute() else f"lies below {here}, which "
            raise NotADirectoryError(f"{given} {below}is a file: name a folder.")
        # It has a name of its own: all processes of a run look at the same time.
        with tempfile.NamedTemporaryFile(dir=here, prefix=".writable-") as probe:
            probe.write(b"1")
            probe.flush()
    except OSError as error:
        if error.errno is None:  # of the lines above
            raise
        raise OSError(
            f"{given} cannot be written ({error.strerror}): use another folder, or "
            "make room."
        ) from error
    if not os.access(here, os.R_OK):
        raise PermissionError(f"{given} cannot be read: use another folder.")


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by this text; a kill or a full disk leaves the old one."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that is at `path` when the block ends without an error, else not."""
    with new_file(path) as partial, partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def new_file(path: Path, name: str = "path") -> Iterator[Path]:
    """Yields a file beside `path` that takes its name when the block ends well.

    An error removes it; a killed process leaves `.NAME.*.partial`, a name that nobody
    else has, and what was at `path` before.

    Args:
      name: of the argument ("path") or the flag ("--out"), for messages.

    Raises:
      OSError: it cannot be made or written, as on a full disk; names it.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, made = tempfile.mkstemp(".partial", partial_prefix(path), folder)
    except OSError as error:
        raise OSError(
            f"{name}={path} cannot be written ({error.strerror}): name a file "
            "elsewhere."
        ) from error
    os.close(handle)
    partial = Path(made)
    try:
        with named_when_full(f"{name}={path}"):
            yield partial
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)  # mkstemp lets nobody else read it
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name, after the bytes
    finally:
        os.close(handle)


@contextlib.contextmanager
def named_when_full(given: str) -> Iterator[None]:
    """Names what cannot be written ("--out=a.beacon") where the disk ends or fails.

    Raises:
      OSError: with the remedy, in place of one that only has a number.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(
            f"{given} cannot be written ({error.strerror}): make room, or write "
            "elsewhere."
        ) from error


def partial_prefix(path: Path) -> str:
    """Returns how names begin of what is to be at `path`, short enough for any of it.

    A character has at most four bytes.
    """
    return f".{path.name[:50]}."


def check_fetched(path: Path) -> None:
    """Raises ValueError if a file is a pointer of git-lfs in its place, or a folder."""
    is_there(path)
    if is_pointer(path):
        raise ValueError(
            f"{path} is a pointer of git-lfs, not the file: fetch it (git lfs pull in "
            "its folder), or download it again."
        )


def is_pointer(path: str | Path) -> bool:
    """Tells whether a file is a pointer of git-lfs in place of its content."""
    with open(path, "rb") as file:
        return file.read(len(POINTER)) == POINTER


def _is_pack(path: Path) -> bool:
    """Tells whether a file is empty or begins as a beacon pack, damaged or not."""
    if not path.stat().st_size:
        return True
    try:
        with path.open("rb") as file:
            return PACK in file.read(4096)
    except OSError:  # nobody may read it
        return False


def is_there(path: Path) -> bool:
    """Tells whether a file is there, which may be left out.

    Raises:
      ValueError: a folder, or a link to nothing, as in a cache of which a part was
        deleted, has its name.
    """
    if path.is_file():
        return True
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is expected: replace it.")
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link to a file that is gone: download it again, or delete it."
        )
    return False


def read_object(path: Path, form: Any = None) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
      form: that it must have (`forms`); None: any.

    Raises:
      ValueError: it is no JSON, or no object, or a pointer of git-lfs, or a folder, or
        a key is in one object twice, or it does not have the form.
    """
    check_fetched(path)
    content = parse_object(path.read_bytes(), str(path))
    if form is not None and (wrong := unlike(content, form, str(path))):
        raise ValueError(f"{wrong}: mend or replace the file.")
    return content


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Parses a JSON object; UTF-8, a byte order mark may be in front.

    A key that is there twice has two values, of which parsers take the last without a
    word: it is an error.

    Args:
      name: of what holds it, for messages.

    Raises:
      ValueError: as `read_object`.
    """
    try:
        content = json.loads(data.decode("utf-8-sig"), object_pairs_hook=single)
    except RepeatedKeyError as error:
        raise ValueError(f"{name} has the key {error}: keep one of them.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}. Mend or replace it.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{name} has {type(content).__name__} where a JSON object is expected: "
            "mend or replace it."
        )
    return content


class RepeatedKeyError(Exception):
    """A key that an object has twice, and its values."""


def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object of its pairs, for `json.loads(..., object_pairs_hook=single)`.

    Raises:
      RepeatedKeyError: a key is there twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        key = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
        values = ", ".join(short(repr(v)) for k, v in pairs if k == key)
        raise RepeatedKeyError(f"{short(key)!r} more than once ({values})")
    return made
