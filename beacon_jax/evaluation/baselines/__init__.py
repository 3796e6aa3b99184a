"""The methods by name. A new one is a file with a `Method` and a line here."""

from collections.abc import Callable, Sequence
from typing import Any

from beacon_jax.evaluation.methods import Beacon, Full, Method, Window

FAMILIES: dict[str, Callable[..., Method]] = {
    m.family: m for m in (Beacon, Full, Window)
}


def make_methods(names: Sequence[str], ratios: Sequence[int | str]) -> list[Method]:
    """The methods of --methods; those with a ratio once per ratio.

    Args:
      ratios: numbers, or "adapt": the release's rule by the length of each text.

    Raises:
      ValueError: an unknown name, or a method that needs ratios and gets none.
    """
    made: list[Method] = []
    for name in names:
        if name not in FAMILIES:
            raise ValueError(
                f"--methods names {name!r}; known are {', '.join(sorted(FAMILIES))}."
            )
        family: Any = FAMILIES[name]
        if family.per_ratio and not ratios:
            raise ValueError(f"--methods={name} needs --ratios, for example 2,4,8.")
        made += [family(r) for r in ratios] if family.per_ratio else [family()]
    return made
