"""StreamingLLM (Xiao et al. 2024): attention sinks and the most recent tokens.

The real thing, not its last state: windows are read one after the other, and what was
evicted after one is not there for the next. Positions are those in the cache.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation.baselines.select import Budgeted, as_index, keep
from beacon_jax.evaluation.methods import feed_past
from beacon_jax.evaluation.model import Model, Rows

SINKS = 4


def kept_slots(slots: int, budget: int) -> Int[np.ndarray, " n"]:
    """Picks the first 4 of a cache's `slots` and the last, `budget` in all.

    Of a budget below 8 the sinks take half (rounded down).
    """
    if slots <= budget:
        return np.arange(slots)
    sinks = min(SINKS, budget // 2)
    return np.concatenate([np.arange(sinks), np.arange(slots - budget + sinks, slots)])


class Streaming(Budgeted):
    """4 sinks and the last k - 4 tokens, k being what beacons keep of the whole past:
    the cache has this size from the first window on, as published."""

    family = "streaming"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        w, budget = model.window, self.budget(model, past)
        memory = model.new_memory(len(past), 0)
        for start in range(0, max(map(len, past)), w):
            pieces = [row[start : start + w] for row in past]
            memory = feed_past(model, memory, pieces, 0)
            slots = np.asarray(memory.slots).tolist()
            kept = list(map(kept_slots, slots, budget.tolist()))
            count = jnp.asarray([len(x) for x in kept], jnp.int32)
            index = as_index(kept, self.most(model))
            memory = keep(model.config, memory, index, count, compact=True)
        return memory
