"""Reads and writes the buffers of a memory [L, B, S, K, H], arrays or int8.

Whether a memory is int8 is asked here and nowhere else. Keys in a buffer are rotated at
their slot; `frequencies` are those of that rotation (`rotary.inverse_frequencies`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from beacon_jax.model.partition import Partition
from beacon_jax.model.quantize import (
    Quantized,
    channel_mean,
    dequantize,
    quantize,
    residual,
    rotated_mean,
    write,
)
from beacon_jax.model.quantize import empty as empty_int8
from beacon_jax.model.quantize import take as take_int8
from beacon_jax.model.rotary import rotate
from beacon_jax.model.scatter import write_rows

Buffer = Array | Quantized
Layer = Int[Array, ""] | int | None

# Logical axes of an array, and of the parts of an int8 buffer.
ARRAY = (None, "batch", "slots", "kv_heads", None)
PARTS: dict[str, tuple[str | None, ...]] = {
    "values": ARRAY,
    "scale": (None, "batch", "kv_heads", "slots"),
    "mean": (None, "batch", "kv_heads", None),
}


def empty(shape: tuple[int, int, int, int, int], dtype: Any) -> tuple[Buffer, Buffer]:
    """Makes keys and values [L, B, S, K, H] without entries."""
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    layers, rows, _, heads, width = shape
    mean = jnp.zeros((layers, rows, heads, width), jnp.float32)
    return empty_int8(shape, mean), empty_int8(shape)


def slot_nbytes(buffer: Buffer) -> int:
    """Counts the bytes of one slot of one row, all layers."""
    _, rows, slots, *_ = buffer.shape
    parts = [buffer]
    if isinstance(buffer, Quantized):
        parts = [buffer.values, buffer.scale]
    nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in parts)
    return nbytes // (rows * slots)


def resized(buffer: Buffer, slots: int) -> Buffer:
    """Returns the buffer with empty slots behind, `slots` in all."""
    more = (0, slots - buffer.shape[2])
    if isinstance(buffer, Quantized):
        return buffer.replace(
            values=resized(buffer.values, slots),
            scale=jnp.pad(buffer.scale, ((0, 0), (0, 0), (0, 0), more)),
        )
    return jnp.pad(buffer, ((0, 0), (0, 0), more, (0, 0), (0, 0)))


def trimmed(buffer: Buffer, slots: int) -> Buffer:
    """Returns the first `slots` of the buffer."""
    if isinstance(buffer, Quantized):
        return buffer.replace(
            values=trimmed(buffer.values, slots), scale=buffer.scale[..., :slots]
        )
    return jax.lax.slice_in_dim(buffer, 0, slots, axis=2)


def specs(buffer: Any, partition: Partition) -> Any:
    """Returns how a buffer is split over devices; of an array also one layer."""
    if isinstance(buffer, Quantized):
        places = {
            name: partition.spec(axes, part.shape)
            for name, axes in PARTS.items()
            if (part := getattr(buffer, name)) is not None
        }
        return buffer.replace(**places)
    return partition.spec(ARRAY[-buffer.ndim :], buffer.shape)


# --- what a window or a decoded token does to one layer --------------------------


def centred(
    buffer: Buffer,
    keys: Float[Array, "B T K H"],
    layer: Layer,
    rows: Bool[Array, " B"],
    entries: Bool[Array, "B T"],
) -> Buffer:
    """Sets the mean that int8 keys of some rows are stored without from now on.

    It is that of their first window, which is about to be written.

    Args:
      keys: of the window, not rotated, times the rotary magnitude.
      rows: those whose first window it is.
      entries: those that count in the mean.
    """
    if not isinstance(buffer, Quantized) or buffer.mean is None:
        return buffer
    old = jax.lax.dynamic_index_in_dim(buffer.mean, layer, keepdims=False)
    mean = jnp.where(rows[:, None, None], channel_mean(keys, entries), old)
    return buffer.replace(mean=buffer.mean.at[layer].set(mean))


def put(
    buffer: Buffer,
    new: Float[Array, "B T K H"],
    start: Int[Array, " B"],
    layer: Layer,
    live: Bool[Array, " B"] | None,
    frequencies: Float[np.ndarray, " H2"],
) -> Buffer:
    """Writes entries, keys rotated, at start[row] of a layer.

    Rows that are not live stay as they are. An array may also be that of one layer,
    [B, S, K, H], with layer=None.
    """
    if isinstance(buffer, Quantized):
        return write(buffer, new, start, layer, live, frequencies=frequencies)
    return write_rows(buffer, new.astype(buffer.dtype), start, layer, live)


def read(
    buffer: Buffer,
    new: Float[Array, "B T K H"],
    start: Int[Array, " B"],
    layer: Layer,
    frequencies: Float[np.ndarray, " H2"],
) -> tuple[Buffer, Layer]:
    """Returns what a window attends to, and which layer of it.

    Of an int8 buffer that is one layer as floats [B, S, K, H], with the window's own
    entries as they were before rounding. So a window costs one layer of floats for a
    while, its tokens are read exactly, and its beacons, which are made of them, are
    rounded once.
    """
    if not isinstance(buffer, Quantized):
        return buffer, layer
    floats = dequantize(buffer, layer, frequencies=frequencies, dtype=new.dtype)
    return write_rows(floats, new, start), None


def for_attention(
    k: Buffer, v: Buffer, frequencies: Float[np.ndarray, " H2"]
) -> tuple[Array, Array, dict[str, Any]]:
    """Returns k, v and options for `attention.prefix_attention`."""
    if not (isinstance(k, Quantized) and isinstance(v, Quantized)):
        return k, v, {}  # pyright: ignore[reportReturnType]
    options = {"k_scale": k.scale, "v_scale": v.scale}
    if k.mean is not None:
        options |= {"k_mean": k.mean, "frequencies": frequencies}
    return k.values, v.values, options


# --- all layers: what enters the memory, and what moves in it -------------------


def put_all_layers(
    buffer: Any,
    new: Shaped[Array, "L B T K H"],
    start: Int[Array, " B"],
    live: Bool[Array, " B"] | None = None,
    frequencies: Float[np.ndarray, " H2"] | None = None,
) -> Any:
    """Writes new at start[row]; rows that are not live stay as they are."""
    if isinstance(buffer, Quantized):
        return write(buffer, new, start, None, live, frequencies=frequencies)
    one = lambda buffer, new: write_rows(buffer, new, start, None, live)
    return jax.vmap(one)(buffer, new)


def take(buffer: Buffer, slots: Int[Array, "B n"]) -> Buffer:
    """Takes these slots of each row, as a buffer of n."""
    if isinstance(buffer, Quantized):
        return take_int8(buffer, slots)
    return jnp.take_along_axis(buffer, slots[None, :, :, None, None], axis=2)


def turned(keys: Buffer, cos: Any, sin: Any, shift: Any = None) -> Buffer:
    """Rotates keys that move to other slots.

    Args:
      cos, sin: of the distance, [B, n, 1, H/2].
      shift: `mean_change` where they move to another buffer.
    """
    if not isinstance(keys, Quantized):
        return rotate(keys, cos, sin)
    moved = rotate(residual(keys), cos, sin)
    values, scale = quantize(moved if shift is None else moved + shift)
    return keys.replace(values=values, scale=scale)


def mean_change(
    source: Buffer,
    to: Buffer,
    slots: Int[Array, "B n"],
    frequencies: Float[np.ndarray, " H2"],
) -> Any:
    """Returns what int8 keys need added that move to these slots of another buffer.

    The buffers are stored without different means: it is [L, B, n, K, H], of the
    difference. None: nothing need be added.
    """
    if not (isinstance(source, Quantized) and isinstance(to, Quantized)):
        return None
    if source.mean is None or to.mean is None:
        return None
    return rotated_mean(source.mean - to.mean, slots, frequencies)


def adopted(buffer: Buffer, other: Buffer, rows: Bool[Array, " B"]) -> Buffer:
    """Takes over the mean of another buffer in some rows, which are empty."""
    if not (isinstance(buffer, Quantized) and isinstance(other, Quantized)):
        return buffer
    if buffer.mean is None or other.mean is None:
        return buffer
    mean = jnp.where(rows[None, :, None, None], other.mean, buffer.mean)
    return buffer.replace(mean=mean)


def choose(which: Bool[Array, "B n"], a: Buffer, b: Buffer) -> Buffer:
    """Chooses slots of a where `which`, else of b, in b's dtype and with b's mean."""
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        return b.replace(
            values=choose(which, a.values, b.values),
            scale=jnp.where(which[None, :, None], a.scale, b.scale),
        )
    return jnp.where(which[None, :, :, None, None], a.astype(b.dtype), b)  # pyright: ignore


def copy_in(buffer: Buffer, new: Buffer, start: Int[Array, " B"]) -> Buffer:
    """Writes all slots of `new` at start[row], bit by bit."""
    if isinstance(buffer, Quantized) and isinstance(new, Quantized):
        put_scale = functools.partial(write_rows, start=start, slots=1)
        return buffer.replace(
            values=put_all_layers(buffer.values, new.values, start),
            scale=jax.vmap(put_scale)(buffer.scale, new.scale),
        )
    return put_all_layers(buffer, new, start)  # pyright: ignore[reportArgumentType]
