"""Keys or values of a memory in int8.

An entry of a slot and kv head is values * scale, symmetric, scale = max |x| / 127: half
of the largest |x| / 127 is what an element can be off by. Keys lose a mean first, fixed
for the life of the memory: outliers in a fixed channel of un-rotated keys (Qwen2's key
biases) would otherwise set the scale for all channels. Memory holds rotated keys, and
rotations are linear: R_p k - R_p mean = R_p (k - mean). What is stored (the residual)
moves to another slot by a rotation of the distance, like a key, and attention adds the
mean to scores (`attention.mean`), never to keys.

Channels that are large without a bias lose a factor instead, the same for both of a
rotated pair, so that it commutes with rotations: q . k = (q * spread) . (k / spread).
Powers of two are exact in bfloat16. Three channels of 100 times the usual deviation,
with queries that make up for it: total variation of the attention 0.21 with the mean
alone, 0.005 with both (largest of 64 queries over 400 keys, H = 64).
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from beacon_jax.attention.mean import cos_sin_table, turns
from beacon_jax.model.decoder import write_rows
from beacon_jax.model.rotary import rotate

LARGEST = 127
MOST_DOUBLINGS = 10  # of a spread, which float16 queries survive


class Quantized(flax.struct.PyTreeNode):
    """One buffer of a memory, keys or values.

    Attributes:
      values: [L, B, S, K, H].
      scale: of a slot and kv head; 0 where nothing was written.
      mean: un-rotated, times rotary magnitudes like yarn's; None: nothing was taken out
        (values, or models whose keys need none).
      spread: of channels, powers of two, equal in both of a pair; None: 1.
    """

    values: Int8[Array, "L B S K H"]
    scale: Float[Array, "L B K S"]
    mean: Float[Array, "L B K H"] | None = None
    spread: Float[Array, "L B K H"] | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self))


def empty(
    shape: tuple[int, int, int, int, int],
    mean: Float[Array, "L B K H"] | None = None,
    spread: Float[Array, "L B K H"] | None = None,
) -> Quantized:
    """A buffer [L, B, S, K, H] without entries."""
    layers, rows, slots, heads, _ = shape
    scale = jnp.zeros((layers, rows, heads, slots), jnp.float32)
    return Quantized(jnp.zeros(shape, jnp.int8), scale, mean, spread)


def channel_mean(
    keys: Float[Array, "*L B T K H"], valid: Bool[Array, "B T"]
) -> Float[Array, "*L B K H"]:
    """Mean over a row's valid keys, NOT rotated but times the rotary magnitude
    (`RopeConfig.attention_scale`); 0 for rows without any."""
    some = valid[..., None, None]
    total = jnp.where(some, keys, 0).astype(jnp.float32).sum(-3)
    return total / jnp.maximum(valid.sum(-1), 1)[:, None, None]


def pair_spread(
    keys: Float[Array, "*L B T K H"], valid: Bool[Array, "B T"]
) -> Float[Array, "*L B K H"]:
    """Deviations of a row's valid un-rotated keys from their mean, the larger of each
    pair, in units of the head's median, rounded to powers of two; 1 where there are
    none."""
    mean = channel_mean(keys, valid)[..., None, :, :]
    deviation = jnp.sqrt(channel_mean(jnp.square(keys - mean), valid))
    pair = jnp.maximum(*jnp.split(deviation, 2, -1))
    middle = jnp.median(pair, -1, keepdims=True)
    some = (pair > 0) & (middle > 0)
    ratio = jnp.where(some, pair / jnp.where(some, middle, 1), 1)
    spread = jnp.exp2(
        jnp.clip(jnp.round(jnp.log2(ratio)), -MOST_DOUBLINGS, MOST_DOUBLINGS)
    )
    return jnp.concatenate([spread, spread], -1)


def for_attention(q: Float[Array, "B T N H"], k: Quantized, v: Quantized, layer):
    """(q, keyword arguments) for `attention.prefix_attention` over these buffers."""
    options = {"k_scale": k.scale, "v_scale": v.scale, "layer": layer}
    mean = k.mean
    if k.spread is not None:
        spread = _of_layer(k.spread, layer)
        heads = jnp.repeat(spread, q.shape[2] // spread.shape[1], axis=1)
        q = q * heads[:, None].astype(q.dtype)
        mean = None if mean is None else mean / k.spread
    if mean is not None:
        options["k_mean"] = mean
    return q, options


def quantize(
    x: Float[Array, "*B T K H"],
) -> tuple[Int8[Array, "*B T K H"], Float[Array, "*B K T"]]:
    """(values, scale). Zeros have the smallest scale there is, which is not 0."""
    x = x.astype(jnp.float32)
    least = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.maximum(jnp.abs(x).max(-1) / LARGEST, least)
    values = jnp.clip(jnp.round(x / scale[..., None]), -LARGEST, LARGEST)
    return values.astype(jnp.int8), jnp.swapaxes(scale, -1, -2)


def rotated_mean(
    mean: Float[Array, "*L B K H"],
    positions: Int[Array, "B T"],
    frequencies: Float[np.ndarray, " H/2"],
) -> Float[Array, "*L B T K H"]:
    """The mean as keys at these positions would have it, float32.

    Angles are those that attention adds the mean with, not those of `rotary.cos_sin`:
    these are off by up to 0.004 at position 131,072, which a mean of 100 would show.
    """
    table = cos_sin_table(jnp.asarray(turns(frequencies)), positions)[..., None, :]
    cos, sin = jnp.split(table, 2, -1)
    return rotate(mean.astype(jnp.float32)[..., None, :, :], cos, sin)


def dequantize(
    buffer: Quantized,
    layer: Int[Array, ""] | int | None = None,
    *,
    frequencies: Float[np.ndarray, " H/2"] | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "*L B S K H"]:
    """Entries of one layer [B, S, K, H], or of all. Slots that nothing was written to
    are exactly 0, with or without a mean.

    Raises:
      ValueError: a buffer with a mean, and no frequencies.
    """
    buffer = _of_layer(buffer, layer)
    scale = jnp.swapaxes(buffer.scale, -1, -2)[..., None]
    x = buffer.values * scale
    if buffer.spread is not None:
        x = x * buffer.spread[..., None, :, :]
    if buffer.mean is not None:
        slots = jnp.arange(x.shape[-3])[None]
        mean = rotated_mean(buffer.mean, slots, _needed(frequencies))
        x = jnp.where(scale > 0, x + mean, 0)
    return x.astype(dtype)


def write(
    buffer: Quantized,
    new: Float[Array, "*L B T K H"],
    start: Int[Array, " B"],
    layer: Int[Array, ""] | int | None = None,
    live: Bool[Array, " B"] | None = None,
    *,
    frequencies: Float[np.ndarray, " H/2"] | None = None,
) -> Quantized:
    """Writes entries, keys rotated at start[row] + i, to slots start[row] ... of one
    layer (new [B, T, K, H]) or of all (new [L, B, T, K, H]); rows that are not live
    stay as they are. The caller guarantees start + T <= S.

    Raises:
      ValueError: a buffer with a mean, and no frequencies.
    """
    if buffer.mean is None:
        return write_residual(buffer, new, start, layer, live)
    mean = _of_layer(buffer.mean, layer)
    slots = start[:, None] + jnp.arange(new.shape[-3])
    new = new - rotated_mean(mean, slots, _needed(frequencies))
    return write_residual(buffer, new, start, layer, live)


def write_residual(
    buffer: Quantized,
    new: Float[Array, "*L B T K H"],
    start: Int[Array, " B"],
    layer: Int[Array, ""] | int | None = None,
    live: Bool[Array, " B"] | None = None,
) -> Quantized:
    """`write` of entries whose mean is out already (`residual`)."""
    spread = _of_layer(buffer.spread, layer)
    if spread is not None:
        new = new / spread[..., None, :, :]
    values, scale = quantize(new)

    def put(write, to, x):
        one = lambda to, x: write(to, x, start, layer, live)
        return (one if layer is not None else jax.vmap(one))(to, x)

    return buffer.replace(
        values=put(write_rows, buffer.values, values),
        scale=put(_write_scales, buffer.scale, scale),
    )


def _write_scales(buffer, new, start, layer, live):
    """`decoder.write_rows` where slots come last: new [B, K, T]."""
    stacked = layer is not None

    def put(row, x, at, keep):
        where: Any = (layer, 0, at) if stacked else (0, at)
        x = x[None] if stacked else x
        if live is not None:
            x = jnp.where(keep, x, jax.lax.dynamic_slice(row, where, x.shape))
        return jax.lax.dynamic_update_slice(row, x, where)

    axis = 1 if stacked else 0
    mapped = None if live is None else 0
    return jax.vmap(put, in_axes=(axis, 0, 0, mapped), out_axes=axis)(
        buffer, new, start, live
    )


def residual(buffer: Quantized, slots: Int[Array, "B T"]) -> Float[Array, "L B T K H"]:
    """Entries of these slots without their mean, float32: to be rotated by the distance
    they move and given to `write_residual`."""
    at = slots[None, :, :, None, None]
    scale = jnp.take_along_axis(buffer.scale, slots[None, :, None], -1)
    values = jnp.take_along_axis(buffer.values, at, 2)
    x = values * jnp.swapaxes(scale, -1, -2)[..., None]
    return x if buffer.spread is None else x * buffer.spread[..., None, :, :]


def _of_layer(tree, layer):
    if layer is None:
        return tree
    one = lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
    return jax.tree.map(one, tree)


def _needed(frequencies):
    if frequencies is None:
        raise ValueError(
            "frequencies=None: keys whose mean is out need those of their rotation "
            "(model.rotary.inverse_frequencies)."
        )
    return frequencies
