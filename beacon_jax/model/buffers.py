"""Reads and writes the buffers of a memory [L, B, S, K, H], arrays or int8.

Keys may have a bias per slot besides. Whether a memory is int8 or has biases is asked
here and nowhere else. Keys in a buffer are rotated at their slot; `frequencies` are
those of that rotation (`rotary.inverse_frequencies`).
"""

import functools
import math
from typing import Any, no_type_check

import flax.struct
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


@no_type_check  # a pytree: it also holds shapes, shardings or arrays of numpy
class Biased(flax.struct.PyTreeNode):
    """Keys, and what is added to the score of each slot.

    A slot that stands for several tokens gets as much attention as they had together:
    the log of how often it counts. What is written later has a bias of 0.

    Attributes:
      entries: the keys, an array or int8.
      bias: of a slot and kv head, added to scores that are scaled already.
    """

    entries: Any
    bias: Float[Array, "*L B K S"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entries.shape

    @property
    def dtype(self) -> Any:
        """The dtype of keys as they are written and read back."""
        return self.entries.dtype

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes + self.bias.nbytes


Buffer = Array | Quantized | Biased
Layer = Int[Array, ""] | int | None

# Logical axes of an array, and of the parts of an int8 or biased buffer.
ARRAY = ("layers", "batch", "slots", "kv_heads", None)
PARTS: dict[str, tuple[str | None, ...]] = {
    "entries": ARRAY,
    "values": ARRAY,
    "scale": ("layers", "batch", "kv_heads", "slots"),
    "bias": ("layers", "batch", "kv_heads", "slots"),
    "mean": ("layers", "batch", "kv_heads", None),
}


def empty(shape: tuple[int, int, int, int, int], dtype: Any) -> tuple[Buffer, Buffer]:
    """Makes keys and values [L, B, S, K, H] without entries."""
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    layers, rows, _, heads, width = shape
    mean = jnp.zeros((layers, rows, heads, width), jnp.float32)
    return empty_int8(shape, mean), empty_int8(shape)


def biased(buffer: Buffer) -> Biased:
    """Returns the buffer with a bias per slot: 0, if it has none."""
    if isinstance(buffer, Biased):
        return buffer
    layers, rows, slots, heads, _ = buffer.shape
    return Biased(buffer, jnp.zeros((layers, rows, heads, slots), jnp.float32))


def alike(*found: Buffer) -> list[Buffer]:
    """Returns the buffers with biases, if one of them has any."""
    some = any(isinstance(x, Biased) for x in found)
    return [biased(x) for x in found] if some else list(found)


def entries_of(buffer: Any) -> Any:
    """Returns the buffer, on a device or the host, without its biases."""
    return buffer.entries if isinstance(buffer, Biased) else buffer


def dtype_name(buffer: Any) -> str:
    """Names the dtype that entries of a buffer are stored in."""
    entries = entries_of(buffer)
    return "int8" if isinstance(entries, Quantized) else entries.dtype.name


def slot_nbytes(buffer: Any) -> int:
    """Counts the bytes of one slot of one row, all layers."""
    if isinstance(buffer, Biased):
        layers, _, heads, _ = buffer.bias.shape
        size = buffer.bias.dtype.itemsize
        return slot_nbytes(buffer.entries) + layers * heads * size
    _, rows, slots, *_ = buffer.shape
    parts = [buffer]
    if isinstance(buffer, Quantized):
        parts = [buffer.values, buffer.scale]
    nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in parts)
    return nbytes // (rows * slots)


def resized(buffer: Buffer, slots: int) -> Buffer:
    """Returns the buffer with empty slots behind, `slots` in all."""
    more = (0, slots - buffer.shape[2])
    if isinstance(buffer, Biased):
        return buffer.replace(
            entries=resized(buffer.entries, slots),
            bias=jnp.pad(buffer.bias, ((0, 0), (0, 0), (0, 0), more)),
        )
    if isinstance(buffer, Quantized):
        return buffer.replace(
            values=resized(buffer.values, slots),
            scale=jnp.pad(buffer.scale, ((0, 0), (0, 0), (0, 0), more)),
        )
    return jnp.pad(buffer, ((0, 0), (0, 0), more, (0, 0), (0, 0)))


def trimmed(buffer: Buffer, slots: int) -> Buffer:
    """Returns the first `slots` of the buffer."""
    if isinstance(buffer, Biased):
        return buffer.replace(
            entries=trimmed(buffer.entries, slots), bias=buffer.bias[..., :slots]
        )
    if isinstance(buffer, Quantized):
        return buffer.replace(
            values=trimmed(buffer.values, slots), scale=buffer.scale[..., :slots]
        )
    return jax.lax.slice_in_dim(buffer, 0, slots, axis=2)


def specs(buffer: Any, partition: Partition) -> Any:
    """Returns how a buffer is split over devices; also one layer of it as floats."""
    if not isinstance(buffer, Biased | Quantized):
        return partition.spec(ARRAY[-buffer.ndim :], buffer.shape)
    places = {}
    for name, part in vars(buffer).items():
        if isinstance(part, Quantized):
            places[name] = specs(part, partition)
        elif part is not None:
            places[name] = partition.spec(PARTS[name][-part.ndim :], part.shape)
    return buffer.replace(**places)


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
    if isinstance(buffer, Biased):
        inner = centred(buffer.entries, keys, layer, rows, entries)
        return buffer.replace(entries=inner)
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
    if isinstance(buffer, Biased):
        return buffer.replace(
            entries=put(buffer.entries, new, start, layer, live, frequencies),
            bias=write_rows(buffer.bias, _no_bias(new), start, layer, live, slots=1),
        )
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
    if isinstance(buffer, Biased):
        entries, at = read(buffer.entries, new, start, layer, frequencies)
        bias = buffer.bias
        if at is None and layer is not None:
            bias = jax.lax.dynamic_index_in_dim(bias, layer, keepdims=False)
        return Biased(entries, bias), at
    if not isinstance(buffer, Quantized):
        return buffer, layer
    floats = dequantize(buffer, layer, frequencies=frequencies, dtype=new.dtype)
    return write_rows(floats, new, start), None


def for_attention(
    k: Buffer, v: Buffer, frequencies: Float[np.ndarray, " H2"]
) -> tuple[Array, Array, dict[str, Any]]:
    """Returns k, v and options for `attention.prefix_attention`."""
    if isinstance(k, Biased):
        entries, v, options = for_attention(k.entries, v, frequencies)
        return entries, v, options | {"bias": k.bias}
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
    if isinstance(buffer, Biased):
        entries = put_all_layers(buffer.entries, new, start, live, frequencies)
        return put_bias(buffer.replace(entries=entries), _no_bias(new), start, live)
    if isinstance(buffer, Quantized):
        return write(buffer, new, start, None, live, frequencies=frequencies)
    one = lambda buffer, new: write_rows(buffer, new, start, None, live)
    return jax.vmap(one)(buffer, new)


def put_bias(
    buffer: Buffer,
    bias: Float[Array, "L B K n"],
    start: Int[Array, " B"],
    live: Bool[Array, " B"] | None = None,
) -> Biased:
    """Sets the biases of slots start[row] ...; rows that are not live keep theirs."""
    buffer = biased(buffer)
    one = functools.partial(write_rows, start=start, live=live, slots=1)
    return buffer.replace(bias=jax.vmap(one)(buffer.bias, bias))


def _no_bias(new: Shaped[Array, "*L B T K H"]) -> Float[Array, "*L B K T"]:
    """Returns the biases of new entries, which are 0."""
    *front, t, heads, _ = new.shape
    return jnp.zeros((*front, heads, t), jnp.float32)


def take(buffer: Buffer, slots: Int[Array, "B n"]) -> Buffer:
    """Takes these slots of each row, as a buffer of n."""
    if isinstance(buffer, Biased):
        bias = jnp.take_along_axis(buffer.bias, slots[None, :, None], axis=3)
        return Biased(take(buffer.entries, slots), bias)
    if isinstance(buffer, Quantized):
        return take_int8(buffer, slots)
    return jnp.take_along_axis(buffer, slots[None, :, :, None, None], axis=2)


def turned(keys: Buffer, cos: Any, sin: Any, shift: Any = None) -> Buffer:
    """Rotates keys that move to other slots.

    Args:
      cos, sin: of the distance, [B, n, 1, H/2].
      shift: `mean_change` where they move to another buffer.
    """
    if isinstance(keys, Biased):
        return keys.replace(entries=turned(keys.entries, cos, sin, shift))
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
    source, to = entries_of(source), entries_of(to)
    if not (isinstance(source, Quantized) and isinstance(to, Quantized)):
        return None
    if source.mean is None or to.mean is None:
        return None
    return rotated_mean(source.mean - to.mean, slots, frequencies)


def adopted(buffer: Buffer, other: Buffer, rows: Bool[Array, " B"]) -> Buffer:
    """Takes over the mean of another buffer in some rows, which are empty."""
    if isinstance(buffer, Biased):
        return buffer.replace(entries=adopted(buffer.entries, other, rows))
    other = entries_of(other)
    if not (isinstance(buffer, Quantized) and isinstance(other, Quantized)):
        return buffer
    if buffer.mean is None or other.mean is None:
        return buffer
    mean = jnp.where(rows[None, :, None, None], other.mean, buffer.mean)
    return buffer.replace(mean=mean)


def choose(which: Bool[Array, "B n"], a: Buffer, b: Buffer) -> Buffer:
    """Chooses slots of a where `which`, else of b, in b's dtype and with b's mean."""
    a, b = alike(a, b)
    if isinstance(a, Biased) and isinstance(b, Biased):
        return Biased(
            choose(which, a.entries, b.entries),
            jnp.where(which[None, :, None], a.bias, b.bias),
        )
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        return b.replace(
            values=choose(which, a.values, b.values),
            scale=jnp.where(which[None, :, None], a.scale, b.scale),
        )
    return jnp.where(which[None, :, :, None, None], a.astype(b.dtype), b)  # pyright: ignore


def copy_in(buffer: Buffer, new: Buffer, start: Int[Array, " B"]) -> Buffer:
    """Writes all slots of `new` at start[row], bit by bit."""
    buffer, new = alike(buffer, new)
    if isinstance(buffer, Biased) and isinstance(new, Biased):
        entries = copy_in(buffer.entries, new.entries, start)
        return put_bias(buffer.replace(entries=entries), new.bias, start)
    if isinstance(buffer, Quantized) and isinstance(new, Quantized):
        put_scale = functools.partial(write_rows, start=start, slots=1)
        return buffer.replace(
            values=put_all_layers(buffer.values, new.values, start),
            scale=jax.vmap(put_scale)(buffer.scale, new.scale),
        )
    return put_all_layers(buffer, new, start)  # pyright: ignore[reportArgumentType]
