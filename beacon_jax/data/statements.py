"""Statements put into text, as examples of what a reader may be asked for later.

"Mira Lindqvist keeps the code of the lantern in Riga: 418." Each has a value that
nothing in the text around it tells. None has the wording of a benchmark: passkeys and
the needles of RULER are what is measured, so they are not to be learned from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from beacon_jax.tokenise import encode

# Words of each kind.
WORDS = {
    "who": """
        Mira Jonas Aisha Tobias Leyla Marcus Priya Henrik Salma Viktor Noemi Caleb Yara
        Stefan Ingrid Rafael Chiara Dmitri Fatima Gareth Hanna Idris Katya Lorenzo
    """,
    "surname": """
        Lindqvist Okafor Brandt Moreau Castellano Novak Haddad Whitfield Tanaka Ferreira
        Kowalski Abernathy Duval Sorensen Petrov Nakamura
    """,
    "where": """
        Antwerp Bergen Cordoba Dakar Erfurt Florence Gdansk Havana Istanbul Jakarta
        Krakow Leipzig Marseille Nantes Osaka Porto Quito Riga Seville Tallinn
    """,
    "thing": """
        lantern ferry archive telescope greenhouse bakery locker harbour violin bicycle
        printer reservoir beehive orchard turbine piano tunnel library compass aquarium
        workshop cabinet furnace museum sailboat camera chapel warehouse garden clock
    """,
    "kind": """
        code number password label name serial address price deadline extension pin
        identifier colour size
    """,
    "word": """
        amber birch cobalt drift ember fable granite heron indigo juniper kestrel lichen
        mosaic nectar opal pebble quill raven saffron thistle umber vesper willow zephyr
    """,
    "month": "January March April June August September October December",
}
CHOICES = {kind: tuple(words.split()) for kind, words in WORDS.items()}

FORMS = (
    "\n{who} keeps the {kind} of the {thing} in {where}: {value}.\n",
    " The {kind} of the {thing} is {value}.",
    "\nRemember this: the {thing} of {who} has the {kind} {value}.\n",
    " {who} told us that the {kind} was changed to {value}.",
    "\n{thing}: {value}\n",
    "\n- {kind} for {who}: {value}\n",
    " When {who} came back from {where}, the {thing} had been sold for {value}.",
    "\nNote for {who}: use {value} to open the {thing} in {where}.\n",
    " In {where} they call the {thing} {value}.",
    "\nThe {thing} in {where} belongs to {who}; its {kind} is {value}, and no other.\n",
    " It was {who} who wrote {value} on the {thing}.",
    "\n{kind} = {value}  ({thing}, {where})\n",
    " Only {value} opens the {thing}. Only {value} will do.",
    "\nDo not forget: on {date}, {who} meets the {thing} people in {where}.\n",
    " {who} lives in {where} and has owned the {thing} since {date}.",
    "\nThe {kind}, in case somebody asks, is {value}. Again: {value}.\n",
)


@dataclass(frozen=True)
class Marked:
    """A text with statements in it.

    Attributes:
      tokens: int32 [length].
      stated: which of them belong to a statement.
    """

    tokens: Int[np.ndarray, " n"]
    stated: Bool[np.ndarray, " n"]


def draw_statement(rng: np.random.Generator) -> str:
    """Draws a statement, with the spaces or line ends that it has around it."""
    one = _one_of(rng)
    drawn = {kind: one(words) for kind, words in CHOICES.items()}
    if rng.random() < 0.5:
        drawn["who"] += f" {drawn['surname']}"
    date = f"{rng.integers(1, 29)} {drawn['month']} {rng.integers(1700, 2100)}"
    return one(FORMS).format(**drawn, date=date, value=_value(rng))


def put_statements(
    rng: np.random.Generator,
    tokens: Int[np.ndarray, " n"],
    length: int,
    tokenizer: Any,
    most: int = 3,
) -> Marked:
    """Puts 1 to `most` statements at random places of a text.

    Args:
      tokens: at least `length` of them; the first ones are used.
      length: tokens of the result. At most a third of them are statements.
    """
    made: list[np.ndarray] = []
    for _ in range(int(rng.integers(1, most + 1))):
        ids = np.asarray(encode(tokenizer, draw_statement(rng), "behind"), np.int32)
        if sum(map(len, made)) + len(ids) <= length // 3:
            made.append(ids)
    fill = length - sum(map(len, made))
    cuts = np.sort(rng.integers(0, fill + 1, len(made)))
    parts, at = [], 0
    for cut, ids in zip(cuts, made, strict=True):
        parts += [(tokens[at:cut], False), (ids, True)]
        at = cut
    parts.append((tokens[at:fill], False))
    return Marked(
        np.concatenate([x for x, _ in parts]).astype(np.int32),
        np.concatenate([np.full(len(x), stated) for x, stated in parts]),
    )


def _one_of(rng: np.random.Generator) -> Callable[[Sequence[str]], str]:
    return lambda some: some[int(rng.integers(len(some)))]


def _value(rng: np.random.Generator) -> str:
    """Draws a number of 2 to 9 digits, words, or a code of letters and digits."""
    one, kind, words = _one_of(rng), int(rng.integers(6)), CHOICES["word"]
    digits = lambda low, high: "".join(
        map(str, rng.integers(0, 10, int(rng.integers(low, high + 1))))
    )
    if kind < 2:
        return digits(2, 9)
    if kind == 2:
        return one(words)
    if kind == 3:
        return f"{one(words)}{one((' ', '-', '_'))}{one(words)}"
    if kind == 4:
        letters = "".join(one("ABCDEFGHKLMNPRSTUVWXYZ") for _ in range(3))
        return f"{letters}{one(('-', ''))}{digits(2, 5)}"
    hexadecimal = [one("0123456789abcdef") for _ in range(int(rng.integers(8, 33)))]
    return "".join(hexadecimal)
