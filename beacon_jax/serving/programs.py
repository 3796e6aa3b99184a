"""The compiled programs of the engine: a fixed set of shapes, compiled at the start.

The running batch has N rows of S slots. S is one of a few sizes (`sizes`), so that
short requests do not pay for the longest. Rows are fed one by one in a state of their
own, of one of the same sizes, and then copied into the batch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.feed import FeedOutput, feed_jit
from beacon_jax.core.law import default_window
from beacon_jax.core.loss import LIKELY, Likely
from beacon_jax.core.memory import MemoryState, batch_axis
from beacon_jax.inference import leaves
from beacon_jax.inference.decode import BLOCK, Loop, Rows, decode_block
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.sampling import make_sampling
from beacon_jax.model import buffers
from beacon_jax.training.processes import fetch

STEP = 4  # from one size to the next
# Slots of the smallest size, and two windows at least. Smaller buffers are read by
# smaller blocks on a CPU (`cpu_block`): rows would round by the size of their batch.
LEAST = 1024


class Batch(NamedTuple):
    """The running batch on the device.

    Attributes:
      memory: of N rows.
      logits: after each row's last token.
      seen: tokens of each row, of the repetition penalty.
    """

    memory: MemoryState
    logits: Float[Array, "N V"]
    seen: Bool[Array, "N V"]


def sizes(window: int, most: int) -> list[int]:
    """Lists the slots that a row may have, ascending, up to `most`."""
    found = [most]
    while found[0] // STEP >= max(LEAST, 2 * window):
        found.insert(0, found[0] // STEP)
    return found


def fitting(sizes: list[int], slots: int) -> int:
    """Returns the least of the sizes that `slots` fit into."""
    return next(size for size in sizes if size >= slots)


def empty(model: Model, rows: int, size: int, dtype: str, biased: bool) -> Batch:
    """Makes a batch whose rows are all free."""
    state = leaves.empty(model.config, rows, size, dtype, model.partition)
    if biased:
        state = _biased(state)
    vocab = model.config.vocab_size
    zeros: Any = lambda dtype: np.zeros((rows, vocab), dtype)
    return _lying(model, Batch(state, zeros(np.float32), zeros(bool)))


def _lying(model: Model, tree: Any) -> Any:
    """Puts arrays where those lie that programs return.

    An array that lies just anywhere is another kind to `jit`, which would compile anew.
    """
    if model.partition is None:
        where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.device_put(tree, where)
    whole = jax.sharding.NamedSharding(model.partition.mesh, jax.P())
    put = lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, whole)
    return jax.tree.map(put, tree)


def placed(model: Model, memory: Memory | None, size: int, dtype: str) -> MemoryState:
    """Copies a memory of one row, wherever it is, into a state of `size` slots."""
    if memory is None:
        state = leaves.empty(model.config, 1, size, dtype, model.partition)
        return _lying(model, state)
    if model.partition is None:
        return _lying(model, _with_slots(memory, size))
    live = memory.entries.tolist()
    parts = leaves.parts(memory.state, live)
    has = {"recent": False, "biased": memory.state.biased}
    return leaves.build(
        model.config, live, memory.dtype, parts.__getitem__, model.partition, has, size
    )


def on_host(memory: Memory) -> Memory:
    """Returns the memory with what it holds on the host, and nothing unused.

    Devices have the running batch alone, however many memories are at hand.
    """
    state = _with_slots(memory, max(int(memory.entries.max()), 1))
    return Memory(memory.config, state, memory.rows, memory.identity)


def _with_slots(memory: Memory, slots: int) -> MemoryState:
    """Copies a state to arrays of the host that have so many slots."""

    def copied(path: Any, leaf: Any) -> np.ndarray:
        values = fetch(leaf)
        kind = leaves.axes(".".join(key.name for key in path), values.ndim)
        if "slots" not in kind:
            return np.array(values)  # its own: programs take over what they are given
        axis = kind.index("slots")
        shape = list(values.shape)
        held = [slice(None)] * values.ndim
        held[axis] = slice(min(slots, shape[axis]))
        shape[axis] = slots
        out = np.zeros(shape, values.dtype)
        out[tuple(held)] = values[tuple(held)]
        return out

    return jax.tree_util.tree_map_with_path(copied, memory.state)


def on_device(model: Model, memory: Memory) -> Memory:
    """Returns a memory of the host on the model's devices, to be continued."""
    size = max(int(memory.entries[0]), model.window)
    state = placed(model, memory, size, memory.dtype)
    return dataclasses.replace(memory, state=state)


@jax.jit
def _biased(state: MemoryState) -> MemoryState:
    return state.replace(k=buffers.biased(state.k))


def window(
    model: Model,
    state: MemoryState,
    tokens: Int[np.ndarray, " n"],
    ratio: int,
    static: tuple[int, ...],
    labels: Int[np.ndarray, " n"] | None = None,
) -> tuple[FeedOutput, MemoryState]:
    """Feeds up to a window of tokens to a row; takes the state over.

    Args:
      labels: the tokens behind each, if it is asked how likely they are.
    """
    width = state.window
    fill = lambda x: np.pad(x, (0, width - len(x))).astype(np.int32)[None]
    return feed_jit(
        model.net,
        model.variables,
        state,
        fill(tokens),
        np.asarray([len(tokens)], np.int32),
        np.asarray([[ratio]], np.int32),
        None if labels is None else fill(labels),
        static=static,
        outputs="last" if labels is None else "likely",
    )


@functools.partial(jax.jit, donate_argnames="batch")
def insert(
    batch: Batch,
    state: MemoryState,
    logits: Float[Array, "1 V"],
    seen: Bool[Array, " V"] | Bool[np.ndarray, " V"],
    row: Int[Array, ""] | np.int32,
) -> Batch:
    """Copies a row's state, which has the batch's slots or fewer, into the batch."""

    def put(whole: jax.Array, part: Any) -> jax.Array:
        start = [jnp.int32(0)] * whole.ndim
        start[batch_axis(whole)] = jnp.asarray(row, jnp.int32)
        return jax.lax.dynamic_update_slice(whole, part, start)

    k, v = buffers.alike(batch.memory.k, state.k)[1], state.v
    memory = jax.tree.map(put, batch.memory, state.replace(k=k, v=v))
    return Batch(memory, put(batch.logits, logits), put(batch.seen, seen[None]))


@functools.partial(jax.jit, donate_argnames="batch")
def release(batch: Batch, row: Int[Array, ""] | np.int32) -> Batch:
    """Empties a row, so that its slots cost no attention."""
    memory = batch.memory
    clear = lambda x: x.at[row].set(0)
    counts = ("slots", "sinks", "raw", "windows")
    counts = {name: clear(getattr(memory, name)) for name in counts}
    return batch._replace(memory=memory.replace(**counts))


@jax.jit
def taken(memory: MemoryState, row: Int[Array, ""] | np.int32) -> MemoryState:
    """Copies a row out of the batch."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, batch_axis(x)), memory
    )


@functools.partial(jax.jit, static_argnames=("size", "biased"))
def grown(batch: Batch, size: int, biased: bool) -> Batch:
    """Copies the batch into one of more slots, or with a bias per slot."""
    memory = batch.memory.resized(size)
    if biased:
        memory = memory.replace(k=buffers.biased(memory.k))
    return batch._replace(memory=memory)


def block(
    model: Model,
    batch: Batch,
    active: Bool[np.ndarray, " N"],
    ratios: Int[np.ndarray, "N 1"],
    asked: Rows,
    static: tuple[int, ...],
) -> tuple[Int[Array, "N n"], Loop, Batch]:
    """Makes up to a block of tokens of every active row; takes the batch over."""
    rows, best = len(active), min(LIKELY, model.config.vocab_size)
    zeros = lambda *shape: np.zeros((rows, BLOCK, *shape), np.float32)
    told = Likely(zeros(), np.zeros((rows, BLOCK, best), np.int32), zeros(best))
    tokens, loop, memory = decode_block(
        model.net,
        model.variables,
        batch.memory,
        Loop(batch.logits, active, batch.seen, told),
        ratios,
        asked,
        eos_ids=tuple(model.config.eos_ids),
        static=static,
        steady=True,
    )
    assert loop.seen is not None
    return tokens, loop, Batch(memory, loop.logits, loop.seen)


def idle_rows(rows: int) -> Rows:
    """Makes settings of rows that none has asked for anything."""
    zeros = lambda kind: np.zeros(rows, kind)
    return Rows(
        make_sampling().for_rows(rows),
        zeros(np.uint32),
        np.ones(rows, np.int32),
        zeros(np.int32),
        np.int32(1),
        np.False_,
    )


def warm(
    model: Model, rows: int, size: int, dtype: str, static: Any, biased: bool = False
) -> None:
    """Compiles the programs of one size by running them, twice.

    The first time arrays come from here, the second time from the programs.

    Args:
      biased: those of memories whose slots have a bias.
    """
    tokens = np.zeros(default_window(model.config), np.int32)
    seen = np.zeros(model.config.vocab_size, bool)
    active, first = np.arange(rows) == 0, np.int32(0)
    ratios = np.full((rows, 1), static[0], np.int32)
    batch = empty(model, rows, size, dtype, biased)
    state = placed(model, None, size, dtype)
    state = _biased(state) if biased else state
    for _ in range(2):
        out, state = window(model, state, tokens, static[0], static)
        batch = insert(batch, state, out.last_logits, seen, first)
        _, _, batch = block(model, batch, active, ratios, idle_rows(rows), static)
        batch = release(batch, first)
    jax.block_until_ready(batch)
