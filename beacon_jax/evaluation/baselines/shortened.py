"""Fewer tokens: only as many of the past are read as beacons would keep slots.

What is left out is never read, by any layer, so these cost least of all methods.
`baselines.text` has those that write a shorter text.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from beacon_jax.evaluation.baselines.select import Budgeted, read
from beacon_jax.evaluation.reading import Rows, empty, losses
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model

Tokens = Int[np.ndarray, " n"]


class Shortened(Budgeted):
    """Reads `shortened` rows as if they were all there is."""

    def shortened(self, model: Model, past: Rows, sizes: list[int]) -> list[Tokens]:
        """Returns at most sizes[i] tokens of each row."""
        raise NotImplementedError

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        sizes = self.budget(model, past).tolist()
        return read(model, self.shortened(model, past, sizes), self.longest)


class Truncation(Shortened):
    """Keeps `cut(row, k)`, k tokens of each row."""

    takes_recent = True
    cut: Callable[[Tokens, int], Tokens]

    def shortened(self, model: Model, past: Rows, sizes: list[int]) -> list[Tokens]:
        return list(map(type(self).cut, past, sizes))


class KeepHead(Truncation):
    """Keeps the first k tokens of the past; its tail is dropped."""

    family = "keep_head"
    cut = staticmethod(lambda row, k: row[:k])


class KeepTail(Truncation):
    """Keeps the last k tokens of the past; its head is dropped.

    Unlike streaming, these tokens were computed without anything in front of them.
    """

    family = "keep_tail"
    cut = staticmethod(lambda row, k: row[len(row) - k :])


class KeepEnds(Truncation):
    """Keeps the first k / 2 (rounded up) and the last k / 2 tokens of the past.

    How LongBench cuts prompts that are too long (Bai et al. 2023).
    """

    family = "keep_ends"
    cut = staticmethod(
        lambda row, k: np.concatenate([row[: k - k // 2], row[len(row) - k // 2 :]])
    )


class Selective(Shortened):
    """Selective Context (Li et al. 2023): tokens that could be guessed are dropped.

    The token-level form of the paper, with the evaluated model itself as the one that
    guesses: no other model, no sentence splitter. The k tokens of highest
    self-information (-log p given all before them) are kept, in their order. A row's
    first token, which nothing predicts, is always one of them.
    """

    family, takes_recent = "selective", True

    def shortened(self, model: Model, past: Rows, sizes: list[int]) -> list[Tokens]:
        make = lambda: self_information(model, past, self.longest)
        found = self.once(model, past, "self-information", make)
        # Of equal ones the first are kept.
        order = [np.argsort(-x, kind="stable") for x in found]
        return [
            row[np.sort(places[:k])]
            for row, places, k in zip(past, order, sizes, strict=True)
        ]


def self_information(model: Model, rows: Rows, longest: int = 0) -> list[np.ndarray]:
    """Computes -log p of each token given those before it, in nats; inf at first."""
    memory = empty(model, len(rows), 0, longest)
    read_rows, shifted = [row[:-1] for row in rows], [row[1:] for row in rows]
    found, _ = losses(model, memory, read_rows, shifted, 0, longest)
    found = np.concatenate([np.full((len(rows), 1), np.inf), found], axis=1)
    return [line[: len(row)] for line, row in zip(found, rows, strict=True)]
