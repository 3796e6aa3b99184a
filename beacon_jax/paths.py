"""Checks the name of a file that is to be written, for arguments and for flags."""

import errno
import os
from pathlib import Path

LONGEST = 255  # bytes of a name, on all usual file systems


def check_name(path: object, name: str = "path") -> str:
    """Returns a path as text.

    Args:
      name: of the argument ("path") or the flag ("--out"), for messages.

    Raises:
      TypeError: neither a str nor a `Path`.
      ValueError: a name that no file can have.
    """
    if not isinstance(path, str | os.PathLike):
        what = "None" if path is None else f"of type {type(path).__name__}"
        shown = repr(path) if len(repr(path)) <= 60 else f"{repr(path)[:57]}..."
        raise TypeError(f"{name}={shown} is {what}: give the name of a file, a str.")
    text = os.fsdecode(path)
    if not text.strip():
        shown = text if name.startswith("--") else repr(text)
        raise ValueError(f"{name}={shown} is empty and names no file: name a file.")
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
    """Returns where a file is written: behind links, and nothing but a file.

    Args:
      name: of the argument ("path") or the flag ("--out"), for messages.
      remedy: how to say `overwrite`.

    Raises:
      TypeError, ValueError: as `check_name`; a folder, device or pipe, or a name below
        what is no folder or cannot be written.
      FileExistsError: the file exists, without `overwrite`.
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
    if not os.access(beside, os.W_OK | os.X_OK):
        raise ValueError(
            f"{name}={text}: nothing may be written into {beside}: name a file "
            "elsewhere, or ask for the permission."
        )
    return real
