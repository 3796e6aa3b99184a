"""One hash for a tree of arrays, equal for equal values wherever they are stored."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from beacon_jax.hf.keys import flatten
from beacon_jax.hf.reader import TreeReader, row_blocks


class TreeHash:
    """Collects tensors in any order; each is fed as blocks of its bytes."""

    def __init__(self):
        self._lines: dict[str, str] = {}

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        blocks: Iterable[np.ndarray],
    ) -> Iterable[np.ndarray]:
        """Passes the blocks through, hashing them on the way."""
        digest = hashlib.sha256()
        for block in blocks:
            block = np.ascontiguousarray(block)
            digest.update(block.view(np.uint8).data)
            yield block
        self._lines[name] = f"{name} {shape} {dtype.name} {digest.hexdigest()}\n"

    def hexdigest(self) -> str:
        """Returns the hash of all tensors, whatever order they came in."""
        lines = "".join(line for _, line in sorted(self._lines.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def tree_hash(tree: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over names, shapes, dtypes and bytes of a tree of arrays.

    The tree is nested dicts. The hash is independent of the order of the dicts and of
    where the arrays live. At most a block of one tensor is on the host at a time.
    """
    reader, result = TreeReader(tree), TreeHash()
    for name, _ in flatten(tree):
        tensor = reader.tensors[name]
        for _ in result.add(name, tensor.shape, tensor.dtype, row_blocks(reader, name)):
            pass
    return result.hexdigest()
