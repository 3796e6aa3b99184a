"""Mean-pooled keys and values: the compression that needs no training and no choice."""

import functools

import jax
import jax.numpy as jnp

from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation.baselines.select import Budgeted, floats, of_slots, read
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.rotary import cos_sin, rotate


class MeanPool(Budgeted):
    """Means of every `ratio` consecutive tokens: of un-rotated keys, and of values.

    They are computed with full attention, and stand at compact positions.

    Sinks, if beacons have them, are the first tokens as they are, in front.
    """

    family = "mean_pool"

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        count = jnp.asarray(self.budget(model, past))
        memory = read(model, past, self.longest, self.prefill)
        state = pooled(model.config, memory.state, self.number, count)
        return of_slots(memory, state)


@functools.partial(
    jax.jit, static_argnames=("config", "ratio"), donate_argnames="memory"
)
def pooled(
    config: ModelConfig, memory: MemoryState, ratio: int, count: jax.Array
) -> MemoryState:
    """Makes a memory of means: [sinks | means of `ratio` slots each].

    Args:
      memory: of floats; it is taken over.
      count: slots of each row in all, [B].
    """
    sink = Law.of(config).sink
    groups = (memory.capacity - sink) // ratio

    def mean(x):  # [L, B, S, K, H] -> [L, B, groups, K, H]
        x = x[:, :, : groups * ratio].astype(jnp.float32)
        return x.reshape(*x.shape[:2], groups, ratio, *x.shape[3:]).mean(3)

    def put(buffer, means):
        at = (slice(None), slice(None), slice(sink, sink + groups))
        return buffer.at[at].set(means.astype(buffer.dtype))

    # The magnitude of yarn stays in the keys, hence scaled=False both times.
    back = cos_sin(config, -jnp.arange(memory.capacity), scaled=False)
    again = cos_sin(config, sink + jnp.arange(groups), scaled=False)
    k, v = floats(memory)
    means = mean(rotate(k.astype(jnp.float32), *back))
    return memory.replace(
        k=put(k, rotate(means, *again)),
        v=put(v, mean(v)),
        slots=count,
        sinks=jnp.minimum(memory.sinks, count),
    )
