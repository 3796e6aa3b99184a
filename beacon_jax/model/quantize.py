"""Keys or values of a memory in int8.

An entry of a slot and kv head is values * scale, symmetric, scale = max |x| / 127: half
of the largest |x| / 127 is what an element can be off by. Keys lose a mean first, fixed
once a row has slots: outliers in a fixed channel of un-rotated keys (Qwen2's key
biases) would otherwise set the scale for all channels. Memory holds rotated keys, and
rotations are linear: R_p k - R_p mean = R_p (k - mean). What is stored (the residual)
moves to another slot by a rotation of the distance, like a key, and attention adds the
mean to scores (`attention.mean`), never to keys.

What it does not help is a channel that is wide without a bias: three of 100 times the
usual deviation cost a total variation of the attention of 0.21 (largest of 64 queries
over 400 keys, H = 64). A factor per channel would (0.005), but no model here needs one.
"""

import functools
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8

from beacon_jax.attention.mean import cos_sin_table, turns
from beacon_jax.model.rotary import rotate
from beacon_jax.model.scatter import write_rows

LARGEST = 127


@no_type_check  # a pytree: it also holds shapes, shardings or arrays of numpy
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
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        """The dtype of entries as they are written and read back."""
        return jnp.dtype(jnp.float32)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self))


def empty(
    shape: tuple[int, int, int, int, int],
    mean: Float[Array, "L B K H"] | None = None,
) -> Quantized:
    """Makes a buffer [L, B, S, K, H] without entries."""
    layers, rows, slots, heads, _ = shape
    scale = jnp.zeros((layers, rows, heads, slots), jnp.float32)
    return Quantized(jnp.zeros(shape, jnp.int8), scale, mean)


def channel_mean(
    keys: Float[Array, "*L B T K H"], valid: Bool[Array, "B T"]
) -> Float[Array, "*L B K H"]:
    """Computes the mean of each row's valid keys; 0 for rows without any.

    Args:
      keys: NOT rotated, but times the rotary magnitude (`RopeConfig.attention_scale`).
    """
    some = valid[..., None, None]
    total = jnp.where(some, keys, 0).astype(jnp.float32).sum(-3)
    return total / jnp.maximum(valid.sum(-1), 1)[:, None, None]


def quantize(
    x: Float[Array, "*B T K H"],
) -> tuple[Int8[Array, "*B T K H"], Float[Array, "*B K T"]]:
    """Returns (values, scale). Zeros have the smallest scale there is, not 0."""
    x = x.astype(jnp.float32)
    least = float(jnp.finfo(jnp.float32).tiny)
    scale = jnp.maximum(jnp.abs(x).max(-1) / LARGEST, least)
    values = jnp.clip(jnp.round(x / scale[..., None]), -LARGEST, LARGEST)
    return values.astype(jnp.int8), jnp.swapaxes(scale, -1, -2)


def rotated_mean(
    mean: Float[Array, "*L B K H"],
    positions: Int[Array, "#B T"],
    frequencies: Float[np.ndarray, " H2"],
) -> Float[Array, "*L B T K H"]:
    """Rotates the mean as keys at these positions would have it, float32.

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
    frequencies: Float[np.ndarray, " H2"] | None = None,
    dtype: Any = jnp.float32,
) -> Float[Array, "*L B S K H"]:
    """Returns the entries of one layer [B, S, K, H], or of all.

    Slots that nothing was written to are exactly 0, with or without a mean.

    Raises:
      ValueError: a buffer with a mean, and no frequencies.
    """
    buffer = _of_layer(buffer, layer)
    x = residual(buffer)
    if buffer.mean is not None:
        slots = jnp.arange(x.shape[-3])[None]
        mean = rotated_mean(buffer.mean, slots, _needed(frequencies))
        written = jnp.swapaxes(buffer.scale > 0, -1, -2)[..., None]
        x = jnp.where(written, x + mean, 0)
    return x.astype(dtype)


def write(
    buffer: Quantized,
    new: Float[Array, "*L B T K H"],
    start: Int[Array, " B"],
    layer: Int[Array, ""] | int | None = None,
    live: Bool[Array, " B"] | None = None,
    *,
    frequencies: Float[np.ndarray, " H2"] | None = None,
) -> Quantized:
    """Writes entries to the slots start[row] ... of one layer, or of all.

    The caller guarantees start + T <= S.

    Args:
      new: [B, T, K, H] for one layer, else [L, B, T, K, H]; keys rotated at their slot.
      live: rows that are written; the others stay as they are. None: all.

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
    """Writes entries whose mean is out already (`residual`)."""
    values, scale = quantize(new)
    put = functools.partial(write_rows, start=start, layer=layer, live=live)
    put_scale = functools.partial(put, slots=1)
    if layer is None:
        put, put_scale = jax.vmap(put), jax.vmap(put_scale)
    return buffer.replace(
        values=put(buffer.values, values), scale=put_scale(buffer.scale, scale)
    )


def take(buffer: Quantized, slots: Int[Array, "B n"]) -> Quantized:
    """Takes these slots of every row, as a buffer of n slots."""
    return buffer.replace(
        values=jnp.take_along_axis(buffer.values, slots[None, :, :, None, None], 2),
        scale=jnp.take_along_axis(buffer.scale, slots[None, :, None], 3),
    )


def residual(buffer: Quantized) -> Float[Array, "*L B S K H"]:
    """Returns the entries without their mean, float32.

    They can be rotated by the distance they move and be given to `write_residual` or
    `quantize`.
    """
    return buffer.values * jnp.swapaxes(buffer.scale, -1, -2)[..., None]


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
