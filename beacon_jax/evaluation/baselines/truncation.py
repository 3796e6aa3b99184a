"""Truncation: only as many tokens of the past are read as beacons would keep slots.

What is left out is never read, by any layer, so these cost least of all methods.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation.baselines.select import Budgeted, read
from beacon_jax.evaluation.model import Model, Rows

Tokens = Int[np.ndarray, " n"]


class Truncation(Budgeted):
    """Reads `cut(row, k)`, k tokens of each row, as if they were all there is."""

    cut: Callable[[Tokens, int], Tokens]

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        sizes = self.budget(model, past).tolist()
        pairs = zip(past, sizes, strict=True)
        return read(model, [type(self).cut(row, k) for row, k in pairs])


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
