"""Loads a model with its tokenizer, from here, from the package or from the hub."""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from beacon_jax import resources, runtime
from beacon_jax.hf import checkpoint, hub, relatives
from beacon_jax.hf.adapter import adapter_for
from beacon_jax.hf.placement import Place
from beacon_jax.inference import validate
from beacon_jax.inference.ends import end_ids, of_generation
from beacon_jax.inference.model import Model
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import variable_axes
from beacon_jax.model.partition import Partition, make_partition
from beacon_jax.names import hinted
from beacon_jax.paths import is_there

_DEVICE = (
    "jax chooses the device (set JAX_PLATFORMS=cpu before Python starts), and "
    "mesh='tensor:2' splits the model over several."
)
_ELSEWHERE = {
    "device": _DEVICE,
    "device_map": _DEVICE,
    "platform": _DEVICE,
    "backend": _DEVICE,
    "folder": "path",
    "model": "path",
    "name": "path",
    "torch_dtype": "dtype",
    "precision": "dtype",
    "config": "beacon",
    "sharding": "mesh",
}


@hinted("load", _ELSEWHERE)
def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    beacon: BeaconConfig | None = None,
    ignore_sliding_window: bool = False,
    mesh: str | Mesh | None = None,
    beacons: str | Path | None = None,
    allow_other_base: bool = False,
    strip_prefix: str | None = None,
) -> Model:
    """Loads a model, with its tokenizer, from a folder or a GGUF file.

    Args:
      path: a folder with config.json, weights and tokenizer files, of Hugging Face or
        converted; a GGUF file of a llama, mistral, qwen2 or qwen3 model; "tiny-beacon",
        which comes with the package; or the id of a model on the hub, "org/name", which
        is downloaded into the cache of huggingface_hub.
      dtype: "float32", "bfloat16" or "float16"; None: as stored, and float32 if a GGUF
        file has quantised tensors.
      beacon: other beacon settings; a plain model gets untrained beacons.
      ignore_sliding_window: attend to everything although config.json has a window.
      mesh: devices to split over, "tensor:8" (attention heads, MLP and vocabulary) or
        "data:2,tensor:4" (rows of a batch too) or "stage:8" (layers: windows of a long
        text go through them in a pipeline), or a `jax.sharding.Mesh` with these axes;
        None: the default device.
      beacons: an adapter folder, beacons without a base (or its id on the hub), in
        place of the beacons that `path` may have. The base has to be the one they were
        trained on, value by value, in any format and dtype.
      allow_other_base: take beacons of another base of the same shapes.
      strip_prefix: what tensors' names have in front in place of none, "module." for
        example, as wrappers of PyTorch save them; "" if they lack `model.`.

    Raises:
      TypeError: an argument of another type, or one that does not exist.
      ValueError, FileNotFoundError: what is missing or does not fit, by name.

    Warns:
      UserWarning: the model's beacons are untrained, or those of another base.
    """
    _check(path, dtype, beacon)
    validate.switch("ignore_sliding_window", ignore_sliding_window)
    validate.switch("allow_other_base", allow_other_base)
    if beacons is not None:
        remedy = "give an adapter folder, as the `adapter` of a training run"
        validate.is_a("beacons", beacons, str | os.PathLike, remedy)
    if strip_prefix is not None:
        remedy = "give what tensors' names begin with, as 'module.'"
        validate.is_a("strip_prefix", strip_prefix, str, remedy)
    path = hub.find(path)
    if not (path.is_file() or is_there(path / "config.json")):
        remedy = relatives.of_folder(path) or "Give one with config.json and weights."
        raise FileNotFoundError(
            f"path={path} is not a model folder: it has no config.json. {remedy}"
        )
    checkpoint.check_dtype(dtype)
    ended = of_generation(path)  # before the weights are read
    runtime.prepare()
    chosen = beacon
    if beacons is not None:
        found, differs = adapter_for(
            hub.find(beacons, "beacons"), path, strip_prefix=strip_prefix
        )
        _check_base(differs, allow_other_base)
        chosen = found if beacon is None else found.with_settings(beacon)
    partition = make_partition(mesh) if mesh is not None else None
    place = None if partition is None else placed_on(partition)
    # Importing transformers takes 1 to 2 s: meanwhile the weights are read.
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(_tokenizer, path)
        found = checkpoint.load(
            path,
            dtype=dtype,
            beacon=chosen,
            ignore_sliding_window=ignore_sliding_window,
            place=place,
            strip_prefix=strip_prefix,
        )
        tokenizer = reading.result()
    if found.untrained:
        said = f"the beacons of {path} are untrained, copies of the base model: text "
        said += "that is compressed is not understood. Train them (python -m "
        said += "beacon_jax.train), or keep everything with "
        validate.warn(f"{said}ratio=0.", f"{said}--ratio=full.")
    # A CPU device takes these arrays over as they are: half the memory, half the time.
    # Those of a mesh lie where they belong, and not all of them here.
    variables = found.variables
    if partition is None:
        variables = jax.device_put(variables)
    ends = end_ids(found.config, ended, tokenizer)
    config = dataclasses.replace(found.config, eos_ids=ends)
    return Model(config, variables, tokenizer, found.identity, partition, path)


def _check_base(differs: str, allow: bool) -> None:
    """Raises ValueError if beacons have another base, unless that is allowed.

    Args:
      differs: how it is another one; "" if it is not.
    """
    if not differs:
        return
    if not allow:
        raise ValueError(
            f"{differs}: load that base, or pass allow_other_base=True "
            "(--allow_other_base) to try them on this one."
        )
    validate.warn(f"{differs}: what they compress may not be understood.")


def _check(path: Any, dtype: Any, beacon: Any) -> None:
    """Raises TypeError for an argument of another type."""
    remedy = 'give a folder, "tiny-beacon", or the id of a model on the hub, org/name'
    if isinstance(path, Model):
        remedy = "it is a model already, use it as it is"
    validate.is_a("path", path, str | os.PathLike, remedy)
    if dtype is not None:
        remedy = "give 'float32', 'bfloat16' or 'float16'"
        validate.is_a("dtype", dtype, str, remedy)
    if beacon is not None:
        remedy = "give BeaconConfig(window=1024, ratios=(2, 4, 8))"
        validate.is_a("beacon", beacon, BeaconConfig, remedy)


def _tokenizer(path: Path) -> Any:
    """Loads the tokenizer of a folder, or None if it has none."""
    try:
        return resources.load_tokenizer(path)
    except FileNotFoundError:
        return None


def placed_on(partition: Partition) -> Place:
    """Makes the function that places tensors by logical axes, for `checkpoint.load`."""

    def place(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Any:
        axes: Any = variable_axes(config)
        for key in name.split("/"):
            axes = axes[key]
        return partition.sharding(axes, shape, name), None

    return place
