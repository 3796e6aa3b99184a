"""Says which name was meant where a call has an argument that a function does not."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from beacon_jax.names import nearest, short


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
        names = [
            name
            for name, p in signature.parameters.items()
            if name not in ("self", "cls") and p.kind is not p.VAR_KEYWORD
        ]
        kinds = {p.kind for p in signature.parameters.values()}
        by_name = [
            name
            for name, p in signature.parameters.items()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]

        @functools.wraps(function)
        def checked(*given: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name in names or inspect.Parameter.VAR_KEYWORD in kinds:
                    continue
                raise unknown(called, name, keywords[name], names, elsewhere)
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
