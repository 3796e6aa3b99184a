"""Says which name was meant where a call has an argument that a function does not."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from beacon_jax.names import nearest


def hinted[F: Callable[..., Any]](
    called: str, elsewhere: Mapping[str, str] | None = None
) -> Callable[[F], F]:
    """Makes a decorator: what is no argument of the function names the nearest one.

    Args:
      called: how users call it, for messages: "load", "Memory.load".
      elsewhere: what other libraries call an argument, and its name here, or a whole
        sentence.
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
                meant = (elsewhere or {}).get(name) or nearest(name, names)
                if meant and " " in meant:
                    hint = meant
                elif meant in names:
                    hint = f"did you mean {meant}?"
                else:
                    hint = "it has no such one."
                value = repr(keywords[name])
                value = value if len(value) <= 60 else value[:57] + "..."
                raise TypeError(
                    f"{called}({name}={value}): {hint} The arguments are "
                    f"{', '.join(names)}."
                )
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
