"""Moves entries of a memory to other slots.

These are the kept ones of an open window, or the slots of one memory that go behind
those of another.

A key in the buffer is rotated at its index and, with yarn, carries the magnitude. A key
that moves is turned by the distance alone: rotations add up, the magnitude would not.
In bfloat16 a move rounds once more (rms error of a key of unit variance 0.0023, 0.0017
when rotated once); in float32 it is as exact as a rotation by the sum.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState
from beacon_jax.model import buffers
from beacon_jax.model.buffers import Buffer
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.rotary import cos_sin, inverse_frequencies


def keep_places(
    config: ModelConfig,
    k: Buffer,
    v: Buffer,
    slots: Int[Array, " B"],
    place: Int[Array, "B n"],
    count: Int[Array, " B"],
) -> tuple[Buffer, Buffer]:
    """Moves entries slots + place[b, j] of the buffers to slots + j, for j < count.

    Args:
      k, v: [L, B, S, K, H]; n <= S, and the entries lie inside the buffer.

    Returns:
      The buffers; everything but the `count` entries of each row is bit-identical.
    """
    to, nth = _targets(slots, place.shape[1], k.shape[2])
    chosen = jnp.take_along_axis(place, jnp.maximum(nth, 0), axis=1)
    moves = (nth >= 0) & (nth < count[:, None])
    source = jnp.where(moves, slots[:, None] + chosen, to)
    new_k = _turned(config, buffers.take(k, source), to - source)
    return (
        _put(k, new_k, to, moves),
        _put(v, buffers.take(v, source), to, moves),
    )


@functools.partial(jax.jit, static_argnames=("config",))
def keep_entries(
    config: ModelConfig,
    state: MemoryState,
    place: Int[Array, "B n"],
    count: Int[Array, " B"],
) -> MemoryState:
    """Closes open windows, keeping the listed entries of each as its slots.

    Args:
      place: entries of the open window, raw tokens and beacons as they lie in it, in
        rising order; beyond `count` ignored.
      count: entries kept per row. Rows with 0 stay as they are, window and all.

    Returns:
      The memory, its other slots bit-identical. A first window that is closed like this
      has its first entries as sinks, as one of ratio 0 has (docs/specification.md
      section 2).
    """
    place = place[:, : state.capacity]
    k, v = keep_places(config, state.k, state.v, state.slots, place, count)
    closes = count > 0
    sink = Law.of(config).sink
    first = closes & (state.slots == 0)
    return state.replace(
        k=k,
        v=v,
        slots=state.slots + count,
        sinks=jnp.where(first, jnp.minimum(sink, count), state.sinks),
        raw=jnp.where(closes, 0, state.raw),
        windows=state.windows + closes,
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def thin(
    config: ModelConfig,
    state: MemoryState,
    first: Int[Array, " B"],
    count: Int[Array, " B"],
) -> MemoryState:
    """Keeps the later one of two neighbours, of slots first ... first + 2 count - 1.

    A later beacon has read what the one in front of it stands for. Slots behind them
    move up. What is in an open window is lost, but for its tokens. The state is taken
    over. (SmolLM2-135M at x8 loses less so than by the means of both:
    docs/memories.md.)
    """
    nth = jnp.arange(state.capacity)
    pairs = count[:, None]
    place = jnp.where(nth < pairs, 2 * nth + 1, nth + pairs)
    left = state.slots - count
    k, v = keep_places(config, state.k, state.v, first, place, left - first)
    return state.replace(k=k, v=v, slots=left)


@functools.partial(jax.jit, static_argnames=("config",))
def append(config: ModelConfig, state: MemoryState, other: MemoryState) -> MemoryState:
    """Appends the slots of `other` to those of `state`, row by row.

    `other`'s sinks are ordinary slots there, except behind a row that has none. Neither
    may have tokens in an open window (`keep_entries` closes it), and `state` needs room
    for the slots of both: the caller sees to it.
    """
    size = min(other.capacity, state.capacity)
    to, nth = _targets(state.slots, size, state.capacity)
    moves = (nth >= 0) & (nth < other.slots[:, None])
    source = jnp.maximum(nth, 0)
    distance = jnp.broadcast_to(state.slots[:, None], source.shape)
    k = buffers.adopted(state.k, other.k, state.slots == 0)
    shift = buffers.mean_change(other.k, k, to, inverse_frequencies(config))
    new_k = _turned(config, buffers.take(other.k, source), distance, shift)
    return state.replace(
        k=_put(k, new_k, to, moves),
        v=_put(state.v, buffers.take(other.v, source), to, moves),
        slots=state.slots + other.slots,
        sinks=jnp.where(state.slots == 0, other.sinks, state.sinks),
        ratio=other.ratio,
        windows=state.windows + other.windows,
        tokens=other.tokens,
    )


def _targets(
    slots: Int[Array, " B"], size: int, capacity: int
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Returns indices of the buffer that hold slots ... slots + size - 1.

    They go as far as the buffer does. With them is each one's distance from slots:
    negative for those in front, which a window near the end begins with (XLA would
    clamp the write silently).
    """
    start = jnp.minimum(slots, capacity - size)[:, None]
    to = start + jnp.arange(size)
    return to, to - slots[:, None]


def _turned(
    config: ModelConfig, keys: Any, distance: Int[Array, "B n"], shift: Any = None
) -> Any:
    """Turns keys [L, B, n, K, H] that move by a distance."""
    return buffers.turned(keys, *cos_sin(config, distance, scaled=False), shift)


def _put(
    buffer: Buffer, new: Any, to: Int[Array, "B n"], moves: Bool[Array, "B n"]
) -> Buffer:
    """Writes new [L, B, n, K, H] at the neighbours to [B, n] where `moves`.

    The others keep their bits, whatever a rotation by 0 would make of them.
    """
    mixed = buffers.choose(moves, new, buffers.take(buffer, to))
    return buffers.copy_in(buffer, mixed, to[:, 0])
