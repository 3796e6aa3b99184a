"""Checks all settings of a run before its data is prepared, which may take hours."""

import dataclasses
from pathlib import Path

from beacon_jax import hf
from beacon_jax.attention.api import IMPLEMENTATIONS
from beacon_jax.core.plan import memory_slots
from beacon_jax.core.train_loss import KINDS
from beacon_jax.core.window_loop import REMAT
from beacon_jax.data.sources import reading
from beacon_jax.data.tokenizer import SMALLEST_VOCABULARY
from beacon_jax.gguf.file import is_gguf
from beacon_jax.hf.conversion import is_converted, model_config, read_manifest
from beacon_jax.hf.relatives import of_folder
from beacon_jax.model.config import ModelConfig
from beacon_jax.names import meant
from beacon_jax.paths import check_folder
from beacon_jax.training.check_data import check_data, check_numbers
from beacon_jax.training.config import Config, lookup
from beacon_jax.training.hardware import peak_flops
from beacon_jax.training.initial import (
    base_folder,
    beacon_config,
    check_beacons_from,
    random_model,
    tokenizer_folder,
)
from beacon_jax.training.inputs import batch_sizes
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.profile import parse_steps
from beacon_jax.training.sharding import make_placement

CHOICES = {
    "trainable": ("beacon", "all"),
    "dtype": ("float32", "bfloat16", "float16"),
    "remat": ("auto", *REMAT),
    "attention": ("", *IMPLEMENTATIONS),
    "loss.kind": KINDS,
    "loss.average": ("token", "row"),
}
# Keys, what has to hold (nan never does), and how a message says it.
LIMITS = (
    (
        ("uniform_plans",),
        lambda x: 0 <= x <= 1,
        "is a share of the steps: use a number from 0 to 1",
    ),
    (
        (
            *("log_every", "save_every", "keep", "accumulate"),
            *("optimizer.max_nonfinite", "loss.attention_queries"),
        ),
        lambda x: x >= 1,
        "must be at least 1",
    ),
    (
        (
            *("window", "memory_slots", "seed"),
            *("loss.label_weight", "loss.attention_weight"),
            *("optimizer.weight_decay", "optimizer.clip", "optimizer.warmup"),
        ),
        lambda x: x >= 0,
        "must not be negative",
    ),
    (
        ("optimizer.lr", "optimizer.adam_lr", "optimizer.eps"),
        lambda x: x > 0,
        "must be more than 0",
    ),
    (("loss.scale",), lambda x: x > 0, "must be greater than 0"),
    (("optimizer.b1", "optimizer.b2"), lambda x: 0 <= x < 1, "must lie in [0, 1)"),
)


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
    _check_numbers(config)
    _check_folders(config)
    model = _model(config)
    check_beacons_from(config, model)
    make_optimizer(config.optimizer, 1)  # checks its name and its schedule
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
        ratios = (max(model.beacon.ratios),)
        beacon = dataclasses.replace(model.beacon, ratios=ratios)
        least = memory_slots(dataclasses.replace(model, beacon=beacon), 2)
        if config.memory_slots < least:
            raise ValueError(
                f"memory_slots={config.memory_slots} does not hold one window at the "
                f"highest ratio, {least} slots: raise it, or set it to 0."
            )
    _check_apart(config.data, Path(workdir))
    _check_workdir(Path(workdir))
    if config.data.prepared and not config.data.stages:
        folder = Path(config.data.prepared).expanduser()
        if not (folder / "manifest.json").exists():  # a finished one may be read-only
            check_folder("data.prepared", folder)


def _check_choices(config: Config) -> None:
    for key, allowed in CHOICES.items():
        value = lookup(config, key)
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
    if config.loss.kind == "distil" and config.trainable != "beacon":
        raise ValueError(
            f"loss.kind='distil' with trainable={config.trainable!r}: the model itself "
            "is the teacher and must not change. Set trainable='beacon', or "
            "loss.kind='labels'."
        )
    if config.loss.label_weight > 0 and config.loss.kind != "distil":
        raise ValueError(
            f"loss.label_weight={config.loss.label_weight} is for loss.kind='distil': "
            "leave it at 0, or set loss.kind='distil'."
        )
    if config.loss.attention_weight > 0:
        _check_attention_loss(config)
    if config.trainable == "all" and config.beacon.use and config.beacon.rank:
        raise ValueError(
            f"beacon.rank={config.beacon.rank} changes a base that stays as it is, and "
            "trainable='all' trains it: set beacon.rank=0 or trainable='beacon'."
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


def _check_attention_loss(config: Config) -> None:
    """Raises ValueError for settings that do not go with loss.attention_weight."""
    said = f"loss.attention_weight={config.loss.attention_weight}"
    if config.trainable != "beacon":
        raise ValueError(
            f"{said} with trainable={config.trainable!r}: the model's own attention is "
            "what beacons are held to and must not change. Set trainable='beacon', or "
            "loss.attention_weight=0."
        )
    if config.mesh.stage > 1:
        raise ValueError(
            f"{said} does not go with mesh.stage={config.mesh.stage}: use "
            "mesh.stage=1, or loss.attention_weight=0."
        )


def _check_numbers(config: Config) -> None:
    for key in ("beacon.ratios", "profile_steps"):
        check_numbers(key, lookup(config, key))
    for keys, holds, rule in LIMITS:
        for key in keys:
            value = lookup(config, key)
            if not holds(value):
                raise ValueError(f"{key}={value} {rule}.")
    size = config.tokenizer.vocab_size
    if config.tokenizer.train and size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"tokenizer.vocab_size={size} must be at least {SMALLEST_VOCABULARY}."
        )
    parse_steps(config.profile_steps)
    peak_flops((), config.peak_tflops)


def _check_folders(config: Config) -> None:
    base = base_folder(config) if config.init_from else None
    if base and not (base.is_file() or (base / "config.json").exists()):
        raise FileNotFoundError(
            f"init_from={config.init_from!r} has no config.json: give the folder that "
            f"holds the model's files. {of_folder(base)}".rstrip()
        )
    if not config.tokenizer.train:
        key = "tokenizer.path" if config.tokenizer.path else "init_from"
        folder = tokenizer_folder(config)
        if not (folder.is_dir() or is_gguf(folder)):
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"{key}={lookup(config, key)!r} {what}: give the folder of a "
                "tokenizer. One of the hub has to be downloaded first."
            )
        if not hf.has_tokenizer(folder):
            raise FileNotFoundError(
                f"{key}={lookup(config, key)!r} has no tokenizer files: copy them from "
                "the base model, or set tokenizer.path."
            )


def _model(config: Config) -> ModelConfig:
    """Makes the config of what will be trained, without reading weights.

    Sizes that a tokenizer decides are guessed.
    """
    try:
        beacon = beacon_config(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.beacon: {error}") from error
    if config.init_from:
        folder = base_folder(config)
        ignore = is_converted(folder) and read_manifest(folder).get(
            "ignore_sliding_window", False
        )
        model = model_config(folder, ignore_sliding_window=ignore)
        return dataclasses.replace(model, beacon=beacon)
    sizes = {}
    if "vocab_size" not in config.model:
        sizes["vocab_size"] = config.tokenizer.vocab_size
    try:
        return random_model(config, beacon=beacon, **sizes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config.model: {error}") from error


def _check_apart(data: Config, workdir: Path) -> None:
    """Raises ValueError if whole rows would be read of what the run writes."""
    files = ("config.json", "metrics.jsonl")
    uri = "" if data.stages else reading(workdir, files, data.sources, data.root)
    if uri:
        raise ValueError(
            f"--workdir={workdir} lies in data.sources={uri!r}, which has what the run "
            "writes among what it reads: use a folder outside of it."
        )


def _check_workdir(workdir: Path) -> None:
    check_folder("--workdir", workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--workdir={workdir} cannot be made ({error.strerror}): use another one."
        ) from error
