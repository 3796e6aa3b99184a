"""Finds the name that somebody may have meant."""

import difflib
from collections.abc import Collection, Iterable


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


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Raises ValueError, which names the nearest choice, unless `value` is known."""
    if value not in known:
        raise ValueError(
            f"{name}={value!r} is unknown: {meant(value, known)}use {', '.join(known)}."
        )
