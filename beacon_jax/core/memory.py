"""What the device holds of B sequences: the buffer, and where each row stands in it."""

import math
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from beacon_jax.core.law import Law, default_window
from beacon_jax.model import buffers
from beacon_jax.model.buffers import Buffer
from beacon_jax.model.config import ModelConfig


class CapacityError(ValueError):
    """The buffer is too small; `needed` is the capacity that would do."""

    def __init__(self, capacity: int, needed: int):
        super().__init__(
            f"capacity={capacity} slots are too few: this text needs {needed}. Give "
            f"capacity={needed} or more, leave it out (as many as are needed are "
            "made), or use a higher ratio."
        )
        self.needed = needed


@no_type_check  # a pytree, as `MemoryState`
class Recent(flax.struct.PyTreeNode):
    """The last full window of each row, while its raw entries are the last slots.

    It is run again at its own ratio when the next window is full (`core.recent`).

    Attributes:
      tokens: its ids; undefined where `length` is 0.
      ratio: its own.
      length: W, or 0 for a row none of whose windows lies so.
    """

    tokens: Int[Array, "B W"]
    ratio: Int[Array, " B"]
    length: Int[Array, " B"]


@no_type_check  # a pytree: it also holds shapes, shardings or arrays of numpy
class MemoryState(flax.struct.PyTreeNode):
    """Everything the model remembers of B sequences. A pytree; nothing is hidden.

    One buffer holds, per row, [sink | beacons | open window], so that an entry's index
    is its position. A full window is compressed: its beacons replace its entries.

    Attributes:
      k: keys, rotated at their index; in int8 without their mean (`model.quantize`).
        They may have a bias per slot (`model.buffers.Biased`).
      v: values.
      slots: sink and beacon slots; they never change once written.
      sinks: how many of them are sinks (docs/specification.md section 2).
      raw: raw tokens of the open window, 0 ... W - 1, behind the slots.
      ratio: of the open window (meaningful while raw > 0).
      windows: windows closed so far.
      tokens: ids of the open window's raw tokens; beyond `raw` undefined. A later piece
        runs the open window again from its start, so that a program knows where its
        beacons stand when it is compiled.
      recent: the last full windows, if rows keep theirs raw; None: they do not.
    """

    k: Buffer
    v: Buffer
    slots: Int[Array, " B"]
    sinks: Int[Array, " B"]
    raw: Int[Array, " B"]
    ratio: Int[Array, " B"]
    windows: Int[Array, " B"]
    tokens: Int[Array, "B W"]
    recent: Recent | None = None

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self.slots.shape[0]

    @property
    def capacity(self) -> int:
        """S, the entries that a row has room for."""
        return self.k.shape[2]

    @property
    def window(self) -> int:
        """W, the raw tokens of a full window."""
        return self.tokens.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, used or not, and of the ids of recent windows."""
        ids = self.recent.tokens.nbytes if self.recent is not None else 0
        return self.k.nbytes + self.v.nbytes + ids

    @property
    def biased(self) -> bool:
        """Whether slots have a bias."""
        return isinstance(self.k, buffers.Biased)

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot of one row: keys and values of all layers."""
        return buffers.slot_nbytes(self.k) + buffers.slot_nbytes(self.v)

    def open_entries(self, placement: str) -> Int[Array, " B"]:
        """Counts the entries of open windows: raw tokens and the beacons among them."""
        return Law(self.window, placement=placement).entries(self.ratio, self.raw)

    def copy(self) -> "MemoryState":
        """Copies it into buffers of its own, for a function that takes them over."""
        return jax.tree.map(jnp.copy, self)

    def resized(self, capacity: int) -> "MemoryState":
        """Returns it with room for `capacity` slots, never fewer than it has."""
        if capacity <= self.capacity:
            return self
        k, v = (buffers.resized(x, capacity) for x in (self.k, self.v))
        return self.replace(k=k, v=v)

    def trimmed(self, capacity: int) -> "MemoryState":
        """Returns it with the first `capacity` slots, never more than it has."""
        if capacity >= self.capacity:
            return self
        k, v = (buffers.trimmed(x, capacity) for x in (self.k, self.v))
        return self.replace(k=k, v=v)


def slot_nbytes(config: ModelConfig, dtype: Any, biased: bool = False) -> int:
    """Counts the bytes of one slot of one row: keys and values of all layers.

    In int8 they have scales besides, and some compressors give slots a bias.
    """
    entry = config.head_dim * jnp.dtype(dtype).itemsize
    if jnp.dtype(dtype) == jnp.int8:
        entry += 4
    both = 2 * entry + (4 if biased else 0)
    return config.num_layers * config.num_kv_heads * both


def init_memory(
    config: ModelConfig,
    batch: int,
    capacity: int,
    dtype: Any = jnp.float32,
    recent: bool = False,
    biased: bool = False,
) -> MemoryState:
    """Makes an empty memory for `batch` rows of `capacity` slots.

    Args:
      capacity: see `plan.capacity`.
      dtype: of keys and values; int8 has scales besides.
      recent: whether rows keep their last full windows raw.
      biased: whether slots have a bias.
    """
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    zeros = lambda: jnp.zeros((batch,), jnp.int32)
    ids = lambda: jnp.zeros((batch, default_window(config)), jnp.int32)
    k, v = buffers.empty(shape, dtype)
    if biased:
        k = buffers.biased(k)
    return MemoryState(
        k=k,
        v=v,
        slots=zeros(),
        sinks=zeros(),
        raw=zeros(),
        ratio=zeros(),
        windows=zeros(),
        tokens=ids(),
        recent=Recent(ids(), zeros(), zeros()) if recent else None,
    )


def batch_axis(leaf: Any) -> int:
    """Returns the batch axis of a leaf of `MemoryState`: buffers have layers first."""
    return 1 if leaf.ndim >= 4 else 0


def buffer_size(needed: int, window: int) -> int:
    """Returns the slots to allocate, so that similar lengths share a compiled program.

    They are `needed`, rounded up to 4 sizes per doubling (at most 25 % more).
    """
    step = max(2 ** (max(math.ceil(math.log2(max(needed, 1))), 3) - 3), 1)
    return max(-(-needed // step) * step, window)
