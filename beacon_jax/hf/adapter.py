"""Adapter folders: beacons without the base that they were trained on.

An adapter folder has `beacons.safetensors`, with the names of `keys.table`, and the
config.json of the whole model, in which `beacon_base` has two hashes of the base: of
its values as float32, which any format and dtype with these values has, and of the base
as it was stored, which a converted folder knows without being read.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beacon_jax.hf.conversion import (
    HfSource,
    Source,
    check_dtype,
    is_converted,
    model_config,
    open_source,
    read_config,
    read_manifest,
    write_config,
    write_hf_weights,
)
from beacon_jax.hf.hub import ADAPTER as WEIGHTS
from beacon_jax.hf.identify import base_values_hash, identity
from beacon_jax.hf.keys import table, unflatten
from beacon_jax.hf.reader import SafetensorsReader, TreeReader
from beacon_jax.hf.relatives import PEFT, peft
from beacon_jax.hf.writer import new_folder
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.shapes import param_shapes

BASE, _HASHES = "beacon_base", {"values", "stored"}  # key of config.json, and its keys
# What beacons do not depend on: their token's embedding is a parameter of their own.
_FREE = ("beacon", "bos_ids", "eos_ids")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The beacons in an adapter folder.

    Attributes:
      path: the folder.
      config: the model that they were trained in.
      values: `base_values_hash` of its base.
      stored: hash of the base as it was stored, as in a converted folder's manifest.
    """

    path: Path
    config: ModelConfig
    values: str
    stored: str

    @property
    def beacon(self) -> BeaconConfig:
        """The settings of the beacons."""
        assert self.config.beacon is not None
        return self.config.beacon

    def with_settings(self, beacon: BeaconConfig) -> "Adapter":
        """Returns the same beacons with other settings, as other ratios."""
        config = dataclasses.replace(self.config, beacon=beacon)
        return dataclasses.replace(self, config=config)

    def other_base(
        self, folder: Path, config: ModelConfig, strip_prefix: str | None = None
    ) -> str:
        """Says what a base has that is not the one of the beacons; "" if it is.

        The same values are the same base, whatever format and dtype they are in.

        Args:
          folder: with the base's weights, an HF or a converted one; all are read,
            unless it is converted and has the same dtypes.
          config: the base's.
          strip_prefix: as it is loaded with.

        Raises:
          ValueError: its parameters have other shapes.
        """
        mine, theirs = (
            {n: x for n, x in vars(c).items() if n not in _FREE}
            for c in (self.config, config)
        )
        changes = ", ".join(
            f"{name}={mine[name]} there, {theirs[name]} here"
            for name in mine
            if mine[name] != theirs[name]
        )
        shapes = [param_shapes(c)["params"] for c in (self.config, config)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"beacons={self.path} belong to a base of other shapes than {folder} "
                f"({changes}): load the base that they were trained on."
            )
        if changes:
            return changes
        if is_converted(folder) and read_manifest(folder)["base_hash"] == self.stored:
            return ""
        here, there = base_values_hash(folder, strip_prefix), self.values
        return "" if here == there else f"hash {there[:16]} there, {here[:16]} here"

    def source(self, config: ModelConfig, dtype: np.dtype | None) -> Source:
        """Opens the tensors, to be cast to `dtype` and to fit `config`."""
        reader = SafetensorsReader([self.path / WEIGHTS], self.path)
        try:
            return HfSource(config, reader, dtype, only="beacon/", where=self.path)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder holds beacons alone."""
    return (folder / WEIGHTS).is_file()


def open_adapter(folder: Path, name: str = "beacons") -> Adapter:
    """Opens an adapter folder; nothing is read but config.json.

    Args:
      name: of the argument, for messages.

    Raises:
      ValueError, FileNotFoundError: it is none, or a file is missing or wrong.
    """
    if not is_adapter(folder):
        raise FileNotFoundError(
            f"{name}={folder} has no {WEIGHTS}: give a folder of beacons alone, the "
            "`adapter` of a training run, or what `convert to-hf --adapter` wrote. "
            f"{peft(folder) if (folder / PEFT).is_file() else ''}".rstrip()
        )
    hf = read_config(folder)
    config = model_config(folder, ignore_sliding_window=True)
    base = hf.get(BASE)
    if (
        config.beacon is None
        or not isinstance(base, dict)
        or set(base) != _HASHES
        or not all(isinstance(x, str) for x in base.values())
    ):
        raise ValueError(
            f"{name}={folder} has a config.json without beacon_* fields or without "
            f"{BASE}: write the folder again (convert to-hf --adapter)."
        )
    return Adapter(folder, config, **base)


def adapter_for(
    folder: Path,
    base: Path,
    name: str = "beacons",
    *,
    strip_prefix: str | None = None,
) -> tuple[Adapter, str]:
    """Opens beacons for the base in `base`; says why they are not its own, or "".

    Args:
      name: of the argument, for messages.
      strip_prefix: as the base is loaded with.

    Raises:
      ValueError, FileNotFoundError: as `open_adapter` and `Adapter.other_base`.
    """
    found = open_adapter(folder, name)
    config = model_config(base, ignore_sliding_window=True)
    differs = found.other_base(base, config, strip_prefix)
    if differs:
        differs = (
            f"{name}={found.path} were trained on another base than {base} ({differs})"
        )
    return found, differs


def write_adapter(
    src: Path,
    dst: Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    keep: bool = False,
) -> None:
    """Writes the beacons of a model alone.

    Args:
      src: the model, an HF or a converted folder.
      dst: the new adapter folder.
      dtype: "float32", "bfloat16" or "float16"; None: as stored.
      overwrite, keep: as `save_hf`, for a folder that exists.

    Raises:
      ValueError: the model has no beacons, or only copies of the base.
      FileExistsError: `dst` is not empty.
    """
    hf = read_config(src)
    config = model_config(src, ignore_sliding_window=True)
    source = open_source(config, src, check_dtype(dtype), quiet=True)
    entries = [e for e in table(config) if e.name.startswith("beacon/")]
    if not entries or source.from_base:
        raise ValueError(
            f"--src={src} has no trained beacons: train some, or name another folder."
        )
    leaves = {e.name: source.array(e.name) for e in entries}
    source.say()
    keys = [key for e in entries for key in e.keys]
    with new_folder(dst, overwrite=overwrite, keep=keep) as folder:
        files = {WEIGHTS: (keys, {"format": "pt"})}
        write_hf_weights(folder, config, TreeReader(unflatten(leaves)), files)
        base = {"values": base_values_hash(src), "stored": identity(src).base}
        write_config(folder, config.to_hf(hf) | {BASE: base})


class JoinedSource(Source):
    """A base from one folder and beacons from another."""

    def __init__(self, base: Source, beacons: Source):
        self._parts = {"params": base, "beacon": beacons}
        self.from_base = []
        self.tensors = {
            name: tensor
            for part, source in self._parts.items()
            for name, tensor in source.tensors.items()
            if name.startswith(f"{part}/")
        }

    def _of(self, name: str) -> Source:
        return self._parts[name.split("/")[0]]

    def blocks(self, name: str) -> Iterator[Any]:
        return self._of(name).blocks(name)

    def array(self, name: str) -> np.ndarray:
        return self._of(name).array(name)

    def put(self, name: str, dtype: Any, sharding: Any) -> jax.Array:
        return self._of(name).put(name, dtype, sharding)

    def say(self) -> None:
        for source in self._parts.values():
            source.say()

    def hashes(self, leaves: Mapping[str, Any]) -> dict[str, str]:
        base = {k: x for k, x in leaves.items() if k.startswith("params/")}
        known = self._parts["params"].hashes(base)
        return {part: known[part] for part in known if part == "base"}


def materialised(
    config: ModelConfig, variables: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Any]]:
    """Makes projections of the beacons' own, W + A B, of low-rank ones.

    Args:
      variables: {"params": tree, "beacon": tree}, numpy or jax arrays.

    Returns:
      The config with rank 0, and its variables: new projections are float32 [numpy],
      biases and the embedding row as they were.
    """
    assert config.beacon is not None
    base = variables["params"]["layers"]["attention"]
    own: dict[str, Any] = {}
    for name, low in variables["beacon"]["layers"]["attention"].items():
        kernel = base[name]["kernel"]
        made = np.empty(kernel.shape, np.float32)
        for i in range(config.num_layers):
            a, b = (np.asarray(low[x][i], np.float32) for x in ("lora_a", "lora_b"))
            change = a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1)
            made[i] = np.asarray(kernel[i], np.float32) + change.reshape(made[i].shape)
        own[name] = {**base[name], "kernel": made}
    beacon = {**variables["beacon"], "layers": {"attention": own}}
    settings = dataclasses.replace(config.beacon, rank=0)
    return (
        dataclasses.replace(config, beacon=settings),
        {"params": variables["params"], "beacon": beacon},
    )
