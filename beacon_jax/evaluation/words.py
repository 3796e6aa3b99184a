"""English words for generated tasks: those of `wonderwords`, which RULER draws from.

Its lists (MIT, text files in the wheel, no dependencies) rather than a list of our own:
how hard a key or a counted word is depends on how it tokenises, and common-word
extraction asks for ~9,000 different words at 128K tokens.
"""

import functools
from importlib import resources

import numpy as np

from beacon_jax.resources import require


@functools.cache
def _read(name: str) -> tuple[str, ...]:
    """The single words of a list, sorted ("dust storm" and the like are left out)."""
    require("wonderwords", extra="ruler", for_="a task of RULER")
    file = resources.files("wonderwords").joinpath("assets", name)
    lines = file.read_text(encoding="utf-8").splitlines()
    return tuple(sorted({line.strip() for line in lines if len(line.split()) == 1}))


def nouns() -> tuple[str, ...]:
    return _read("nounlist.txt")


def adjectives() -> tuple[str, ...]:
    return _read("adjectivelist.txt")


@functools.cache
def words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, sorted, each once: about 8,600."""
    return tuple(sorted({*nouns(), *adjectives(), *_read("verblist.txt")}))


def compound(rng: np.random.Generator) -> str:
    """An adjective and a noun, as in "purple-harbor": about 6 million of them."""
    first, second = adjectives(), nouns()
    return f"{first[rng.integers(len(first))]}-{second[rng.integers(len(second))]}"
