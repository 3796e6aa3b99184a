"""What the baselines share: the budget in slots, and reading text as it is."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from beacon_jax.core.feed import padded
from beacon_jax.core.memory import MemoryState, slot_nbytes
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.methods import Method, budget_slots, fitting, id_nbytes
from beacon_jax.evaluation.prefill import Prefill
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.mount import closed


class Budgeted(Method):
    """A method that keeps what fits into the bytes of its ratio's beacons."""

    per_ratio = True

    @property
    def biased(self) -> bool:
        """Whether slots have a bias besides."""
        return False

    def budget(self, model: Model, past: Rows) -> Int[np.ndarray, " B"]:
        """Counts the slots that each row may keep.

        They are as many as beacons and their sinks have, and no more than the row has
        tokens.
        """
        most = lambda row: self._slots(model, len(row))
        return np.asarray([min(most(row), len(row)) for row in past], np.int32)

    def most(self, model: Model, past: Rows) -> int:
        """Returns the largest budget of a run: one compiled program for all lengths."""
        return self._slots(model, max(self.longest, *map(len, past)))

    def _slots(self, model: Model, tokens: int) -> int:
        """Counts the slots of beacons; of the bytes of ids besides it makes slots."""
        config, dtype = model.config, model.net.dtype
        slots = budget_slots(config, tokens, self.number, self.recent)
        slot = slot_nbytes(config, dtype)
        if self.recent:
            slots += id_nbytes(config, tokens) // slot
        return fitting(slots, slot, slot_nbytes(config, dtype, self.biased))


def read(
    model: Model, rows: Rows, longest: int = 0, prefill: Prefill | None = None
) -> Memory:
    """The memory of these tokens with full attention; nothing is left open.

    It is the caller's own, to be donated.

    longest, prefill: of the method, where `rows` are what other methods read too.
    """
    if prefill is None:
        return closed(reading.read(model, rows, 0, longest=longest)[1])
    return closed(prefill.copy(model, rows, longest))


def of_slots(memory: Memory, state: MemoryState) -> Memory:
    """The memory with the slots of `state`, which were chosen or made from its own.

    The account divides the text evenly among them (`History.evenly`).
    """
    counts = np.asarray(state.slots).tolist()
    rows = [row.evenly(n) for row, n in zip(memory.rows, counts, strict=True)]
    return dataclasses.replace(memory, state=state, rows=tuple(rows))


def as_index(rows: Sequence[Int[np.ndarray, " n"]], size: int) -> Int[Array, "1 B n 1"]:
    """Slots of each row for `keep`, the same in all layers and heads."""
    return jnp.asarray(padded(rows, size)[None, :, :, None])
