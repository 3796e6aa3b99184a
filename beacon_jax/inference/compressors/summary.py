"""Summaries: a kept token takes over something of the tokens dropped around it.

A dropped token goes to the kept one that is nearest to it, per layer and kv head. What
the kept one's key and value gain is a low-rank function of how far the means of these
tokens' keys and values are from its own, and of how many they are. It is zero before
training, so training starts at what the compressor keeps without it
(`inference.train_summary`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.piece import floats
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate

RANK = 64


class Summary(NamedTuple):
    """Weights of each layer and kv head: what is gained is features A B.

    They are float32 while they are trained, and bfloat16 in a compressor (`rounded`).

    Attributes:
      a: [L, K, 2 H + 1, R].
      b: [L, K, R, 2 H]: of the key (not rotated), then of the value.
    """

    a: Float[Any, "L K F R"]
    b: Float[Any, "L K R F2"]


class Slots(NamedTuple):
    """Kept tokens and what was dropped around them.

    Attributes:
      k, v: keys, not rotated but with the magnitude of rotated ones, and values.
      features: of the dropped tokens that are nearest to each: mean key less its own,
        mean value less its own, log(1 + how many); zeros where there are none.
    """

    k: Float[Array, "L B n K H"]
    v: Float[Array, "L B n K H"]
    features: Float[Array, "L B n K F"]


class Kept(NamedTuple):
    """Which tokens of a piece stay.

    Attributes:
      index: slots that stay in each row, rising; those from `start` on are the piece's.
      start, stop: the piece's first slot, and the one behind it.
      count: of the piece, how many stay.
    """

    index: Int[Array, "L B S K"]
    start: Int[Array, " B"]
    stop: Int[Array, " B"]
    count: Int[Array, " B"]


def shapes(config: ModelConfig, rank: int = RANK) -> Summary:
    """Returns the shapes of the weights."""
    layers, heads, size = config.num_layers, config.num_kv_heads, config.head_dim
    a = (layers, heads, 2 * size + 1, rank)
    return Summary(a, (layers, heads, rank, 2 * size))


def fresh(config: ModelConfig, seed: int = 0, rank: int = RANK) -> Summary:
    """Makes weights that add nothing: A is drawn, B is zero."""
    a, b = shapes(config, rank)
    drawn = np.random.default_rng(seed).standard_normal(a, np.float32)
    return Summary(drawn / np.sqrt(np.float32(a[2])), np.zeros(b, np.float32))


def rounded(summary: Summary) -> Summary:
    """Returns the weights in bfloat16, on the host."""
    return Summary(*(np.asarray(x).astype(ml_dtypes.bfloat16) for x in summary))


def gained(summary: Summary, slots: Slots) -> tuple[Array, Array]:
    """Adds to the keys and values of slots, of one layer or of all, what they gain."""
    a, b = (jnp.asarray(x, jnp.float32) for x in summary)
    low = jnp.einsum("...BnKF,...KFR->...BnKR", slots.features, a)
    more = jnp.einsum("...BnKR,...KRO->...BnKO", low, b)
    size = slots.k.shape[-1]
    return slots.k + more[..., :size], slots.v + more[..., size:]


@functools.partial(jax.jit, static_argnames=("net", "size"))
def slots_of(net: Net, state: MemoryState, kept: Kept, size: int) -> Slots:
    """Collects the kept tokens of a piece, and what was dropped around them.

    Args:
      state: the memory with the piece in it.
      size: at least `kept.count`; what stands beyond that has no meaning.
    """
    one = _collector(net, state, kept, size)
    return jax.lax.map(lambda layer: one(layer)[0], jnp.arange(net.config.num_layers))


@functools.partial(jax.jit, static_argnames=("net", "size"))
def summarised(
    net: Net,
    state: MemoryState,
    kept: Kept,
    size: int,
    summary: Summary,
    exact: Bool[Array, "L B S K"],
) -> tuple[Float[Array, "L B n K H"], Float[Array, "L B n K H"]]:
    """Returns the keys, not rotated, and values of kept tokens with what they gain.

    Args: those of `slots_of`, and
      exact: kept slots that gain nothing.
    """
    one = _collector(net, state, kept, size)

    def entries(x):
        layer, a, b = x
        slots, index = one(layer)
        still = jnp.take_along_axis(exact[layer], index, axis=1)[..., None]
        features = jnp.where(still, 0.0, slots.features)
        return gained(Summary(a, b), slots._replace(features=features))

    return jax.lax.map(entries, (jnp.arange(net.config.num_layers), *summary))


def _collector(net: Net, state: MemoryState, kept: Kept, size: int) -> Any:
    """Makes a function of a layer: (its Slots, the slots [B, n, K] that they were)."""
    index, start, stop, count = kept
    at = jnp.minimum(start[:, None] + jnp.arange(size), index.shape[2] - 1)
    place = jnp.arange(state.capacity)
    inside = (place >= start[:, None]) & (place < stop[:, None])
    cos, sin = cos_sin(net.config, -place, scaled=False)
    real = jnp.arange(size) < count[:, None]
    rows = jax.vmap(jax.vmap(_around, (1, 1, None, None), (1, 1)))

    def one(layer):
        mine = jnp.take_along_axis(index[layer], at[..., None], axis=1)
        keys = rotate(floats(net, state.k, layer), cos, sin)
        values = floats(net, state.v, layer)
        both = jnp.concatenate([keys, values], axis=-1)  # [B, S, K, 2 H]
        own, features = rows(both, mine, real, inside)
        k, v = jnp.split(own, 2, axis=-1)
        return Slots(k, v, features), mine

    return one


def _around(
    entries: Float[Array, "S H2"],
    index: Int[Array, " n"],
    real: Bool[Array, " n"],
    inside: Bool[Array, " S"],
) -> tuple[Float[Array, "n H2"], Float[Array, "n F"]]:
    """Returns the kept entries of a row and head, and features of the dropped ones."""
    size, place = len(index), jnp.arange(len(entries))
    middle = jnp.where(real[1:], (index[1:] + index[:-1]) / 2, jnp.inf)
    nearest = jnp.searchsorted(middle, place.astype(middle.dtype))
    dropped = inside & (place != index[nearest])
    group = jnp.where(dropped, nearest, size)
    total = lambda x: jax.ops.segment_sum(x, group, num_segments=size, mode="drop")
    number = total(jnp.ones(place.shape))[:, None]
    own = entries[index]
    away = jnp.where(number > 0, total(entries) / jnp.maximum(number, 1) - own, 0.0)
    return own, jnp.concatenate([away, jnp.log1p(number)], axis=-1)
