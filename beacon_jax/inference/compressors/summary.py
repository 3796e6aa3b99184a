"""Summaries: a kept token takes over something of the tokens dropped around it.

A dropped token goes to the kept one that is nearest to it, per layer and kv head. What
the kept one's key and value gain is a low-rank function of how far the means of these
tokens' keys and values are from its own, of how many they are, and of what attention
matching made of it. It is zero before training, so training starts at what the
compressor makes without it (`inference.train_summary`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.attention_matching import Matched
from beacon_jax.inference.compressors.piece import Kept, floats
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate

RANK = 64


class Summary(NamedTuple):
    """Weights of each layer and kv head: what is gained is features A B.

    They are float32 while they are trained, and bfloat16 in a compressor (`rounded`).

    Attributes:
      a: [L, K, 3 H + 2, R].
      b: [L, K, R, 2 H]: of the key (not rotated), then of the value.
    """

    a: Float[Any, "L K F R"]
    b: Float[Any, "L K R F2"]


class Slots(NamedTuple):
    """Kept tokens, what attention matching made of them, and what was dropped around.

    Attributes:
      k: keys, not rotated but with the magnitude of rotated ones.
      v, bias: those that were made.
      features: of the dropped tokens that are nearest to each: mean key less its own,
        mean value less its own, log(1 + how many), zeros where there are none; how far
        the value that was made is from its own; the bias. Zeros where a slot is exact.
    """

    k: Float[Array, "L B n K H"]
    v: Float[Array, "L B n K H"]
    bias: Float[Array, "L B K n"]
    features: Float[Array, "L B n K F"]


def shapes(config: ModelConfig, rank: int = RANK) -> Summary:
    """Returns the shapes of the weights."""
    layers, heads, size = config.num_layers, config.num_kv_heads, config.head_dim
    a = (layers, heads, features(size), rank)
    return Summary(a, (layers, heads, rank, 2 * size))


def features(head_dim: int) -> int:
    """Counts the features of a slot."""
    return 3 * head_dim + 2


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


@functools.partial(jax.jit, static_argnames="net")
def slots_of(net: Net, state: MemoryState, kept: Kept, found: Matched) -> Slots:
    """Collects the kept tokens of a piece, and what was dropped around them.

    Args:
      state: the memory with the piece in it.
      found: what attention matching made of the kept tokens.
    """
    layers = jnp.arange(net.config.num_layers)
    return jax.lax.map(
        lambda x: _of_layer(net, state, kept, *x), (layers, found.v, found.bias)
    )


@functools.partial(jax.jit, static_argnames="net")
def summarised(
    net: Net, state: MemoryState, kept: Kept, found: Matched, summary: Summary
) -> tuple[Float[Array, "L B n K H"], Float[Array, "L B n K H"]]:
    """Returns the keys, not rotated, and values of kept tokens with what they gain.

    Args: those of `slots_of`.
    """

    def entries(x):
        layer, v, bias, a, b = x
        return gained(Summary(a, b), _of_layer(net, state, kept, layer, v, bias))

    layers = jnp.arange(net.config.num_layers)
    return jax.lax.map(entries, (layers, found.v, found.bias, *summary))


def _of_layer(net: Net, state: MemoryState, kept: Kept, layer: Any, v: Any, bias: Any):
    """Returns the `Slots` of one layer; `v` and `bias` are of the kept tokens."""
    size, place = v.shape[1], jnp.arange(state.capacity)
    cos, sin = cos_sin(net.config, -place, scaled=False)
    keys = rotate(floats(net, state.k, layer), cos, sin)
    both = jnp.concatenate([keys, floats(net, state.v, layer)], axis=-1)
    index = jnp.take_along_axis(kept.index[layer], kept.places(size)[..., None], axis=1)
    real = jnp.arange(size) < kept.count[:, None]
    rows = jax.vmap(jax.vmap(_around, (1, 1, None, None), (1, 1)))
    own, around = rows(both, index, real, kept.inside())
    k, own = jnp.split(own, 2, axis=-1)
    found = jnp.concatenate(
        [around, v - own, jnp.swapaxes(bias, 1, 2)[..., None]], axis=-1
    )
    exact = jnp.swapaxes(kept.exact[layer], 1, 2)  # [B, S, K]
    still = jnp.take_along_axis(exact, index, axis=1)[..., None]
    return Slots(k, v, bias, jnp.where(still, 0.0, found))


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
