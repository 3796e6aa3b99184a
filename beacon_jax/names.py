"""Finds the name that somebody may have meant; shortens values for a message."""

import difflib
from collections.abc import Iterable


def nearest(value: object, known: Iterable[str]) -> str:
    """Returns the nearest known name, in whatever case; "" if none is near."""
    name, names = str(value), [*filter(None, known)]
    same = [known for known in names if known.lower() == name.lower()]
    return next(iter(same or difflib.get_close_matches(name, names, n=1)), "")


def meant(value: object, known: Iterable[str]) -> str:
    """Returns "did you mean NAME? " for the nearest known name; "" if none is near.

    It stands in a message before the list of all names.
    """
    near = nearest(value, known)
    return f"did you mean {near}? " if near else ""


def short(text: str) -> str:
    """Returns a text of at most 60 characters, cut with "..." if it is longer."""
    return text if len(text) <= 60 else text[:57] + "..."
