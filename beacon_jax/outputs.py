"""Checks that a place can be written, before hours of work end there in an error."""

import os
import tempfile
from pathlib import Path


def check_folder(name: str, folder: Path) -> None:
    """Checks that a folder can be made, or written into; nothing of it stays.

    Args:
      name: of the argument, as the user types it ("--out").

    Raises:
      OSError: it cannot; names the argument, its value and the remedy.
    """
    _check(f"{name}={folder}", folder)


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
