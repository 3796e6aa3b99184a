"""Memories of int8 keys and values (`model.quantize`), with and without beacons.

Their bytes are those of int8 slots (a byte per element and a float32 scale per slot and
head), whatever other methods of the same ratio keep; tables show them.
"""

import jax.numpy as jnp

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation.methods import Beacon, Method, Model, Rows


class Int8(Method):
    """The whole past, uncompressed, in int8."""

    family = "int8"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        memory = model.new_memory(len(past), 0, dtype=jnp.int8)
        return model.feed(memory, past, 0)[1]


class BeaconInt8(Beacon):
    """Beacons in int8: as many slots as beacons of this ratio, of fewer bytes."""

    family = "beacon_int8"
    exact_bytes = False

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        memory = model.new_memory(len(past), self.live_ratio, dtype=jnp.int8)
        return model.feed(memory, past, self.live_ratio)[1]
