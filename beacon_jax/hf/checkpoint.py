"""Loads a model from a folder or a GGUF file, and saves one as an HF folder."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beacon_jax.hf.adapter import Adapter, JoinedSource, is_adapter
from beacon_jax.hf.conversion import (
    Source,
    check_dtype,
    is_converted,
    model_config,
    open_source,
    read_config,
    read_manifest,
    write_hf_weights,
    write_index,
)
from beacon_jax.hf.hashing import tree_hash
from beacon_jax.hf.identify import Identity, folder_identity
from beacon_jax.hf.keys import beacon_part, flatten, table, unflatten
from beacon_jax.hf.placement import Place
from beacon_jax.hf.reader import TreeReader
from beacon_jax.hf.writer import copy_small_files, new_folder, write_config
from beacon_jax.model import config_keys
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.resources import asset

SHARD_BYTES = 5_000_000_000  # per file of a saved checkpoint, as transformers does


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory.

    Attributes:
      config: the model and its beacons.
      variables: {"params": tree, "beacon": tree} of numpy arrays (see `param_shapes`).
      path: the folder or file that the model was read from.
      known_hashes: hashes that the manifest of a converted folder already has.
      identity: the same hashes, computed from the folder when they are asked for; it
        does not keep the variables alive.
      untrained: whether no part of the beacons is in the files, so that all are copies
        of the base.
    """

    config: ModelConfig
    variables: dict[str, Any]
    path: Path
    known_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    identity: Identity = dataclasses.field(default_factory=Identity)
    untrained: bool = False

    @functools.cached_property
    def base_hash(self) -> str:
        """The `tree_hash` of the base parameters as loaded."""
        return self.known_hashes.get("base") or tree_hash(self.variables["params"])

    @functools.cached_property
    def beacon_hash(self) -> str | None:
        """The `tree_hash` of the beacon parameters as loaded; None without any."""
        if self.config.beacon is None:
            return None
        return self.known_hashes.get("beacon") or tree_hash(self.variables["beacon"])


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    beacon: BeaconConfig | Adapter | None = None,
    ignore_sliding_window: bool = False,
    place: Place | None = None,
    quiet: bool = False,
    seed: int = 0,
    strip_prefix: str | None = None,
) -> Checkpoint:
    """Reads an HF folder, a converted folder or a GGUF file into memory.

    Args:
      path: a folder with config.json and weights, a name (`resources.asset`), or a GGUF
        file.
      dtype: cast everything to "float32", "bfloat16" or "float16"; None: as stored
        (`gguf.GgufReader` says what that is in a GGUF file).
      beacon: replaces the beacon settings of config.json. Parts that the checkpoint
        does not have start from the base, so a plain model gets fresh beacons. An
        adapter brings its own, in the base's dtype unless `dtype` is given; whose base
        it is, `Adapter.other_base` says.
      ignore_sliding_window: attend to everything although config.json has a window.
      place: says of every tensor on which devices it goes and in which dtype; the
        variables are jax arrays then, and no host ever holds more than one of them.
      quiet: no warning about beacons that start from the base.
      seed: of fresh low-rank beacons.
      strip_prefix: what tensors' names have in front (`conversion.open_weights`).

    Raises:
      ValueError, FileNotFoundError: tensors or a file do not fit; the message names
        them.
    """
    path, cast = Path(asset(path)), check_dtype(dtype)
    if is_adapter(path) and not any(path.glob("model*")):
        raise FileNotFoundError(
            f"path={path} has beacons alone: load the base that they were trained on, "
            "with this folder as beacons (--beacons)."
        )
    manifest = read_manifest(path) if is_converted(path) else {}
    ignore = ignore_sliding_window or manifest.get("ignore_sliding_window", False)
    hf = read_config(path)
    config = model_config(path, ignore_sliding_window=ignore)
    config_keys.warn_unknown(hf)
    opened = functools.partial(open_source, strip_prefix=strip_prefix)
    if isinstance(beacon, BeaconConfig):
        config = dataclasses.replace(config, beacon=beacon)
    stored = config  # what the folder has, beside what it may have
    if isinstance(beacon, Adapter):
        base = opened(config, path, cast, quiet=True)
        config = dataclasses.replace(config, beacon=beacon.beacon)
        kind = cast or base.tensors["params/embed/embedding"].dtype
        source: Source = JoinedSource(base, beacon.source(config, kind))
    else:
        source = opened(config, path, cast, quiet=quiet)
    leaves: dict[str, Any] = {}
    for name, tensor in source.tensors.items():
        if place is None:
            leaves[name] = source.array(name)
        else:
            sharding, kind = place(config, name, tensor.shape)
            leaves[name] = source.put(name, kind or tensor.dtype, sharding)
    source.say()
    hashes = source.hashes(leaves)
    leaves = _with_fresh_beacons(leaves, config, place, seed)
    variables = {"params": {}, "beacon": {}} | unflatten(leaves)
    # Fresh beacons may be in no file.
    whole = stored is config and all(name in source.tensors for name in leaves)
    if not whole or (is_converted(path) and config.beacon and "beacon" not in hashes):
        # Hashed from memory, when somebody asks.
        part = {k: x for k, x in leaves.items() if k.startswith("beacon/")}
        known = {**hashes, "beacon": lambda: tree_hash(unflatten(part)["beacon"])}
    else:
        known = hashes
    identity = folder_identity(
        path,
        stored,
        cast=cast,
        dtypes={name: np.dtype(x.dtype) for name, x in leaves.items()},
        known=known,
        strip_prefix=strip_prefix,
    )
    parts = {beacon_part(name) for name in source.tensors} - {None, *source.from_base}
    untrained = config.beacon is not None and not parts
    return Checkpoint(config, variables, path, hashes, identity, untrained)


def _with_fresh_beacons(
    leaves: dict[str, Any], config: ModelConfig, place: Place | None, seed: int
) -> dict[str, Any]:
    """Adds the beacons that are not there yet, which act as the base does."""
    if all(e.name in leaves for e in table(config)):
        return leaves
    made = init_beacon(unflatten(leaves)["params"], config, seed)
    fresh = flatten(made, "beacon/")
    made = {
        name: x if place is None else _placed(x, config, name, place)
        for name, x in fresh
        if name not in leaves
    }
    return {e.name: (leaves | made)[e.name] for e in table(config)}


def _placed(x: Any, config: ModelConfig, name: str, place: Place) -> Any:
    """Moves an array on the devices to where `place` wants it."""
    sharding, kind = place(config, name, x.shape)
    return jax.jit(lambda x: x.astype(kind or x.dtype), out_shardings=sharding)(x)


def save_hf(
    dst: str | Path,
    config: ModelConfig,
    variables: Mapping[str, Any],
    source: str | Path | None = None,
    *,
    overwrite: bool = False,
    keep: bool = False,
) -> None:
    """Writes a model as an HF folder that the authors' release and `load` read.

    Args:
      dst: the new folder.
      config: written as config.json, incl. the beacon_* fields.
      variables: {"params": ..., "beacon": ...}, numpy or jax arrays in the dtype to be
        saved; they are fetched one layer of one tensor at a time.
      source: a folder or GGUF file whose tokenizer files are copied and whose
        other config.json keys are kept.
      overwrite: a checkpoint that lies there is replaced when the new one is complete.
      keep: other files of that checkpoint stay, as of an earlier export of one run.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    dst, source = Path(dst), Path(source) if source else None
    reader = TreeReader(variables)
    entries = table(config)
    wrong = [
        f"{e.name}: {found.shape if found else 'missing'}, expected {e.shape}"
        for e in entries
        if not (found := reader.tensors.get(e.name)) or found.shape != e.shape
    ]
    if wrong:
        raise ValueError("variables do not fit config:\n  " + "\n  ".join(wrong))
    sizes = {
        key: reader.tensors[e.name].nbytes // len(e.keys)
        for e in entries
        for key in e.keys
    }
    shards = split_state_dict_into_shards_factory(
        {key: sizes[key] for key in sorted(sizes, key=_natural)},
        get_storage_size=lambda nbytes: nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    files = {
        name: (keys, {"format": "pt"})
        for name, keys in shards.filename_to_tensors.items()
    }
    with new_folder(dst, overwrite=overwrite, keep=keep) as folder:
        base = None
        if source is not None:
            copy_small_files(source, folder, card=False)
            base = read_config(source)
        hf = config.to_hf(base)
        key = "dtype" if "dtype" in hf else "torch_dtype"
        hf[key] = reader.tensors["params/embed/embedding"].dtype.name
        if hf != base:  # else config.json stays byte for byte what it was
            write_config(folder, hf)
        write_hf_weights(folder, config, reader, files)
        if len(files) > 1:
            write_index(folder / "model.safetensors.index.json", files)


def _natural(key: str) -> list[Any]:
    """Returns a key that sorts layer 2 before layer 10."""
    return [(part.isdigit(), part.zfill(4)) for part in re.split(r"(\d+)", key)]
