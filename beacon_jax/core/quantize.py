"""Keys or values of a memory in int8.

An entry of a slot and kv head is values * scale, symmetric, scale = max |x| / 127: half
of the largest |x| / 127 is what an element can be off by. Keys lose a mean first, fixed
for the life of the memory: outliers in a fixed channel of un-rotated keys (Qwen2's key
biases) would otherwise set the scale for all channels. Memory holds rotated keys, and
rotations are linear: R_p k - R_p mean = R_p (k - mean). What is stored (the residual)
moves to another slot by a rotation of the distance, like a key, and attention adds the
mean to scores (`attention.mean`), never to keys.
"""

import functools
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


class Quantized(flax.struct.PyTreeNode):
    """One buffer of a memory, keys or values.

    Attributes:
      values: [L, B, S, K, H].
      scale: of a slot and kv head; 0 where nothing was written.
      mean: un-rotated, times rotary magnitudes like yarn's; None: nothing was taken out
        (values, or models whose keys need none).
    """

    values: Int8[Array, "L B S K H"]
    scale: Float[Array, "L B K S"]
    mean: Float[Array, "L B K H"] | None = None

    @property
    def nbytes(self) -> int:
        mean = 0 if self.mean is None else self.mean.nbytes
        return self.values.nbytes + self.scale.nbytes + mean


def empty(
    shape: tuple[int, int, int, int, int], mean: Float[Array, "L B K H"] | None = None
) -> Quantized:
    """A buffer [L, B, S, K, H] without entries."""
    layers, rows, slots, heads, _ = shape
    scale = jnp.zeros((layers, rows, heads, slots), jnp.float32)
    return Quantized(jnp.zeros(shape, jnp.int8), scale, mean)


def channel_mean(
    keys: Float[Array, "*L B T K H"], valid: Bool[Array, "B T"]
) -> Float[Array, "*L B K H"]:
    """Mean over a row's valid keys, NOT rotated but times the rotary magnitude
    (`RopeConfig.attention_scale`); 0 for rows without any."""
    some = valid[..., None, None]
    total = jnp.where(some, keys, 0).astype(jnp.float32).sum(-3)
    return total / jnp.maximum(valid.sum(-1), 1)[:, None, None]


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
    if layer is not None:
        one = functools.partial(jax.lax.dynamic_index_in_dim, index=layer)
        buffer = jax.tree.map(lambda x: one(x, keepdims=False), buffer)
    scale = jnp.swapaxes(buffer.scale, -1, -2)[..., None]
    x = buffer.values * scale
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
    mean = buffer.mean
    if layer is not None:
        mean = jax.lax.dynamic_index_in_dim(mean, layer, keepdims=False)
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
    values, scale = quantize(new)
    rows = lambda put, to, x: put(to, x, start, layer, live)
    if layer is None:
        rows = lambda put, to, x: jax.vmap(lambda to, x: put(to, x, start, None, live))(
            to, x
        )
    return buffer.replace(
        values=rows(write_rows, buffer.values, values),
        scale=rows(_write_scales, buffer.scale, scale),
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
    return values * jnp.swapaxes(scale, -1, -2)[..., None]


def _needed(frequencies):
    if frequencies is None:
        raise ValueError(
            "frequencies=None: keys whose mean is out need those of their rotation "
            "(model.rotary.inverse_frequencies)."
        )
    return frequencies
