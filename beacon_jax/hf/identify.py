"""Tells which weights a model has, by hashes of the base and of the beacons.

A hash covers our names, shapes, dtypes and bytes of a model's tensors (`tree_hash`), so
it does not depend on how many files they are in, nor on the format. A converted folder
has its hashes in its manifest. Those of an HF folder are computed from its files when
somebody asks, a block of 16 MB at a time, once per process.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from beacon_jax.hf.conversion import (
    is_converted,
    model_config,
    open_source,
    read_manifest,
)
from beacon_jax.hf.hashing import TreeHash
from beacon_jax.hf.keys import table
from beacon_jax.hf.shards import weight_map
from beacon_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from beacon_jax.hf.checkpoint import Checkpoint

Hash = str | Callable[[], str | None] | None


class Identity:
    """The weights that wrote a memory. Two identities are equal if both hashes are.

    Args:
      base: hash of the base; a function is called when the hash is first asked for.
        None: the model was made in memory, and nothing can be checked against it.
      beacon: hash of the beacons; None also for a model that has none.
    """

    def __init__(self, base: Hash = None, beacon: Hash = None):
        self._given = {"base": base, "beacon": beacon}

    def _resolve(self, part: str) -> str | None:
        found = self._given[part]
        if callable(found):
            found = self._given[part] = found()
        return found

    @property
    def base(self) -> str | None:
        """Hash of the base, None if the model was made in memory."""
        return self._resolve("base")

    @property
    def beacon(self) -> str | None:
        """Hash of the beacons, None without any."""
        return self._resolve("beacon")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        return self is other or (
            self.base == other.base and self.beacon == other.beacon
        )

    def __hash__(self) -> int:
        return hash((self.base, self.beacon))

    def __repr__(self) -> str:
        shown = [
            f"{part}={'(not computed yet)' if callable(x) else x and x[:16]}"
            for part, x in self._given.items()
        ]
        return f"Identity({', '.join(shown)})"


def identity(source: "str | Path | Checkpoint") -> Identity:
    """Returns the identity of a stored model (folder, GGUF file) or a loaded one.

    Nothing is read but config.json and the manifest until a hash is asked for.

    Raises:
      ValueError, FileNotFoundError: a file is missing or does not fit; the message
        names it.
    """
    if not isinstance(source, str | Path):
        return source.identity
    path = Path(source)
    if is_converted(path):
        manifest = read_manifest(path)
        return Identity(manifest["base_hash"], manifest["beacon_hash"])
    config = model_config(path, ignore_sliding_window=True)
    return folder_identity(path, config)


def folder_identity(
    path: Path,
    config: ModelConfig,
    *,
    cast: np.dtype | None = None,
    dtypes: Mapping[str, np.dtype] | None = None,
    known: Mapping[str, Hash] | None = None,
    strip_prefix: str | None = None,
) -> Identity:
    """Returns the identity of a folder's model as it was loaded from it.

    Args:
      config: the model, with the beacons it was loaded with.
      cast: dtype that every tensor was cast to, if any.
      dtypes: dtype of each tensor in the end; None: as stored (or cast).
      known: hashes that need not be computed, "base" and "beacon".
      strip_prefix: as it was loaded with.
    """
    known, stamp = known or {}, _stamp(path)
    pairs = tuple(sorted(dtypes.items())) if dtypes is not None else None

    def compute(part: str) -> str:
        if _stamp(path) != stamp:
            raise ValueError(
                f"the weights in {path} changed since they were loaded, so it cannot "
                "be said which ones wrote the memory: load the model again."
            )
        return _folder_hash(path, stamp, config, part, cast, pairs, strip_prefix)

    return Identity(
        known.get("base") or (lambda: compute("params")),
        known.get("beacon") or (lambda: compute("beacon") if config.beacon else None),
    )


def base_values_hash(path: Path, strip_prefix: str | None = None) -> str:
    """Returns the hash of a base's values, as float32, whatever it is stored in.

    All weights of the base in a folder are read, once per process.
    """
    config = model_config(path, ignore_sliding_window=True)
    names = [e.name for e in table(config) if e.name.startswith("params/")]
    dtypes = tuple((name, np.dtype(np.float32)) for name in sorted(names))
    stamp = _stamp(path)
    return _folder_hash(path, stamp, config, "params", None, dtypes, strip_prefix)


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Returns names, sizes and times of the files with the weights."""
    files = {path}
    if path.is_dir():
        files = {p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")}
        for index in path.glob("*.index.json"):
            with contextlib.suppress(ValueError):  # one that is not read, then
                files |= {path / name for name in weight_map(index).values()}
    stats = [(str(p), p.stat()) for p in sorted(files) if p.exists()]
    return tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats)


@functools.lru_cache(maxsize=64)
def _folder_hash(path, stamp, config, part, cast, dtypes, strip_prefix) -> str:
    """Computes `tree_hash` of one part of a folder's model, as a stream."""
    del stamp  # only a part of the key
    source = open_source(config, path, cast, quiet=True, strip_prefix=strip_prefix)
    final, result = dict(dtypes or ()), TreeHash()
    for name, tensor in source.tensors.items():
        if not name.startswith(f"{part}/"):
            continue
        kind = final.get(name, tensor.dtype)
        pieces = (x.astype(kind, copy=False) for x in source.blocks(name))
        for _ in result.add(name.split("/", 1)[1], tensor.shape, kind, pieces):
            pass
    return result.hexdigest()
