"""The compressed context as a value: what `compress` returns."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState, batch_axis
from beacon_jax.hf.identify import Identity
from beacon_jax.inference import mount, packs, room, validate
from beacon_jax.inference.account import Account
from beacon_jax.inference.history import History
from beacon_jax.model.buffers import alike, dtype_name
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.partition import Partition
from beacon_jax.names import hinted
from beacon_jax.runtime import launched

if TYPE_CHECKING:
    from beacon_jax.inference.packs import ModelLike


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Memory:
    """B compressed contexts. A value: nothing that is done with it changes it.

    Attributes:
      config: of the model that wrote it.
      state: keys and values on the device(s).
      rows: what each row has read, and what its slots stand for.
      identity: hashes of the model's weights.
    """

    config: ModelConfig
    state: MemoryState
    rows: tuple[History, ...]
    identity: Identity = dataclasses.field(default_factory=Identity)

    def __len__(self) -> int:
        """B, the number of contexts."""
        return len(self.rows)

    def __getitem__(self, row: int | slice | Sequence[int]) -> "Memory":
        """Returns some contexts, as a memory of their own (a copy on the device).

        Raises:
          TypeError, IndexError: no number of a row, or one that there is not.
        """
        index = validate.rows(row, len(self))
        return dataclasses.replace(
            self,
            state=take_rows(self.state, index),
            rows=tuple(self.rows[i] for i in index),
        )

    @property
    def capacity(self) -> int:
        """Slots of the buffer per row, used or not."""
        return self.state.capacity

    @property
    def slots(self) -> Int[np.ndarray, " B"]:
        """Memory slots per row, without the open window."""
        return np.asarray([row.slots for row in self.rows])

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Source tokens per row."""
        return np.asarray([row.length for row in self.rows])

    @property
    def spans(self) -> list[Int[np.ndarray, "M 2"]]:
        """The source tokens [start, end) of each slot, per row."""
        return [row.spans for row in self.rows]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer on all devices, used or not."""
        return self.state.nbytes

    @property
    def dtype(self) -> str:
        """The dtype of keys and values: "float32", "bfloat16", "float16" or "int8"."""
        found = {dtype_name(x) for x in (self.state.k, self.state.v)}
        return "+".join(sorted(found))

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one slot of one row: all that it has in all layers."""
        return self.state.slot_nbytes

    @property
    def recent(self) -> bool:
        """Whether each row keeps its last full window raw, `compress(recent=True)`."""
        return self.state.recent is not None

    @property
    def entries(self) -> Int[np.ndarray, " B"]:
        """Entries in use per row: slots, and the open window with its beacons."""
        state = self.state
        raw, ratio = np.asarray(state.raw), np.asarray(state.ratio)
        law = Law.of(self.config, state.window)
        return np.asarray(state.slots) + law.entries(ratio, raw)

    @property
    def used_nbytes(self) -> int:
        """Bytes of what is in use, all rows together (`Account.nbytes`)."""
        pairs = zip(self.rows, self.entries.tolist(), strict=True)
        return sum(Account.of(row, n, self.slot_nbytes).nbytes for row, n in pairs)

    def __repr__(self) -> str:
        rows = "1 row" if len(self) == 1 else f"{len(self)} rows"
        fed, held = sum(row.fed for row in self.rows), int(self.entries.sum())
        pending = sum(len(row.pending) for row in self.rows)
        return (
            f"Memory({rows}: {fed:,} tokens → {int(self.slots.sum()):,} slots + "
            f"{held - int(self.slots.sum()):,} open, x{fed / max(held, 1):.1f}, "
            f"{self.used_nbytes / 2**20:.2f} MiB, {self.dtype}"
            + (", recent" if self.recent else "")
            + (f", {pending:,} tokens still to be fed)" if pending else ")")
        )

    @hinted("Memory.account")
    def account(self, row: int = 0) -> Account:
        """Counts a row's tokens, entries, bytes and ratio, with the open window.

        Raises:
          TypeError, IndexError: no number of a row, or one that there is not.
        """
        number = validate.whole("row", row, -(2**63), "give the number of a row")
        if not -len(self) <= number < len(self):
            raise IndexError(f"row={number}: {validate.numbered(len(self))}.")
        entries = int(self.entries[number])
        return Account.of(self.rows[number], entries, self.slot_nbytes)

    def describe(self) -> str:
        """Describes the memory in lines of text.

        Each row has a line: tokens, what holds them, bytes in use, ratio. The buffer
        has one: what JAX has allocated for it, used or not. On devices that keep count
        (not CPUs) there is one more, with the most bytes that JAX has had there so far,
        weights and all.
        """
        lines = []
        for i, row in enumerate(self.rows):
            held = self.account(i)
            line = f"row {i}: {held.tokens} tokens -> {held.holds()}, {held.worth()}"
            if len(row.pending):
                line += f", {len(row.pending)} still to be fed"
            lines.append(line)
        total = (
            f"buffer: {self.capacity} slots per row of {self.slot_nbytes} bytes "
            f"({self.dtype}), {self.nbytes / 2**20:.3f} MiB"
        )
        return "\n".join([*lines, total, *_peak(self.state.slots.devices())])

    def fork(self) -> "Memory":
        """Returns the same memory again, to continue it in another direction.

        It costs nothing: continuing either of the two writes into a copy.
        """
        return dataclasses.replace(self)

    @hinted("Memory.truncate")
    def truncate(self, tokens: int) -> "Memory":
        """Returns the memory of each row's first `tokens` tokens.

        Windows that end there or before stay as they are, and so does the front of the
        open window. Tokens inside a window that was compressed, less than one window,
        are fed again with whatever comes next. If rows keep their last full windows raw
        (`recent`), they are less than two: the window that is the last full one then
        comes first. Of a piece that was compressed without training, they are those in
        front of `tokens`, and stay uncompressed.

        Raises:
          TypeError: no whole number.
          ValueError: more tokens than a row has, or tokens to be fed again that were
            not kept.
        """
        remedy = "give one whole number, which is for all rows"
        tokens = validate.whole("tokens", tokens, 0, remedy)
        return self.with_rows(tuple(row.cut(tokens) for row in self.rows))

    def with_rows(self, rows: tuple[History, ...]) -> "Memory":
        """Returns the memory as it was where each row's history ends.

        Each history is at or before the end of its row.
        """
        number = lambda values: jnp.asarray(list(values), jnp.int32)
        sinks = jnp.where(number(r.slots for r in rows) > 0, self.state.sinks, 0)
        state = self.state.replace(
            slots=number(r.slots for r in rows),
            sinks=sinks,
            raw=number(r.raw for r in rows),
            windows=number(r.windows for r in rows),
        )
        if (recent := state.recent) is not None:
            lie = number(r.own is not None for r in rows) == 1
            length = jnp.where(lie, recent.length, 0)
            state = state.replace(recent=recent.replace(length=length))
        return dataclasses.replace(self, state=state, rows=rows)

    @hinted("Memory.repeat")
    def repeat(self, count: int) -> "Memory":
        """Returns `count` copies of a memory of one row, as a batch.

        Raises:
          TypeError, ValueError: no whole number from 1 on, or a memory of several rows.
        """
        count = validate.whole("count", count, 1, "give the number of copies")
        if len(self) != 1:
            raise ValueError(f"the memory has {len(self)} rows: only one is repeated.")
        room.check_copies(self.state, count)
        return self[[0] * count]

    @hinted("Memory.save")
    def save(
        self, path: str | Path, *, tokens: bool = True, overwrite: bool = False
    ) -> None:
        """Writes a beacon pack, see `packs.save`."""
        packs.save(self, path, tokens=tokens, overwrite=overwrite)

    @classmethod
    @hinted("Memory.load")
    def load(
        cls,
        path: str | Path,
        model: "ModelLike | None" = None,
        *,
        mesh: str | Mesh | Partition | None = None,
        allow_other_model: bool = False,
    ) -> "Memory":
        """Reads a beacon pack: bit for bit the memory that was saved.

        Args:
          path: of the file that `save` wrote.
          model: the model that is to continue the memory. It is checked to be the one
            that wrote the memory, which goes to its devices. None: nothing is checked.
          mesh: other devices: "tensor:8", a `jax.sharding.Mesh`, or a partition with
            rules of its own. None: where the model is, without one the first device.
          allow_other_model: use a pack that other weights of the same shape wrote.

        Raises:
          TypeError: an argument of another type, or arguments in another order.
          PackError: no pack, a damaged one, or one of another model; says which, and
            what to do.
          FileNotFoundError: there is no such file.
        """
        parts = packs.read(path, model, mesh=mesh, allow_other_model=allow_other_model)
        return cls(*parts)

    @classmethod
    @hinted("Memory.concatenate")
    def concatenate(cls, memories: Sequence["Memory"]) -> "Memory":
        """Mounts memories behind each other, see `mount.concatenate`."""
        return mount.concatenate(_listed(memories))


def _listed(given: Any) -> list[Memory]:
    """Returns the memories; TypeError for anything else."""
    remedy = "give a list of memories"
    if isinstance(given, Memory):  # its rows would be taken
        remedy = "give a list of memories, [first, second]"
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes):
        memories = list(given)
        for i, memory in enumerate(memories):
            validate.memory(memory, Memory, f"memories[{i}]", needed=True)
        return memories
    raise TypeError(
        f"memories={validate.shown(given)} is {validate.kind_of(given)}: {remedy}."
    )


def take_rows(state: MemoryState, index: Int[np.ndarray, " b"]) -> MemoryState:
    """Takes the state of the rows of `index`, which may repeat."""
    rows = jnp.asarray(index)
    return _by_leaf(lambda x: jnp.take(x, rows, axis=batch_axis(x)), state)


def join_rows(states: Sequence[MemoryState]) -> MemoryState:
    """Joins states of different rows into one batch, all with the largest capacity."""
    size = max(state.capacity for state in states)
    keys = alike(*(state.resized(size).k for state in states))
    states = [
        state.resized(size).replace(k=k) for state, k in zip(states, keys, strict=True)
    ]
    join = lambda *leaves: jnp.concatenate(leaves, axis=batch_axis(leaves[0]))
    return _by_leaf(join, *states)


def _by_leaf(move: Callable[..., jax.Array], *states: MemoryState) -> MemoryState:
    """Applies `move` to each leaf, as a launch of its own.

    Rows that are split over devices move between them.
    """

    def one(*leaves: jax.Array) -> jax.Array:
        moved = move(*leaves)
        launched(moved)
        return moved

    return jax.tree.map(one, *states)


def _peak(devices: Iterable[Any]) -> list[str]:
    """Returns the line of `describe` on what the fullest device had at once."""
    known = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in devices]
    peak = max((p for p in known if p is not None), default=None)
    if peak is None:
        return []
    return [f"device: {peak / 2**20:,.1f} MiB at the peak, measured by JAX"]
