"""Finds the name that somebody may have meant."""

import difflib
from collections.abc import Iterable


def nearest(value: object, known: Iterable[str]) -> str:
    """Returns the nearest known name; "" if none is near."""
    near = difflib.get_close_matches(str(value), [*filter(None, known)], n=1)
    return near[0] if near else ""


def meant(value: object, known: Iterable[str]) -> str:
    """Returns "did you mean NAME? " for the nearest known name; "" if none is near.

    It stands in a message before the list of all names.
    """
    near = nearest(value, known)
    return f"did you mean {near}? " if near else ""
