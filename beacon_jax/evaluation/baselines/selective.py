"""Selective Context (Li et al. 2023): tokens that the model could guess are dropped.

The token-level form of the paper, with the evaluated model itself as the one that
guesses: no other model, no sentence splitter.
"""

import numpy as np
from jaxtyping import Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation.baselines.select import Budgeted, read
from beacon_jax.evaluation.model import Model, Rows


class Selective(Budgeted):
    """Reads the k tokens of highest self-information (-log p given all before them), in
    their order. A row's first token, which nothing predicts, is always one of them."""

    family = "selective"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        sizes = self.budget(model, past).tolist()
        found = self_information(model, past)
        return read(
            model,
            [
                row[most_informative(information, k)]
                for row, information, k in zip(past, found, sizes, strict=True)
            ],
        )


def self_information(model: Model, rows: Rows) -> list[np.ndarray]:
    """Computes -log p of each token given those before it, in nats; inf at first."""
    shifted = [row[1:] for row in rows]
    read_rows = [row[:-1] for row in rows]
    out, _ = model.feed(
        model.new_memory(len(rows), 0), read_rows, 0, outputs="loss", labels=shifted
    )
    losses = np.asarray(out.token_loss, np.float64)
    first = np.full((len(rows), 1), np.inf)
    found = np.concatenate([first, losses], axis=1)
    return [line[: len(row)] for line, row in zip(found, rows, strict=True)]


def most_informative(information: np.ndarray, k: int) -> Int[np.ndarray, " k"]:
    """Returns the rising places of the k highest; of equal ones the first."""
    return np.sort(np.argsort(-information, kind="stable")[:k])
