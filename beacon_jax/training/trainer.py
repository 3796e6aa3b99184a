"""One training run: beacons on a frozen base, or all parameters of a small model.

Read `train` from top to bottom. A step is a pure function of the state, of the config
and of its own number (data and ratios are drawn from the seed and the step), so state
and number are all that a checkpoint needs for a bit-identical continuation.
"""

import dataclasses
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from beacon_jax import hf
from beacon_jax.core.train_loss import train_loss
from beacon_jax.core.windows import draw_ratios, split_windows
from beacon_jax.data.batches import BatchConfig, Batches, Stage
from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import encode_stream, train_tokenizer
from beacon_jax.model.config import BeaconConfig, ModelConfig, RopeConfig, param_shapes
from beacon_jax.training.checkpoint import Checkpoints
from beacon_jax.training.config import Config
from beacon_jax.training.metrics import Metrics
from beacon_jax.training.optim import learning_rate, make_optimizer, skipped
from beacon_jax.training.sharding import data_parallel, make_mesh, replicate

DTYPES = ("float32", "bfloat16")


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains, resuming from `workdir` if it holds checkpoints; writes `workdir/export`.

    Args:
      config: a `training.config.default_config` that an experiment filled in.
      workdir: receives checkpoints/, config.json, metrics.jsonl, tensorboard/,
        summary.json and export/, an HF folder with tokenizer and beacons.

    Returns:
      What summary.json holds: steps, seconds, last metrics, base hashes.

    Raises:
      ValueError, FileNotFoundError: a setting, text or model that does not work.
      FloatingPointError: too many updates in a row were not finite.
      SystemExit: SIGTERM or SIGINT arrived; the state is saved.
    """
    _check(config)
    began, workdir = time.perf_counter(), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    documents = load_documents(config.text.uri, "train", config.text.heldout_fraction)
    tokenizer, tokenizer_folder = _tokenizer(config, documents, workdir)
    batches = Batches(
        encode_stream(documents, tokenizer), tokenizer, _batch_config(config)
    )
    steps = batches.config.steps
    mesh = make_mesh(
        config.mesh.data, [stage.batch_size for stage in batches.config.stages]
    )
    model, variables = _model(config, tokenizer)
    trained, frozen = _split(config, variables)
    del variables
    base_hash = hf.tree_hash(frozen["params"]) if frozen else None

    optimizer = make_optimizer(config.optimizer, steps)
    state = {
        "trained": trained,
        "optimizer": optimizer.init(trained),
        "step": jnp.zeros((), jnp.int32),
    }
    state, frozen = replicate((state, frozen), mesh)
    record = {"config": config.to_dict(), "base_hash": base_hash}
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
    restored = checkpoints.restore(state, record, config.allow_config_change)
    if restored is not None:
        state = restored
    start = int(state["step"])
    text = json.dumps(record["config"], indent=2) + "\n"
    (workdir / "config.json").write_text(text, encoding="utf-8")
    _announce(config, model, state["trained"], frozen, batches, start, mesh)

    update = _make_update(config, model, optimizer, mesh)
    share = learning_rate(config.optimizer, steps)
    metrics = Metrics(workdir, start, steps)
    last: dict[str, float] = {}
    with _Signals() as signals:
        for step in range(start, steps):
            batch, plans, tokens = _inputs(config, model, batches, step, mesh.size)
            state, values = update(state, frozen, batch, plans)
            metrics.add(plans, tokens, values)
            done = step + 1
            stop = done == steps or signals.received is not None
            if metrics.pending >= config.log_every or stop:
                in_a_row, total = skipped(state["optimizer"])
                rate = config.optimizer.lr * float(jnp.asarray(share(step)))
                last = metrics.report(done, {"lr": rate, "skipped": total})
                if in_a_row >= config.optimizer.max_nonfinite:
                    raise FloatingPointError(
                        f"the last {in_a_row} updates up to step {done} were not "
                        f"finite and skipped (optimizer.max_nonfinite="
                        f"{config.optimizer.max_nonfinite}): lower optimizer.lr="
                        f"{config.optimizer.lr}, or use dtype='float32'."
                    )
            if done % config.save_every == 0 or stop:
                checkpoints.save(done, state, record)
            if signals.received is not None and done < steps:
                metrics.close()
                checkpoints.close()
                print(
                    f"{signals.received.name}: step {done} is saved; the same command "
                    "goes on from there.",
                    flush=True,
                )
                raise SystemExit(128 + signals.received)
    metrics.close()
    checkpoints.close()

    base_hash_after = hf.tree_hash(frozen["params"]) if frozen else None
    if base_hash_after != base_hash:
        raise RuntimeError(
            f"the frozen base changed while training: hash {base_hash} before, "
            f"{base_hash_after} after. This is a fault of the program."
        )
    export(workdir / "export", config, model, state["trained"], tokenizer_folder)
    summary = {
        "steps": steps,
        "steps_of_this_process": steps - start,
        "seconds": time.perf_counter() - began,
        "base_hash_before": base_hash,
        "base_hash_after": base_hash_after,
        "trained_parameters": _count(state["trained"]),
        "last": last,
    }
    text = json.dumps(summary, indent=2) + "\n"
    (workdir / "summary.json").write_text(text, encoding="utf-8")
    print(f"wrote {workdir / 'export'}", flush=True)
    return summary


def _make_update(
    config: Config,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
):
    """The jitted step: (state, frozen, batch, plans) -> (state, values); state is
    donated."""
    dtype = jnp.dtype(config.dtype)

    def loss(trained, frozen, batch, plan):
        variables = {
            **frozen,
            **jax.tree.map(lambda x: x.astype(dtype), trained),
        }
        return train_loss(
            model,
            variables["beacon"],
            variables["params"],
            batch,
            plan,
            skip_first_window_loss=config.loss.skip_first_window,
            loss_average=config.loss.average,
            remat=config.remat,
            dtype=dtype.type,
        )

    value_and_grad = data_parallel(
        jax.value_and_grad(loss, has_aux=True), mesh, config.loss.average
    )

    def update(state, frozen, batch, plans):
        (value, aux), gradients = value_and_grad(state["trained"], frozen, batch, plans)
        updates, optimizer_state = optimizer.update(
            gradients, state["optimizer"], state["trained"]
        )
        new = {
            "trained": optax.apply_updates(state["trained"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
        }
        values = {"loss": value, "grad_norm": optax.tree.norm(gradients), **aux}
        return new, values

    return jax.jit(update, donate_argnums=0)


def _inputs(
    config: Config, model: ModelConfig, batches: Batches, step: int, devices: int
) -> tuple[dict[str, np.ndarray], np.ndarray, int]:
    """Windows of a step's batch [N, B, W], a plan per device [N, devices], and the
    number of tokens."""
    raw = batches.batch(step)
    length = raw["tokens"].shape[1]
    window = model.beacon.window if model.beacon else (config.window or length)
    tokens, valid = split_windows(raw["tokens"], None, window)
    labels, _ = split_windows(raw["labels"], None, window, fill=-100)
    weights, _ = split_windows(raw["weights"], None, window)
    if model.beacon is None:
        plans = [np.zeros(len(tokens), np.int32)] * devices
    else:
        plans = [
            _plan(config, model, len(tokens), length, [config.seed, step, device])
            for device in range(devices)
        ]
    batch = {"tokens": tokens, "labels": labels, "valid": valid, "weights": weights}
    return batch, np.stack(plans, axis=1), raw["tokens"].size


def _plan(
    config: Config, model: ModelConfig, windows: int, length: int, seed: list[int]
) -> np.ndarray:
    """int32 [N]: the ratios of one device's rows at one step."""
    assert model.beacon is not None
    uniform = np.random.default_rng([*seed, 1]).uniform() < config.uniform_plans
    return draw_ratios(
        model,
        windows,
        mix="instance-random" if uniform else model.beacon.ratio_mix,
        seed=seed,
        length=length,
        training=True,
    )


def _tokenizer(config: Config, documents: list[str], workdir: Path) -> tuple[Any, Path]:
    """The tokenizer and its folder; trained on the text once per workdir if asked."""
    settings = config.tokenizer
    if not settings.train:
        folder = Path(settings.path or config.init_from)
        return hf.load_tokenizer(folder), folder
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        partial = workdir / "tokenizer.partial"  # a kill must not leave half of one
        shutil.rmtree(partial, ignore_errors=True)
        train_tokenizer(
            documents,
            partial,
            vocab_size=settings.vocab_size,
            passkey_fraction=settings.passkey_fraction,
            seed=config.seed,
        )
        partial.rename(folder)
    return hf.load_tokenizer(folder), folder


def _batch_config(config: Config) -> BatchConfig:
    data = config.data.to_dict()
    stages = []
    for name in sorted(data.pop("stages")):
        given = config.data.stages[name].to_dict()
        mix = tuple((k, w) for k, w in sorted(given.pop("mix").items()) if w)
        stages.append(Stage(**given, mix=mix))
    return BatchConfig(stages=tuple(stages), seed=config.seed, **data)


def _model(
    config: Config, tokenizer: Any
) -> tuple[ModelConfig, dict[str, Mapping[str, Any]]]:
    """The model and its parameters, on the host, from a checkpoint or at random."""
    settings = config.beacon.to_dict()
    beacon = BeaconConfig(**settings) if settings.pop("use") else None
    if config.init_from:
        checkpoint = hf.load(config.init_from, beacon=beacon)
        model = checkpoint.config
        if beacon is None:
            model = dataclasses.replace(model, beacon=None)
        return model, checkpoint.variables
    fields = config.model.to_dict()
    rope = RopeConfig(**fields.pop("rope", {}))
    model = ModelConfig(
        **fields,
        vocab_size=len(tokenizer),
        rope=rope,
        bos_ids=(tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None else (),
        eos_ids=(tokenizer.eos_token_id,),
        beacon=beacon,
    )
    return model, random_variables(model, config.seed)


def random_variables(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Random float32 parameters [numpy]: normal with 1/sqrt(fan in), norms at one.

    Projections that write into the residual stream are smaller by sqrt(2L), lm_head by
    2 (a nearly uniform first prediction); embeddings have 0.02, as in GPT-2. Beacons
    start from the base, as they do on a pretrained one.
    """
    from beacon_jax.model.beacon import init_beacon

    rng = np.random.default_rng(seed)
    residual = math.sqrt(2 * model.num_layers)

    def draw(path: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
        *_, module, kind = [key.key for key in path]
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

    params = jax.tree_util.tree_map_with_path(
        draw,
        param_shapes(model)["params"],
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {
        "params": params,
        "beacon": init_beacon(params, model) if model.beacon else {},
    }


def _split(
    config: Config, variables: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trained float32 masters and the frozen rest in the computing dtype."""
    names = ("beacon",) if config.trainable == "beacon" else ("params", "beacon")
    dtype = jnp.dtype(config.dtype)
    trained = {
        name: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables[name])
        for name in names
    }
    frozen = {
        name: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        for name, tree in variables.items()
        if name not in names
    }
    return trained, frozen


def export(
    folder: Path,
    config: Config,
    model: ModelConfig,
    trained: dict[str, Any],
    tokenizer_folder: Path,
) -> None:
    """Writes an HF folder: tokenizer, config.json, weights incl. beacon keys.

    A frozen base is read again from `init_from`, so that it is exported in the bytes in
    which it was stored, whatever dtype the run computed in.
    """
    variables, source = dict(trained), None
    if config.init_from:
        source = Path(config.init_from)
        if "params" not in variables:
            variables["params"] = hf.load(source).variables["params"]
        dtype = variables["params"]["embed"]["embedding"].dtype
        variables["beacon"] = jax.tree.map(
            lambda x: x.astype(dtype), variables["beacon"]
        )
    hf.save_hf(folder, model, variables, source, overwrite=True)
    if tokenizer_folder != source:
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)


def _check(config: Config) -> None:
    """ValueError for settings that would fail late or unclearly."""
    if config.trainable not in ("beacon", "all"):
        raise ValueError(
            f"trainable={config.trainable!r} is unknown: use 'beacon' or 'all'."
        )
    if config.dtype not in DTYPES:
        raise ValueError(
            f"dtype={config.dtype!r} is unknown: use {' or '.join(DTYPES)}."
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
    if not 0.0 <= config.uniform_plans <= 1.0:
        raise ValueError(
            f"uniform_plans={config.uniform_plans} is a share of the steps: use a "
            "number from 0 to 1."
        )
    for name in ("log_every", "save_every", "keep"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]} must be at least 1.")


def _announce(
    config: Config,
    model: ModelConfig,
    trained,
    frozen,
    batches: Batches,
    start: int,
    mesh: Mesh,
) -> None:
    stages = ", ".join(
        f"{s.steps} x {s.batch_size} x {s.length}" for s in batches.config.stages
    )
    print(
        f"training {_count(trained):,} parameters ({config.trainable}), "
        f"{_count(frozen):,} frozen, {config.dtype} on {mesh.size} x "
        f"{mesh.devices[0].device_kind}; "
        f"{len(batches.stream):,} tokens of {config.text.uri}; "
        + (f"windows of {model.beacon.window}; " if model.beacon else "")
        + f"steps x batch x length: {stages}"
        + (f"; going on from step {start}" if start else ""),
        flush=True,
    )


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


class _Signals:
    """Notes SIGTERM and SIGINT instead of dying; a second one of them kills."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
