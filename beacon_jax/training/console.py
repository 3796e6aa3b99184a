"""Prints lines for the user, and writes files as a whole or not at all."""

import os
import sys
from pathlib import Path


class OutputClosed(OSError):
    """An error of stdout: its reader has gone, or its disk is full."""


def say(text: str) -> None:
    """Prints a line at once.

    Raises:
      OutputClosed: it cannot be written.
    """
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:  # ValueError: of a file that was closed
        reason = getattr(error, "strerror", None) or error
        raise OutputClosed(f"stdout cannot be written ({reason})") from error


def drop_unread() -> None:
    """Lets a process whose stdout nobody reads end without another error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_whole(path: Path, text: str) -> None:
    """Replaces a file; a kill or a full disk leaves the old one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
