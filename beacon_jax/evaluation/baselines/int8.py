"""Memories of int8 keys and values (`model.quantize`), with and without beacons.

Their bytes are those of int8 slots (a byte per element and a float32 scale per slot and
head), whatever other methods of the same ratio keep; tables show them.
"""

import jax.numpy as jnp

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation.methods import Beacon, Method, budget_slots, feed_past
from beacon_jax.evaluation.model import Model, Rows


class Int8(Method):
    """The whole past, uncompressed, in int8."""

    family = "int8"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        memory = model.new_memory(len(past), 0, dtype=jnp.int8)
        return feed_past(model, memory, past, 0)


class BeaconInt8(Beacon):
    """Beacons in int8: as many slots as beacons of this ratio, which is asserted here
    because their bytes are fewer."""

    family = "beacon_int8"
    exact_bytes = False

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        memory = model.new_memory(len(past), self.number, dtype=jnp.int8)
        memory = feed_past(model, memory, past, self.number)
        slots = [budget_slots(model.config, len(row), self.number) for row in past]
        assert memory.slots.tolist() == slots
        return memory
