"""One training run: beacons on a frozen base, or all parameters of a small model.

Read `train` from top to bottom. A step is a pure function of the state, of the config
and of its own number (data and ratios are drawn from the seed and the step), so state
and number are all that a checkpoint needs for a bit-identical continuation.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from beacon_jax import hf, runtime
from beacon_jax.core.train_loss import train_loss
from beacon_jax.data.batches import StepBatches
from beacon_jax.data.text import load_documents
from beacon_jax.model.config import ModelConfig
from beacon_jax.training.checkpoint import Checkpoints
from beacon_jax.training.config import Config
from beacon_jax.training.hardware import peak_flops
from beacon_jax.training.initial import (
    export,
    make_model,
    make_tokenizer,
)
from beacon_jax.training.inputs import (
    Inputs,
    describe,
    draw_plans,
    make_batches,
    slots,
)
from beacon_jax.training.memory import choose_remat, step_bytes
from beacon_jax.training.metrics import Metrics
from beacon_jax.training.optim import learning_rate, make_optimizer, skipped
from beacon_jax.training.processes import (
    Signals,
    check_agreement,
    fetch,
    is_lead,
    wait,
)
from beacon_jax.training.profile import Profiler, parse_steps
from beacon_jax.training.sharding import (
    Placement,
    make_placement,
    make_value_and_grad,
    put,
)

DTYPES = ("float32", "bfloat16", "float16")


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
    runtime.prepare()
    runtime.enable_compilation_cache(config.compilation_cache)
    began, workdir = time.perf_counter(), Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    text, documents = config.text, []
    if config.tokenizer.train or not config.data.sources:
        documents = load_documents(text.uri, "train", text.heldout_fraction)
    tokenizer, tokenizer_folder = make_tokenizer(config, documents, workdir)
    batches = make_batches(config, documents, tokenizer, tokenizer_folder, workdir)
    del documents
    steps, rows = batches.steps, [rows for rows, _ in batches.shapes]
    placement = make_placement(
        config.mesh, config.rules, [n // config.accumulate for n in rows]
    )
    count = placement.plans * config.accumulate  # ratio plans per step
    model, trained, frozen = make_model(config, tokenizer, placement)
    base_hash = hf.tree_hash(frozen["params"]) if frozen else None

    optimizer = make_optimizer(config.optimizer, steps)
    state = _state(placement, optimizer, trained)
    del trained
    record = {"config": config.to_dict(), "base_hash": base_hash}
    if batches.fingerprint:
        record["data"] = batches.fingerprint
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
    restored = checkpoints.restore(state, record, config.allow_config_change)
    if restored is not None:
        state = restored
    start = int(state["step"])
    ahead = range(start, min(start + 10, steps))
    drawn = [draw_plans(config, model, batches, i, count).tolist() for i in ahead]
    check_agreement("config, step or ratio plan", [record, start, drawn])
    if is_lead():
        _write_json(workdir / "config.json", record["config"])
        _announce(
            config, model, state["trained"], frozen, batches, start, placement.mesh
        )

    remat = _remat(config, model, placement, state["trained"], frozen, batches)
    update = make_update(config, model, optimizer, placement, state, remat)
    share = learning_rate(config.optimizer, steps)
    peak = peak_flops(placement.mesh.devices.flat, config.peak_tflops)
    metrics = Metrics(workdir if is_lead() else None, start, steps, peak=peak)
    profiler = Profiler(workdir / "profile", config.profile_steps)
    last: dict[str, float] = {}
    held = placement.rows(rows[0])
    inputs = Inputs(config, model, batches, count, held).ahead(start, steps)
    with Signals() as signals, profiler, contextlib.closing(inputs):
        for step in range(start, steps):
            done = step + 1
            profiler.before(done, state)
            with metrics.timing("data"):
                given = next(inputs)
                placed = placement.batch(given.batch), placement.plan(given.plans)
            with metrics.timing("step"):
                state, values = update(state, frozen, *placed)
                runtime.launched(values["loss"])
            metrics.add(given.plans, given.tokens, values, flops=given.flops)
            profiler.after(done, state)
            received = signals.after(done)
            stop = done == steps or received is not None
            if metrics.pending >= config.log_every or stop:
                with metrics.timing("step"):  # waits for the devices
                    in_a_row, total = skipped(state["optimizer"])
                rate = config.optimizer.lr * float(jnp.asarray(share(step)))
                last = metrics.report(done, {"lr": rate, "skipped": total})
                if in_a_row >= config.optimizer.max_nonfinite:
                    raise FloatingPointError(
                        f"the last {in_a_row} updates up to step {done} were not "
                        f"finite and skipped (optimizer.max_nonfinite="
                        f"{config.optimizer.max_nonfinite}): lower optimizer.lr="
                        f"{config.optimizer.lr}"
                        + (" or loss.scale" if config.dtype == "float16" else "")
                        + ", or use dtype='float32'."
                    )
            if done % config.save_every == 0 or stop:
                with metrics.timing("step"):
                    jax.block_until_ready(state)
                with metrics.timing("checkpoint"):
                    checkpoints.save(done, state, record)
            if received is not None and done < steps:
                metrics.close()
                checkpoints.close()
                print(
                    f"{received.name}: step {done} is saved; the same command goes on "
                    "from there.",
                    flush=True,
                )
                raise SystemExit(128 + received)
    metrics.close()
    checkpoints.close()

    base_hash_after = hf.tree_hash(frozen["params"]) if frozen else None
    if base_hash_after != base_hash:
        raise RuntimeError(
            f"the frozen base changed while training: hash {base_hash} before, "
            f"{base_hash_after} after. This is a fault of the program."
        )
    variables = state["trained"] if config.init_from else {**frozen, **state["trained"]}
    variables = fetch(variables)
    if is_lead():
        export(
            workdir / "export",
            config,
            model,
            variables,
            tokenizer_folder,
            overwrite=True,
        )
    wait("export")
    summary = {
        "steps": steps,
        "steps_of_this_process": steps - start,
        "seconds": time.perf_counter() - began,
        "base_hash_before": base_hash,
        "base_hash_after": base_hash_after,
        "trained_parameters": _count(state["trained"]),
        "last": last,
    }
    if is_lead():
        _write_json(workdir / "summary.json", summary)
        print(f"wrote {workdir / 'export'}", flush=True)
    return summary


def export_checkpoint(
    workdir: str | Path, dst: str | Path, *, overwrite: bool = False
) -> int:
    """Writes the newest checkpoint of a run as an HF folder, as `train` does at its
    end, on one device; returns its step.

    Raises:
      FileNotFoundError: `workdir` has no config.json, or no whole checkpoint.
    """
    workdir = Path(workdir)
    settings = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    config: Config = ConfigDict(settings)
    config.update({"mesh": {"data": 1, "fsdp": 1, "tensor": 1}, "accumulate": 1})
    tokenizer, tokenizer_folder = make_tokenizer(config, [], workdir)
    placement = make_placement(config.mesh, config.rules, [1])
    model, trained, frozen = make_model(config, tokenizer, placement)
    optimizer = make_optimizer(config.optimizer, 1)  # the structure of its state
    state = _state(placement, optimizer, trained)
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep)
    restored = checkpoints.restore(state, {}, allow=True)
    checkpoints.close()
    if restored is None:
        raise FileNotFoundError(f"--src={workdir} has no checkpoint yet: train first.")
    variables = restored["trained"]
    if not config.init_from:
        variables = {**frozen, **variables}
    trained = fetch(variables)
    export(Path(dst), config, model, trained, tokenizer_folder, overwrite=overwrite)
    return int(restored["step"])


def _state(placement: Placement, optimizer: Any, trained: Any) -> dict[str, Any]:
    """A fresh state: what is trained, and an optimiser state split in the same way."""
    shardings = jax.tree.map(lambda x: x.sharding, trained)
    fresh = jax.eval_shape(optimizer.init, trained)
    where = placement.optimizer(fresh, shardings)
    return {
        "trained": trained,
        "optimizer": jax.jit(optimizer.init, out_shardings=where)(trained),
        "step": put(np.zeros((), np.int32), placement.everywhere),
    }


def make_update(
    config: Config,
    model: ModelConfig,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    state: dict[str, Any],
    remat: str,
):
    """The jitted step: (state, frozen, batch, plans) -> (state, values); state is
    donated and stays where `state` (arrays, or their shapes and shardings) is."""
    dtype = jnp.dtype(config.dtype)
    half = dtype == jnp.float16

    def loss(trained, frozen, batch, plan, partition):
        room = slots(config, model, len(plan)) if model.beacon else 0
        return train_loss(
            model,
            trained["beacon"],
            {**frozen, **trained}["params"],
            batch,
            plan,
            skip_first_window_loss=config.loss.skip_first_window,
            loss_average=config.loss.average,
            remat=remat,
            offload=config.offload,
            attention=config.attention or None,
            memory_slots=room,
            dtype=dtype.type,
            partition=partition,
        )

    shardings = jax.tree.map(lambda x: x.sharding, state)
    value_and_grad = make_value_and_grad(
        loss,
        placement,
        shardings["trained"],
        average=config.loss.average,
        parts=config.accumulate,
        scale=config.loss.scale if half else 1.0,
    )

    def update(state, frozen, batch, plans):
        trained = state["trained"]
        # Cast before it is gathered: half the bytes. Gradients come back in the same
        # dtype, and a sum over all windows may leave float16's range.
        if not half:
            trained = jax.tree.map(lambda x: x.astype(dtype), trained)
        (value, aux), gradients = value_and_grad(trained, frozen, batch, plans)
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

    return jax.jit(
        update, donate_argnums=0, out_shardings=(shardings, placement.everywhere)
    )


def _remat(
    config: Config,
    model: ModelConfig,
    placement: Placement,
    trained: Any,
    frozen: Any,
    batches: StepBatches,
) -> str:
    """config.remat, or what the largest batch leaves room for."""
    if config.remat != "auto":
        return config.remat
    if model.beacon is None:
        return "lean"
    needs = []
    shares = placement.mesh.shape["data"] * placement.mesh.shape["fsdp"]
    for rows, length in batches.shapes:
        windows = -(-length // model.beacon.window)
        needs.append(
            step_bytes(
                model,
                placement,
                trained,
                frozen,
                rows=rows // (config.accumulate * shares),
                windows=windows,
                slots=slots(config, model, windows),
                dtype=jnp.dtype(config.dtype),
                offload=config.offload,
            )
        )
    return choose_remat(max(needs, key=lambda need: need["lean"]))


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
    for name in ("log_every", "save_every", "keep", "accumulate"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]} must be at least 1.")
    if config.data.prepared and not config.data.sources:
        raise ValueError(
            f"data.prepared={config.data.prepared!r} without data.sources: name the "
            "sources it was made of as well."
        )
    if config.loss.scale <= 0:
        raise ValueError(f"loss.scale={config.loss.scale} must be greater than 0.")
    stages = {name: s.batch_size for name, s in config.data.stages.items()}
    if config.data.sources:
        stages = {"data": config.data.batch_size}
    for name, rows in stages.items():
        if rows % config.accumulate:
            raise ValueError(
                f"accumulate={config.accumulate} does not divide batch_size={rows} of "
                f"{name}: make it a multiple."
            )
    parse_steps(config.profile_steps)
    peak_flops((), config.peak_tflops)


def _announce(
    config: Config,
    model: ModelConfig,
    trained,
    frozen,
    batches: StepBatches,
    start: int,
    mesh: Mesh,
) -> None:
    print(
        f"training {_count(trained):,} parameters ({config.trainable}), "
        f"{_count(frozen):,} frozen, {config.dtype} on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}; "
        + (f"windows of {model.beacon.window}; " if model.beacon else "")
        + describe(config, batches)
        + (f"; going on from step {start}" if start else ""),
        flush=True,
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
