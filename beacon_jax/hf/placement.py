"""Puts tensors from files straight into the shards of a mesh.

A host holds the parts of one tensor that its own devices need, never a model.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from beacon_jax.hf.reader import BLOCK_BYTES, SafetensorsReader
from beacon_jax.model.config import ModelConfig

# (config, name, shape) -> (sharding, dtype) of a tensor; no dtype: as it was stored
Place = Callable[[ModelConfig, str, tuple[int, ...]], tuple[Any, np.dtype | None]]


def put_blocks(
    shape: tuple[int, ...], dtype: Any, sharding: Any, blocks: Iterable[np.ndarray]
) -> jax.Array:
    """Makes a sharded array from pieces of its elements, in row-major order.

    The pieces may have any size.
    """
    where = sharding.addressable_devices_indices_map(shape)
    boxes = {device: _box(index, shape) for device, index in where.items()}
    parts = {
        box: np.empty([stop - start for start, stop in box], dtype)
        for box in set(boxes.values())
    }
    for first, rows in _rows(shape, blocks):
        for box, part in parts.items():
            (start, stop), rest = box[0], box[1:]
            low, high = max(first, start), min(first + len(rows), stop)
            if low < high:
                inner = tuple(slice(*bounds) for bounds in rest)
                part[low - start : high - start] = rows[
                    (slice(low - first, high - first), *inner)
                ]
    arrays = [jax.device_put(parts[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def read_parts(
    reader: SafetensorsReader, name: str, dtype: Any, sharding: Any
) -> jax.Array:
    """Reads a sharded array from a file in our layout.

    Of every row (layer), only the range of columns that devices of this process need is
    read.
    """
    shape = reader.tensors[name].shape
    if len(shape) < 2:
        return put_blocks(shape, dtype, sharding, [reader.read(name)])
    where = sharding.addressable_devices_indices_map(shape)
    columns = [_box(index, shape)[1] for index in where.values()]
    low, high = min(c[0] for c in columns), max(c[1] for c in columns)

    def blocks() -> Iterator[np.ndarray]:
        step = max(1, BLOCK_BYTES * shape[0] // max(reader.tensors[name].nbytes, 1))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            if (low, high) == (0, shape[1]):
                yield reader.read(name, start, stop)
                continue
            rows = np.empty((stop - start, *shape[1:]), reader.tensors[name].dtype)
            for i in range(start, stop):
                rows[i - start, low:high] = reader.read_columns(name, i, low, high)
            yield rows

    return put_blocks(shape, dtype, sharding, blocks())


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    """Returns ((start, stop), ...) of a shard's slices."""
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _rows(
    shape: tuple[int, ...], blocks: Iterable[np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, whole rows [n, ...]) of a stream of elements."""
    size = int(np.prod(shape[1:], dtype=np.int64)) or 1
    rest, at = None, 0
    for block in blocks:
        flat = block.reshape(-1)
        if rest is not None and rest.size:
            flat = np.concatenate([rest, flat])
        whole = flat.size // size
        if whole:
            yield at, flat[: whole * size].reshape(whole, *shape[1:])
        at, rest = at + whole, flat[whole * size :]
