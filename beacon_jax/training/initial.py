"""Makes what a run starts from (tokenizer, model) and what it leaves: the export."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax import hf
from beacon_jax.data.tokenizer import ensure_tokenizer
from beacon_jax.hf import hub
from beacon_jax.hf.adapter import Adapter, adapter_for, open_adapter
from beacon_jax.hf.conversion import read_config
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig, RopeConfig
from beacon_jax.model.shapes import param_shapes
from beacon_jax.progress import Progress
from beacon_jax.resources import asset
from beacon_jax.training.config import Config
from beacon_jax.training.processes import is_lead, wait
from beacon_jax.training.sharding import Placement, map_named, put


def base_folder(config: Config) -> Path:
    """Finds the folder or GGUF file of `init_from`, also of the package or the hub.

    Raises:
      FileNotFoundError: as `hf.hub.find`.
    """
    return hub.find(config.init_from, "init_from")


def tokenizer_folder(config: Config) -> Path:
    """Returns where a tokenizer that is not trained lies: its own, or the base's."""
    if config.tokenizer.path:
        return Path(asset(config.tokenizer.path))
    return base_folder(config)


def embedding_rows(config: Config) -> int | None:
    """Counts the rows of the base's embedding, without reading weights.

    Returns:
      None: the model is drawn at random, with a row for each token of its tokenizer, or
      the base is not on this machine and not needed, because tokenizer.path is given.
    """
    if not config.init_from:
        return None
    if config.tokenizer.path and not Path(asset(config.init_from)).exists():
        return None
    folder = base_folder(config)
    if folder.is_dir() and not (folder / "config.json").exists():
        return None  # a folder of tokenizer files is enough to prepare
    size = read_config(folder).get("vocab_size")
    return size if isinstance(size, int) else None


def make_tokenizer(
    config: Config, documents: Callable[[], Sequence[str]], workdir: Path
) -> tuple[Any, Path]:
    """Returns the tokenizer and its folder.

    With config.tokenizer.train it is trained on the documents, once per workdir.
    """
    if not config.tokenizer.train:
        folder = tokenizer_folder(config)
    else:
        folder = workdir / "tokenizer"
        if is_lead():
            folder = ensure_tokenizer(config, documents, workdir)
        wait("tokenizer")
    return hf.load_tokenizer(folder), folder


def beacon_config(config: Config, **changes: Any) -> BeaconConfig | None:
    """Returns the beacons of config.beacon with `changes`; None: a plain decoder."""
    settings = {**config.beacon.to_dict(), **changes}
    return BeaconConfig(**settings) if settings.pop("use") else None


def random_model(config: Config, **fields: Any) -> ModelConfig:
    """Returns the model of config.model, and of fields that are decided elsewhere."""
    given = config.model.to_dict()
    rope = RopeConfig(**given.pop("rope", {}))
    return ModelConfig(**given, rope=rope, **fields)


def check_beacons_from(config: Config, model: ModelConfig) -> None:
    """Checks, without reading weights, that the beacons of beacons_from can start here.

    Raises:
      ValueError: their parameters are others, or there is no base to start on.
      FileNotFoundError: there is no such adapter folder.
    """
    if not config.beacons_from:
        return
    given = f"beacons_from={config.beacons_from}"
    if not (config.init_from and config.beacon.use):
        raise ValueError(
            f"{given} with init_from={config.init_from!r} and beacon.use="
            f"{config.beacon.use}: name the base of these beacons, and set "
            "beacon.use=True."
        )
    theirs = open_adapter(hub.find(config.beacons_from, "beacons_from"), "beacons_from")
    for key in ("rank", "param", "anchor"):  # decide shapes, and what they change
        there, here = getattr(theirs.beacon, key), getattr(model.beacon, key)
        if there != here:
            raise ValueError(
                f"{given} has {key}={there}, beacon.{key} is {here}: set beacon.{key} "
                "to theirs, or leave beacons_from empty."
            )


def _starting_beacons(config: Config) -> BeaconConfig | Adapter | None:
    """Returns the settings of fresh beacons, or the adapter that they start from.

    Raises:
      ValueError: the adapter belongs to another base.
    """
    beacon = beacon_config(config)
    if beacon is None or not config.beacons_from:
        return beacon
    folder = hub.find(config.beacons_from, "beacons_from")
    found, differs = adapter_for(folder, base_folder(config), "beacons_from")
    if differs:
        raise ValueError(f"{differs}: set init_from to the base of these beacons.")
    return found.with_settings(beacon)


def trained_trees(config: Config) -> tuple[str, ...]:
    """Names the parts of the variables that are trained."""
    return ("beacon",) if config.trainable == "beacon" else ("params", "beacon")


def make_model(
    config: Config, tokenizer: Any, placement: Placement, *, quiet: bool = False
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """Makes the model of a run, read from `init_from` or drawn at random.

    Args:
      tokenizer: decides the vocabulary and special tokens of a random model.
      placement: says where each array lies.
      quiet: no warning about beacons that start from the base.

    Returns:
      (model, trained, frozen): float32 masters of what is trained, and the rest in the
      computing dtype.
    """
    beacon, names = beacon_config(config), trained_trees(config)

    def place(model: ModelConfig, name: str, shape: tuple[int, ...]):
        own = name.split("/")[0] in names
        dtype = np.dtype(np.float32) if own else jnp.dtype(config.dtype)
        return placement.variable(model, name, shape, trained=own), dtype

    if config.init_from:
        checkpoint = hf.load(
            base_folder(config),
            beacon=_starting_beacons(config),
            place=place,
            quiet=quiet,
            seed=config.seed,
        )
        model, variables = checkpoint.config, checkpoint.variables
        if beacon is None:
            model = dataclasses.replace(model, beacon=None)
            variables["beacon"] = {}
    else:
        bos = tokenizer.bos_token_id
        model = random_model(
            config,
            vocab_size=len(tokenizer),
            bos_ids=(bos,) if bos is not None else (),
            eos_ids=(tokenizer.eos_token_id,),
            beacon=beacon,
        )

        def put_leaf(name: str, x: np.ndarray) -> jax.Array:
            sharding, dtype = place(model, name, x.shape)
            return put(x.astype(dtype), sharding)

        variables = map_named(put_leaf, random_variables(model, config.seed))
    frozen = {name: tree for name, tree in variables.items() if name not in names}
    return model, {name: variables[name] for name in names}, frozen


def random_variables(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Draws random float32 parameters [numpy].

    Weights are normal with 1/sqrt(fan in), norms are one. Projections that write into
    the residual stream are smaller by sqrt(2L), lm_head by 2 (a nearly uniform first
    prediction). Embeddings have 0.02, as in GPT-2. Beacons start from the base, as they
    do on a pretrained one.
    """
    rng = np.random.default_rng(seed)
    residual = math.sqrt(2 * model.num_layers)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        *_, module, kind = name.split("/")
        if kind == "scale":
            return np.ones(shape, np.float32)
        if kind == "bias":
            return np.zeros(shape, np.float32)
        if module == "embed":
            scale = 0.02
        elif module == "lm_head":
            scale = 0.5 / math.sqrt(model.hidden_size)
        elif module == "o_proj":
            scale = 1 / math.sqrt(model.num_heads * model.head_dim) / residual
        elif module == "down_proj":
            scale = 1 / math.sqrt(model.intermediate_size) / residual
        else:
            scale = 1 / math.sqrt(model.hidden_size)
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    is_shape = lambda x: isinstance(x, tuple)
    params = map_named(draw, param_shapes(model)["params"], is_shape)
    beacon = init_beacon(params, model, seed) if model.beacon else {}
    return {"params": params, "beacon": beacon}


def export(
    folder: Path,
    config: Config,
    model: ModelConfig,
    variables: dict[str, Any],
    tokenizer_folder: Path,
    *,
    overwrite: bool,
    keep: bool = False,
) -> None:
    """Writes an HF folder: tokenizer, config.json, weights and beacon keys.

    A frozen base is read again from `init_from`, so that it is exported in the bytes in
    which it was stored, whatever dtype the run computed in; what was trained is stored
    in that dtype too.

    Args:
      variables: arrays on the host, "beacon" and, if they were trained, "params".
      overwrite, keep: as `hf.save_hf`, for a folder that exists.
    """
    variables, source = dict(variables), None
    with Progress().stage("exporting"):  # writing has a stage of its own
        if config.init_from:
            source = base_folder(config)
            stored = hf.load(source).variables["params"]
            variables.setdefault("params", stored)
            dtype = stored["embed"]["embedding"].dtype
            del stored
        else:
            dtype = np.dtype(np.float32)
        variables = jax.tree.map(lambda x: np.asarray(x, dtype), variables)
    hf.save_hf(folder, model, variables, source, overwrite=overwrite, keep=keep)
    if tokenizer_folder != source:
        hf.copy_tokenizer(tokenizer_folder, folder)
