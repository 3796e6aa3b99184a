"""The leaves of a `MemoryState` by name: their axes, their live parts, and back.

A pack stores parts, never the unused rest of a buffer, and does not know what leaves a
state has: an int8 memory has scales and means beside its values.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from beacon_jax.core.law import default_window
from beacon_jax.core.memory import MemoryState, buffer_size, init_memory
from beacon_jax.model.buffers import ARRAY, PARTS
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.partition import Partition, make_partition

# Axes by the last part of a leaf's name; other leaves have their rows in front.
AXES = {"k": ARRAY, "v": ARRAY, **PARTS}


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a state that is stored as one tensor.

    `read` gives all of it or, if it is `layered`, one layer (axis 0) at a time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Any], np.ndarray]
    layered: bool = False

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields the elements in row-major order."""
        for layer in range(self.shape[0]) if self.layered else [None]:
            yield np.ascontiguousarray(self.read(layer))


def whole(values: np.ndarray) -> Part:
    """Makes a part of an array on the host."""
    return Part(values.shape, values.dtype, lambda _: values)


def names(state: MemoryState) -> dict[str, Any]:
    """Returns the leaves by their names, such as "k" or "k.values"."""
    found = jax.tree_util.tree_leaves_with_path(state)
    return {".".join(key.name for key in path): leaf for path, leaf in found}


def axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """Returns the logical axes of a leaf."""
    return AXES.get(name.rsplit(".", 1)[-1], ("batch", *(None,) * (ndim - 1)))


def parts(state: MemoryState, live: Sequence[int]) -> dict[str, Part]:
    """Returns the parts of a state that are to be stored, by name.

    A leaf with slots has a part per row, "name/row" [..., live, ...], without the batch
    axis. Any other leaf is one part, "name".
    """
    found: dict[str, Part] = {}
    for name, leaf in names(state).items():
        kind = axes(name, leaf.ndim)
        if "slots" not in kind:
            # Ids beyond their window are of no use, and could be another text's.
            values, live_ids = np.asarray(leaf), _ids(state).get(name)
            if live_ids is not None:
                values = np.where(np.arange(values.shape[1]) < live_ids, values, 0)
            found[name] = whole(values)
            continue
        at = kind.index("slots") - 1
        for row, count in enumerate(live):
            shape = [leaf.shape[0], *leaf.shape[2:]]
            shape[at] = count
            read = functools.partial(_layer, leaf, row, at - 1, count)
            part = Part(tuple(shape), np.dtype(leaf.dtype), read, layered=True)
            found[f"{name}/{row}"] = part
    return found


def _layer(leaf: Any, row: int, at: int, count: int, layer: int) -> np.ndarray:
    one = np.asarray(leaf[layer, row])
    return one[(*(slice(None),) * at, slice(count))]


def _ids(state: MemoryState) -> dict[str, np.ndarray]:
    """Returns the leaves of ids, with how many of each row [B, 1] mean something."""
    found = {"tokens": np.asarray(state.raw)[:, None]}
    if state.recent is not None:
        found["recent.tokens"] = np.asarray(state.recent.length)[:, None]
    return found


def shapes(
    config: ModelConfig, live: Sequence[int], dtype: str, has: Mapping[str, bool]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Returns shape and dtype of each of the `parts` of a state, by name.

    Args:
      live: entries of each row.
      dtype: of keys and values.
      has: of `core.memory.init_memory`, "recent" and "biased".
    """
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, leaf in names(_template(config, live, dtype, has)).items():
        kind = axes(name, len(leaf.shape))
        if "slots" not in kind:
            found[name] = leaf.shape, np.dtype(leaf.dtype)
            continue
        for row, count in enumerate(live):
            shape = [leaf.shape[0], *leaf.shape[2:]]
            shape[kind.index("slots") - 1] = count
            found[f"{name}/{row}"] = tuple(shape), np.dtype(leaf.dtype)
    return found


def _template(
    config: ModelConfig,
    live: Sequence[int],
    dtype: str,
    has: Mapping[str, bool],
    capacity: int | None = None,
) -> MemoryState:
    """Returns the shapes of a state with room for the live entries of each row."""
    size = capacity or buffer_size(max(live), default_window(config))
    make = lambda: init_memory(config, len(live), size, dtype, **has)
    return jax.eval_shape(make)


def build(
    config: ModelConfig,
    live: Sequence[int],
    dtype: str,
    part: Callable[[str], Part],
    partition: Partition | None,
    has: Mapping[str, bool],
    capacity: int | None = None,
) -> MemoryState:
    """Makes a state on the devices from its parts: the inverse of `parts`.

    It has `capacity` slots per row, or what `buffer_size` makes of the live entries.

    While a leaf is made, each device's share of it is on the host once, and one layer
    of a row of the file is mapped.
    """
    rows, template = len(live), _template(config, live, dtype, has, capacity)
    made = {}
    for name, leaf in names(template).items():
        kind = axes(name, len(leaf.shape))
        where = _sharding(partition, kind, leaf.shape)
        if "slots" in kind:
            sources = [part(f"{name}/{row}") for row in range(rows)]
            share = functools.partial(_share, sources, kind.index("slots"), leaf)
        else:
            share = np.asarray(part(name).read(None)).__getitem__
        made[name] = jax.make_array_from_callback(leaf.shape, where, share)
    structure = jax.tree.structure(template)
    return jax.tree.unflatten(structure, list(made.values()))


def _share(sources: list[Part], slots: int, leaf: Any, index: Any) -> np.ndarray:
    """Makes a device's share [L, b, ...] of a leaf: live entries, zeros behind them."""
    layers, rows, *rest = (
        range(*s.indices(n)) for s, n in zip(index, leaf.shape, strict=True)
    )
    out = np.zeros([len(axis) for axis in (layers, rows, *rest)], leaf.dtype)
    inner = [slice(axis.start, axis.stop) for axis in rest]
    for i, row in enumerate(rows):
        for j, layer in enumerate(layers):
            values = sources[row].read(layer)[tuple(inner)]
            fill = [slice(None)] * len(rest)
            fill[slots - 2] = slice(values.shape[slots - 2])
            out[(j, i, *fill)] = values
    return out


def partition(mesh: str | Mesh | Partition | None) -> Partition | None:
    """Makes a partition of a mesh; one that is made already, or None, stays."""
    if mesh is None or isinstance(mesh, Partition):
        return mesh
    return make_partition(mesh)


def _sharding(
    partition: Partition | None, kind: tuple[str | None, ...], shape: tuple[int, ...]
) -> Sharding:
    if partition is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    rules, sizes = dict(partition.rules), partition.mesh.shape
    split = lambda axis: math.prod(sizes[m] for m in rules.get(axis or "", ()))
    fits = [a if n % split(a) == 0 else None for a, n in zip(kind, shape, strict=True)]
    return partition.sharding(tuple(fits), shape)


def empty(
    config: ModelConfig,
    rows: int,
    capacity: int,
    dtype: Any,
    partition: Partition | None,
    recent: bool = False,
) -> MemoryState:
    """Makes an empty memory on the devices that it is split over."""
    make = functools.partial(init_memory, config, rows, capacity, dtype, recent)
    if partition is None:
        return _empty(config, rows, capacity, dtype, recent)
    where = shardings(partition, jax.eval_shape(make))
    return jax.jit(make, out_shardings=where)()


# One program: each array by itself would be compiled, in every process anew.
_empty = jax.jit(init_memory, static_argnums=(0, 1, 2, 3, 4))


def shardings(partition: Partition, state: Any) -> Any:
    """Returns where each leaf of a state (or its shape) lives.

    Rows are split with the batch, keys and values with their kv heads. What the devices
    do not divide is whole on each.
    """
    found = [
        _sharding(partition, axes(name, len(leaf.shape)), leaf.shape)
        for name, leaf in names(state).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(state), found)
