"""Texts of the recall task: Markov symbols, key and value pairs among them, questions.

    eos s KEY VALUE s s s s KEY VALUE s s ... s | KEY VALUE KEY VALUE ...
    `------------- context, C tokens ----------'  `---- questions ------'

A value is random, so that it can only be recalled. It is looked for by its key, which
the context has once. Symbols cost 2 bits each to predict, whatever is remembered.

Shapes: B rows, T = C + 2 Q tokens, Q questions.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from beacon_jax.core.loss import IGNORE

KIND = 64  # symbols, keys and values: so many of each
EOS, SYMBOL, KEY, VALUE = 0, 1, 1 + KIND, 1 + 2 * KIND  # the first id of each kind
VOCAB = 1 + 3 * KIND
CHANCE = 1 / KIND
SUCCESSORS = 4  # symbols that may follow one: 2 bits each
TEXT_WEIGHT = 0.1  # of what is no answer, in a loss
# Streams of random numbers: no text of training is one of evaluation.
TRAINING, EVALUATION = 0, 1


class Texts(NamedTuple):
    """Rows of text.

    Attributes:
      tokens: ids [B, T].
      labels: the token behind each one, -100 where none counts [B, T].
      weights: of the labels in a loss [B, T].
      answers: places whose labels are the values asked for [B, T].
    """

    tokens: Int[np.ndarray, "B T"]
    labels: Int[np.ndarray, "B T"]
    weights: Float[np.ndarray, "B T"]
    answers: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True)
class Recall:
    """A kind of text: how long its context is, and how many pairs are in it.

    Attributes:
      context: C, tokens in front of the questions.
      least, most: pairs of a context.
      questions: Q, most keys asked for behind it, different ones. A context with
        fewer pairs is asked for all of them; the rest of its row counts nowhere.
    """

    context: int
    least: int
    most: int
    questions: int

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= KIND or self.questions < 1:
            raise ValueError(f"{self}: 0 < least <= most <= {KIND} must hold.")
        if self.most > (self.context - 2) // 2:
            raise ValueError(f"{self}: a context has room for one pair in 2 tokens.")

    @property
    def length(self) -> int:
        """T, tokens of a row."""
        return self.context + 2 * self.questions

    def draw(self, rng: np.random.Generator, rows: int) -> Texts:
        """Draws rows of text; a function of the generator's state."""
        c, q = self.context, self.questions
        order = np.argsort(rng.random((rows, KIND)), axis=1)  # keys, all different
        values = VALUE + rng.integers(0, KIND, (rows, KIND))
        count = rng.integers(self.least, self.most + 1, (rows, 1))
        tokens = np.empty((rows, self.length), np.int32)
        tokens[:, 0] = EOS
        tokens[:, 1:c] = _symbols(rng, rows, c - 1)
        # Pairs begin at random even places 2, 4, ...: none overlap, and none is cut by
        # a beacon or a window. From odd ones, beacons recalled 0 % after 1,650 steps.
        places = np.argsort(rng.random((rows, (c - 2) // 2)), axis=1)
        places = 2 + 2 * places
        real = np.arange(max(self.most, q)) < count
        row, number = np.nonzero(real)
        at = places[row, number]
        tokens[row, at] = KEY + order[row, number]
        tokens[row, at + 1] = values[row, number]
        asked = np.argsort(np.where(real, rng.random(real.shape), 1.0), axis=1)[:, :q]
        there = np.arange(q) < count
        key, value = KEY + order, values
        tokens[:, c:] = EOS
        tokens[:, c::2] = np.where(there, np.take_along_axis(key, asked, 1), EOS)
        tokens[:, c + 1 :: 2] = np.where(
            there, np.take_along_axis(value, asked, 1), EOS
        )
        answers = np.zeros(tokens.shape, bool)
        answers[:, c::2] = there
        return _labelled(tokens, answers, np.arange(self.length) < c + 2 * count)


def repeats(
    rng: np.random.Generator, rows: int, length: int, least: int = 6, most: int = 24
) -> Texts:
    """Draws random segments that are repeated up to the end of the row.

    All behind the first repetition can be recalled. Without such texts recall does not
    emerge in 2,000 steps, with them in some hundred: Zucchet et al. 2025
    (arXiv 2505.17863) show how repetition shortens the plateau.

    Args:
      least, most: length of a segment.
    """
    segment = rng.integers(SYMBOL, VOCAB, (rows, most)).astype(np.int32)
    period = rng.integers(least, most + 1, (rows, 1))
    tokens = np.take_along_axis(segment, np.arange(length) % period, axis=1)
    recalled = np.arange(length) >= period - 1
    return _labelled(tokens, recalled, recalled)


def joined(*parts: Texts) -> Texts:
    """Joins rows of equal lengths."""
    return Texts(*map(np.concatenate, zip(*parts, strict=True)))


def generator(seed: int, stream: int, *part: int) -> np.random.Generator:
    """Makes the generator of a part of the texts; streams never meet."""
    return np.random.default_rng([stream, seed, *part])


def _symbols(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Draws Markov chains of symbols; every seed has the same language."""
    language = np.random.default_rng(KIND).permuted(
        np.tile(np.arange(KIND), (KIND, 1)), axis=1
    )[:, :SUCCESSORS]
    now, found = rng.integers(0, KIND, rows), []
    for step in rng.integers(0, SUCCESSORS, (length, rows)):
        found.append(now)
        now = language[now, step]
    return SYMBOL + np.stack(found, axis=1)


def _labelled(tokens: np.ndarray, answers: np.ndarray, counted: np.ndarray) -> Texts:
    """Shifts tokens to labels; the last token of a row has none."""
    labels = np.full_like(tokens, IGNORE)
    labels[:, :-1] = np.where(counted[:, :-1], tokens[:, 1:], IGNORE)
    answers = answers & (labels != IGNORE)
    weights = np.where(answers, 1.0, TEXT_WEIGHT).astype(np.float32)
    return Texts(tokens, labels, np.where(labels == IGNORE, 0.0, weights), answers)
