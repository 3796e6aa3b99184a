"""What the baselines share: the budget in slots, reading text as it is, and keeping
chosen slots of a memory."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.core.move import keep_entries
from beacon_jax.evaluation.methods import Method, budget_slots, feed_past
from beacon_jax.evaluation.model import Model, Rows
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.quantize import Quantized
from beacon_jax.model.rotary import cos_sin, rotate


class Budgeted(Method):
    """A method that keeps as many slots as beacons of its ratio would."""

    per_ratio = True

    def budget(self, model: Model, past: Rows) -> Int[np.ndarray, " B"]:
        """Slots that each row may keep: those of the beacons and their sinks, and no
        more than the row has tokens."""
        return np.asarray(
            [
                min(budget_slots(model.config, len(row), self.number), len(row))
                for row in past
            ],
            np.int32,
        )

    def most(self, model: Model) -> int:
        """The largest budget of a run: a static size, so that one compiled program
        serves all lengths."""
        return budget_slots(model.config, model.longest, self.number)


def read(model: Model, rows: Rows) -> MemoryState:
    """The memory of these tokens with full attention; nothing is left open."""
    memory = feed_past(model, model.new_memory(len(rows), 0), rows, 0)
    if not np.asarray(memory.raw).any():
        return memory
    everything = jnp.broadcast_to(jnp.arange(model.window), (len(rows), model.window))
    return keep_entries(model.config, memory, everything, memory.raw)


def floats(memory: MemoryState) -> tuple[Array, Array]:
    """Keys and values [L, B, S, K, H] of a memory that is not int8."""
    assert not isinstance(memory.k, Quantized) and not isinstance(memory.v, Quantized)
    return memory.k, memory.v


def as_index(rows: Sequence[Int[np.ndarray, " n"]], size: int) -> Int[Array, "1 B n 1"]:
    """Slots of each row for `keep`, the same in all layers and heads."""
    index = np.zeros((1, len(rows), size, 1), np.int32)
    for row, slots in enumerate(rows):
        index[0, row, : len(slots), 0] = slots
    return jnp.asarray(index)


@functools.partial(
    jax.jit, static_argnames=("config", "compact"), donate_argnames="memory"
)
def keep(
    config: ModelConfig,
    memory: MemoryState,
    index: Int[Array, "#L B n #K"],
    count: Int[Array, " B"],
    *,
    compact: bool,
) -> MemoryState:
    """Keeps chosen slots of each row and forgets the others.

    Args:
      memory: of floats, without open windows; it is taken over.
      index: the slots that go to 0, 1, ... of each layer and kv head, n at most S;
        those beyond `count` are ignored.
      count: slots kept.
      compact: keys are turned to their new slots: positions are those of a text without
        gaps. Otherwise all keys of a row are turned by the same distance, from the end
        of the past to the end of what is kept: what is fed next sees them as far away
        as they were, and gaps stay.
    """
    index = index[:, :, : memory.capacity]
    size = index.shape[2]
    to = jnp.arange(size)[:, None]
    distance = to - index if compact else (count - memory.slots)[None, :, None, None]
    distance = jnp.where(to < count[:, None, None], distance, 0)
    cos, sin = cos_sin(config, distance, scaled=False)
    take = lambda x: jnp.take_along_axis(x, index[..., None], axis=2)
    k, v = floats(memory)
    turned = rotate(take(k), cos[..., 0, :], sin[..., 0, :])
    return memory.replace(
        k=k.at[:, :, :size].set(turned),
        v=v.at[:, :, :size].set(take(v)),
        slots=count,
        sinks=jnp.minimum(memory.sinks, count),
    )
