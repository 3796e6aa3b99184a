"""Prints lines for the user, and writes files as a whole or not at all."""

import os
import sys


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
