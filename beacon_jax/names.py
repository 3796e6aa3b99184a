"""Finds the name that somebody may have meant; shortens values for a message."""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any


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


def imported(given: str, module: str, name: str, form: str) -> Any:
    """Imports `name` of a module that a user named.

    Args:
      given: the argument with its value, as messages have it; `form`: how it goes.

    Raises:
      ValueError: there is no such module, or nothing of this name in it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{given} cannot be imported ({error}): the form is {form}, of a module in "
            "the current folder or an installed package."
        ) from error


def unknown(
    called: str,
    name: str,
    value: Any,
    names: Sequence[str],
    elsewhere: Mapping[str, str] | None = None,
) -> TypeError:
    """Makes the error of an argument that a call does not have.

    Args:
      called: how users call it: "load", "Memory.load".
      names: of its arguments; the nearest one is named.
      elsewhere: what other libraries call an argument, and its name here, or a whole
        sentence.
    """
    meant = (elsewhere or {}).get(name) or nearest(name, names)
    hint = f"did you mean {meant}?" if meant in names else "it has no such one."
    if " " in meant:
        hint = meant
    shown = short(repr(value))
    return TypeError(
        f"{called}({name}={shown}): {hint} The arguments are {', '.join(names)}."
    )


def hinted[F: Callable[..., Any]](
    called: str, elsewhere: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Makes a decorator: what is no argument of the function names the nearest one.

    Args:
      called, elsewhere: as in `unknown`.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [
            p for p in signature.parameters.values() if p.name not in ("self", "cls")
        ]
        names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

        @functools.wraps(function)
        def checked(*given: Any, **keywords: Any) -> Any:
            for name, value in keywords.items():
                if name not in names and len(names) == len(parameters):
                    raise unknown(called, name, value, names, elsewhere)
            try:
                signature.bind(*given, **keywords)
            except TypeError as error:
                said = f"{called}: {error}. The arguments are {', '.join(names)}"
                if by_name and len(given) > len(signature.parameters) - len(by_name):
                    said += f" ({', '.join(by_name)} only by name)"
                raise TypeError(f"{said}.") from None
            return function(*given, **keywords)

        return checked  # type: ignore[return-value]

    return decorate


def hinted_init[C: type](kind: C) -> C:
    """Decorates a class: what is no argument of it names the nearest one."""
    kind.__init__ = hinted(kind.__name__)(kind.__init__)
    return kind


def short(text: str) -> str:
    """Returns a text of at most 60 characters, cut with "..." if it is longer."""
    return text if len(text) <= 60 else text[:57] + "..."
