"""Checks all settings of a run before its data is prepared, which may take hours."""

import dataclasses
from pathlib import Path
from typing import Any

from beacon_jax import hf
from beacon_jax.attention.api import IMPLEMENTATIONS
from beacon_jax.core.lean_vjp import REMAT
from beacon_jax.core.plan import memory_slots
from beacon_jax.data.tokenizer import SMALLEST_VOCABULARY
from beacon_jax.hf.conversion import is_converted, read_config, read_manifest
from beacon_jax.model.config import BeaconConfig, ModelConfig, RopeConfig
from beacon_jax.names import meant
from beacon_jax.paths import check_folder
from beacon_jax.training.check_data import check_data, check_numbers
from beacon_jax.training.config import Config
from beacon_jax.training.hardware import peak_flops
from beacon_jax.training.initial import base_folder, tokenizer_folder
from beacon_jax.training.inputs import batch_sizes
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.profile import parse_steps
from beacon_jax.training.sharding import make_placement

DTYPES = ("float32", "bfloat16", "float16")


def check_settings(config: Config, workdir: str | Path) -> None:
    """Raises the error of the first setting that cannot work.

    Nothing is read but the config.json of `init_from`, and nothing is written but
    `workdir`, which is made.

    Raises:
      ValueError: a setting; names its key, its value and the remedy.
      FileNotFoundError: a folder that is not there.
      OSError: `workdir` cannot be written.
    """
    _check_choices(config)
    check_numbers("beacon.ratios", config.beacon.ratios)
    check_numbers("profile_steps", config.profile_steps)
    _check_numbers(config)
    _check_folders(config)
    model = _model(config)
    _check_optimizer(config.optimizer)
    parse_steps(config.profile_steps)
    peak_flops((), config.peak_tflops)
    check_data(config)
    sizes = batch_sizes(config)
    for name, rows in sizes.items():
        if rows % config.accumulate:
            raise ValueError(
                f"accumulate={config.accumulate} does not divide {name}.batch_size="
                f"{rows}: make it a multiple."
            )
    rows = [rows // config.accumulate for rows in sizes.values()]
    make_placement(config.mesh, config.rules, rows)
    if model.beacon and config.memory_slots:
        least = memory_slots(_highest_ratio(model), 2)
        if config.memory_slots < least:
            raise ValueError(
                f"memory_slots={config.memory_slots} does not hold one window at the "
                f"highest ratio, {least} slots: raise it, or set it to 0."
            )
    _check_workdir(Path(workdir))
    if config.data.prepared and not config.data.stages:
        folder = Path(config.data.prepared).expanduser()
        if not (folder / "manifest.json").exists():  # a finished one may be read-only
            check_folder("data.prepared", folder)


def _check_choices(config: Config) -> None:
    choices = {
        "trainable": ("beacon", "all"),
        "dtype": DTYPES,
        "remat": ("auto", *REMAT),
        "attention": ("", *IMPLEMENTATIONS),
        "loss.average": ("token", "row"),
    }
    for key, allowed in choices.items():
        value = _get(config, key)
        if value not in allowed:
            names = [repr(name) for name in allowed]
            raise ValueError(
                f"{key}={value!r} is unknown: {meant(value, allowed)}use "
                f"{' or '.join(names)}."
            )
    if config.trainable == "beacon" and not config.beacon.use:
        raise ValueError(
            "trainable='beacon' with beacon.use=False leaves nothing to train: set "
            "trainable='all' or beacon.use=True."
        )
    if not config.init_from and not config.model:
        raise ValueError(
            "init_from='' and an empty `model`: name a checkpoint in init_from, or "
            "give the fields of ModelConfig in `model`."
        )
    if not (config.init_from or config.tokenizer.path or config.tokenizer.train):
        raise ValueError(
            "init_from='' has no tokenizer: set tokenizer.path or tokenizer.train."
        )


def _check_numbers(config: Config) -> None:
    if not 0.0 <= config.uniform_plans <= 1.0:
        raise ValueError(
            f"uniform_plans={config.uniform_plans} is a share of the steps: use a "
            "number from 0 to 1."
        )
    for key in ("log_every", "save_every", "keep", "accumulate"):
        if config[key] < 1:
            raise ValueError(f"{key}={config[key]} must be at least 1.")
    for key in ("window", "memory_slots", "seed"):
        if config[key] < 0:
            raise ValueError(f"{key}={config[key]} must not be negative.")
    if config.loss.scale <= 0:
        raise ValueError(f"loss.scale={config.loss.scale} must be greater than 0.")
    size = config.tokenizer.vocab_size
    if config.tokenizer.train and size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"tokenizer.vocab_size={size} must be at least {SMALLEST_VOCABULARY}."
        )


def _check_optimizer(optimizer: Config) -> None:
    for key in ("lr", "adam_lr", "eps"):
        if not optimizer[key] > 0:
            raise ValueError(f"optimizer.{key}={optimizer[key]} must be more than 0.")
    for key in ("b1", "b2"):
        if not 0 <= optimizer[key] < 1:
            raise ValueError(f"optimizer.{key}={optimizer[key]} must lie in [0, 1).")
    for key in ("weight_decay", "clip", "warmup"):
        if not optimizer[key] >= 0:
            raise ValueError(f"optimizer.{key}={optimizer[key]} must not be negative.")
    if optimizer.max_nonfinite < 1:
        raise ValueError(
            f"optimizer.max_nonfinite={optimizer.max_nonfinite} must be at least 1."
        )
    make_optimizer(optimizer, 1)  # checks its name and its schedule


def _check_folders(config: Config) -> None:
    if config.init_from and not (base_folder(config) / "config.json").exists():
        raise FileNotFoundError(
            f"init_from={config.init_from!r} has no config.json: give the folder that "
            "holds the model's files."
        )
    if not config.tokenizer.train:
        key = "tokenizer.path" if config.tokenizer.path else "init_from"
        folder = tokenizer_folder(config)
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"{key}={_get(config, key)!r} {what}: give the folder of a tokenizer. "
                "One of the hub has to be downloaded first."
            )
        if not hf.has_tokenizer(folder):
            raise FileNotFoundError(
                f"{key}={_get(config, key)!r} has no tokenizer files: copy them from "
                "the base model, or set tokenizer.path."
            )


def _model(config: Config) -> ModelConfig:
    """Makes the config of what will be trained, without reading weights.

    Sizes that a tokenizer decides are guessed.
    """
    beacon = None
    settings = config.beacon.to_dict()
    if settings.pop("use"):
        try:
            beacon = BeaconConfig(**settings)
        except (ValueError, TypeError) as error:
            raise ValueError(f"config.beacon: {error}") from error
    if config.init_from:
        folder = base_folder(config)
        ignore = is_converted(folder) and read_manifest(folder).get(
            "ignore_sliding_window", False
        )
        model = ModelConfig.from_hf(read_config(folder), ignore_sliding_window=ignore)
        return dataclasses.replace(model, beacon=beacon)
    fields = config.model.to_dict()
    try:
        rope = RopeConfig(**fields.pop("rope", {}))
        vocab = fields.pop("vocab_size", config.tokenizer.vocab_size)
        return ModelConfig(**fields, vocab_size=vocab, rope=rope, beacon=beacon)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.model: {error}") from error


def _highest_ratio(model: ModelConfig) -> ModelConfig:
    assert model.beacon is not None
    ratios = (max(model.beacon.ratios),)
    return dataclasses.replace(
        model, beacon=dataclasses.replace(model.beacon, ratios=ratios)
    )


def _check_workdir(workdir: Path) -> None:
    check_folder("--workdir", workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--workdir={workdir} cannot be made ({error.strerror}): use another one."
        ) from error


def _get(config: Config, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config
