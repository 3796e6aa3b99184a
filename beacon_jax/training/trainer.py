"""One training run: beacons on a frozen base, or all parameters of a small model.

Read `train` from top to bottom. A step is a pure function of the state, of the config
and of its own number (data and ratios are drawn from the seed and the step), so state
and number are all that a checkpoint needs for a bit-identical continuation.
"""

import contextlib
import dataclasses
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from beacon_jax import hf, runtime
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.hf.adapter import write_adapter
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from beacon_jax.model.partition import AXES
from beacon_jax.paths import check_folder, write_whole
from beacon_jax.progress import Progress
from beacon_jax.training.check import check_settings
from beacon_jax.training.checkpoint import (
    Checkpoints,
    Restored,
    changes,
    check_unchanged,
)
from beacon_jax.training.config import Config, read_recorded
from beacon_jax.training.console import OutputClosed, say
from beacon_jax.training.hardware import peak_flops
from beacon_jax.training.initial import export, make_model, make_tokenizer
from beacon_jax.training.inputs import Inputs, describe, draw_plans, make_data, slots
from beacon_jax.training.memory import resolve_remat
from beacon_jax.training.metrics import Metrics
from beacon_jax.training.optim import (
    learning_rate,
    make_optimizer,
    skipped,
    starting_at,
)
from beacon_jax.training.own import choose, next_commands
from beacon_jax.training.processes import check_agreement, fetch, is_lead, wait
from beacon_jax.training.profile import Profiler
from beacon_jax.training.sharding import (
    Placement,
    make_placement,
    make_value_and_grad,
    put,
)
from beacon_jax.training.signals import Signals
from beacon_jax.training.steps import Flight, Programs

# Keys that decide what a checkpoint is exported as.
EXPORTED = ("beacon", "dtype", "model", "trainable")


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains, resuming from `workdir` if it holds checkpoints; writes `workdir/export`.

    Args:
      config: a `training.config.default_config` that an experiment filled in.
      workdir: receives checkpoints/, config.json, metrics.jsonl, tensorboard/,
        summary.json and export/, an HF folder with tokenizer and beacons. Low-rank
        beacons alone are in adapter/, too.

    Returns:
      What summary.json holds: steps, seconds, last metrics, base hashes.

    Raises:
      ValueError, FileNotFoundError: a setting, text or model that does not work.
      CheckpointError: a checkpoint cannot be written, read or used.
      OSError: a disk is full, or stdout is closed; what can be saved is.
      FloatingPointError: too many updates in a row, or all of them, were not finite;
        nothing is exported.
      SystemExit: SIGTERM or SIGINT arrived; the state is saved.
    """
    # ---- Settings. What is left open is chosen, what cannot work is refused.
    check_folder("--workdir", workdir)
    workdir = Path(workdir)
    runtime.prepare()
    progress = Progress() if is_lead() else Progress(lambda line: None)
    with progress.stage("choosing what is left open"):
        config = choose(config, workdir, say)
    with progress.stage("checking the settings"):
        check_settings(config, workdir)
    runtime.enable_compilation_cache(config.compilation_cache)
    with (
        contextlib.closing(Checkpoints(workdir / "checkpoints", config.keep)) as saved,
        Signals(saved.newest) as signals,
    ):
        # ---- Data. A config that cannot go on from here is refused before.
        began = time.perf_counter()
        before = saved.record()
        if before is not None and not config.allow_config_change:
            check_unchanged({"config": before["config"]}, {"config": config.to_dict()})
        with progress.stage("reading the data") as stage:
            tokenizer, tokenizer_folder, batches = make_data(config, workdir, stage)
        steps, rows = batches.steps, [rows for rows, _ in batches.shapes]

        # ---- Model and optimiser, every array where it belongs.
        placement = make_placement(
            config.mesh, config.rules, [n // config.accumulate for n in rows]
        )
        count = placement.plans * config.accumulate  # ratio plans per step
        with progress.stage("making the model", note=config.init_from) as stage:
            model, trained, frozen = make_model(
                config, tokenizer, placement, quiet=before is not None
            )
            stage.becomes("hashing the base")
            base_hash = hf.tree_hash(frozen["params"]) if frozen else None
            stage.becomes("making the optimiser")
            optimizer = make_optimizer(config.optimizer, steps)
            state = fresh_state(placement, optimizer, trained)
            del trained

        # ---- The newest checkpoint, if there is one.
        record = {"config": config.to_dict(), "base_hash": base_hash}
        if batches.fingerprint:
            record["data"] = batches.fingerprint
        with progress.stage("restoring the checkpoint"):
            restored = saved.restore(state, record, config.allow_config_change)
        if restored is not None:
            state = _going_on(restored)
        start = int(state["step"])
        ahead = range(start, min(start + 10, steps))
        drawn = [draw_plans(config, model, batches, i, count).tolist() for i in ahead]
        check_agreement("config, step or ratio plan", [record, start, drawn])
        mesh = placement.mesh
        if is_lead():
            write_whole(workdir / "config.json", _json(record["config"]))
            say(
                f"training {_count(state['trained']):,} parameters "
                f"({config.trainable}), {_count(frozen):,} frozen, {config.dtype} on "
                f"{mesh.size} x {mesh.devices.flat[0].device_kind}; "
                + (f"windows of {model.beacon.window}; " if model.beacon else "")
                + describe(config, batches)
                + (f"; going on from step {start}" if start else "")
            )

        # ---- Steps. Each ends with a line in the files, then a checkpoint, then a line
        # for the user: a kill leaves no step without its line, and whatever becomes of
        # the user's terminal the state is saved before.
        needed = config, model, placement, state["trained"], frozen
        remat = resolve_remat(*needed, batches.shapes)
        update = Programs(
            make_update(config, model, optimizer, placement, state, remat)
        )
        share = learning_rate(config.optimizer, steps)
        peak = peak_flops(mesh.devices.flat, config.peak_tflops)
        metrics = Metrics(workdir if is_lead() else None, start, steps, peak=peak)
        profiler = Profiler(workdir / "profile", config.profile_steps)
        flight = Flight(skipped(state["optimizer"]))
        last: dict[str, float] = {}
        done, received = start, None
        held = placement.rows(rows[0])
        inputs = Inputs(config, model, batches, count, held).ahead(start, steps)
        with contextlib.closing(metrics), profiler, contextlib.closing(inputs):
            for step in range(start, steps):
                # The inputs, and the step: it is dispatched, not waited for.
                profiler.before(step + 1, state)
                with metrics.timing("data"), progress.stage("waiting for rows"):
                    given = next(inputs)
                    placed = placement.batch(given.batch), placement.plan(given.plans)
                with progress.stage("compiling the step"):
                    metrics.compiled(update.prepare(state, frozen, *placed))
                with metrics.timing("step"):
                    state, values = update(state, frozen, *placed)
                done = step + 1
                signals.running(done)
                metrics.add(given.plans, given.tokens, values, flops=given.flops)
                profiler.after(done, state)

                # Waiting: for the step before, or for all that a line is about.
                report = done == steps or done % config.log_every == 0
                # `metrics` has a line for those after the first.
                shown = contextlib.nullcontext()
                if step == start:
                    shown = progress.stage("computing the first step")
                with metrics.timing("step"), shown:
                    flight.add(values)
                    flight.land(all_of_them=report or metrics.due())
                received = signals.after(done)
                stop = done == steps or received is not None
                if stop and not report:
                    report = True
                    with metrics.timing("step"):
                        flight.land(all_of_them=True)

                # A line in the files, a checkpoint, a line for the user.
                failed = (
                    flight.in_a_row >= config.optimizer.max_nonfinite
                    or flight.skipped == steps
                )
                if report or failed:
                    rate = config.optimizer.lr * float(jnp.asarray(share(step)))
                    extra = {"lr": rate, "skipped": flight.skipped}
                    with signals.stop_after(OSError):
                        last = metrics.write(done, extra)
                if not failed and (stop or done % config.save_every == 0):
                    with metrics.timing("step"):
                        jax.block_until_ready(state)
                    with metrics.timing("checkpoint"), progress.stage("saving"):
                        saved.save(done, state, record)
                if stop and not failed:
                    with progress.stage("saving"):
                        saved.wait()
                    signals.safe()
                saved.check()
                with signals.stop_after(OutputClosed):
                    if report or failed:
                        metrics.show()
                    elif metrics.due():
                        metrics.progress(done)

                # The end, or the next step.
                if failed:
                    raise FloatingPointError(_not_finite(config, done, flight.in_a_row))
                if stop:
                    break
                signals.running(done + 1)
        saved.wait()
        _end_if_stopped(signals, received, done, steps)
        if start == steps == flight.skipped:
            raise FloatingPointError(_not_finite(config, steps, flight.in_a_row))

        # ---- Export.
        with progress.stage("hashing the base"):
            base_hash_after = hf.tree_hash(frozen["params"]) if frozen else None
        if base_hash_after != base_hash:
            raise RuntimeError(
                f"the frozen base changed while training: hash {base_hash} before, "
                f"{base_hash_after} after. This is a fault of the program."
            )
        written = state["trained"]
        if not config.init_from:
            written = {**frozen, **written}
        with progress.stage("fetching the weights"):
            written = fetch(written)
            trained_hash = hf.tree_hash(written)
        folder = workdir / "export"
        summary = {
            "steps": steps,
            "steps_of_this_process": steps - start,
            "seconds": time.perf_counter() - began,
            "base_hash_before": base_hash,
            "base_hash_after": base_hash_after,
            "trained_parameters": _count(state["trained"]),
            "trained_hash": trained_hash,
            "last": last,
        }
        if is_lead() and _exported(workdir, trained_hash):
            say(f"{folder} has these {steps} steps already and stays as it is")
        elif is_lead():
            parts = folder, config, model, written, tokenizer_folder
            alone = workdir / "adapter" if model.beacon and model.beacon.rank else None
            try:
                export(*parts, overwrite=True, keep=True)
                if alone is not None:
                    # 16 bits, if the steps computed with no more.
                    dtype = None if config.dtype == "float32" else config.dtype
                    write_adapter(folder, alone, dtype=dtype, overwrite=True, keep=True)
                summary["seconds"] = time.perf_counter() - began
                write_whole(workdir / "summary.json", _json(summary))
            except OSError as error:
                raise OSError(
                    f"the export could not be written to {folder} ({error}); step "
                    f"{steps} is saved: make room, and the same command writes it."
                ) from error
            say(f"wrote {folder}")
            if alone is not None:
                say(f"wrote {alone}, the beacons alone (--beacons)")
            if model.beacon is not None:
                say(next_commands(config, folder))
        wait("export")
        return summary


def _end_if_stopped(
    signals: Signals, received: signal.Signals | None, done: int, steps: int
) -> None:
    """Ends a run that an error or a signal stopped, and whose state is saved.

    Raises:
      OSError: a file or stdout could not be written.
      SystemExit: the run has steps left, and a signal has arrived.
    """
    if signals.failure is not None:
        raise OSError(
            f"{signals.failure}; step {done} is saved, the same command goes on from "
            "there."
        ) from signals.failure
    if received is None or done == steps:
        return
    if is_lead():
        text = (
            f"{received.name}: step {done} is saved; the same command goes on from "
            "there."
        )
        try:
            say(text)
        except OutputClosed:
            print(text, file=sys.stderr, flush=True)
    raise SystemExit(128 + received)


def _going_on(restored: Restored) -> dict[str, Any]:
    """Returns the restored state.

    A fresh optimiser gets the learning rate of its step.
    """
    state = restored.state
    if restored.optimizer:
        return state
    step = int(state["step"])
    updates = step - skipped(state["optimizer"])[1]
    if is_lead():
        say(
            f"another optimiser than in the checkpoint: it starts anew at step {step} "
            "(its moments are zero, the learning rate is that of the step); what was "
            "trained is kept"
        )
    return {**state, "optimizer": starting_at(state["optimizer"], updates)}


def _not_finite(config: Config, step: int, in_a_row: int) -> str:
    most = config.optimizer.max_nonfinite
    what = (
        f"the last {in_a_row} updates up to step {step} were not finite and skipped "
        f"(optimizer.max_nonfinite={most})"
    )
    if in_a_row >= step:
        what = (
            f"all {step} updates were not finite and skipped, so nothing was learned "
            "and nothing is exported"
        )
    return (
        f"{what}: lower optimizer.lr={config.optimizer.lr}"
        + (" or loss.scale" if config.dtype == "float16" else "")
        + ("" if config.dtype == "float32" else ", or use dtype='float32'")
        + "; if the loss is nan from the first step on, check that init_from and its "
        "tokenizer belong together. Use another --workdir for other settings."
    )


def _exported(workdir: Path, trained_hash: str) -> bool:
    """Tells whether the export is complete and of these very parameters."""
    try:
        summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
        same = summary["trained_hash"] == trained_hash
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    return same and (workdir / "export" / "config.json").is_file()


def export_checkpoint(
    workdir: str | Path, dst: str | Path, *, overwrite: bool = False
) -> int:
    """Writes the newest checkpoint of a run as an HF folder; returns its step.

    It does so on one device, as `train` does at its end. `workdir` is only read: a
    damaged checkpoint stays where it is.

    Raises:
      FileNotFoundError: `workdir` has no config.json, or no whole checkpoint.
      ValueError: its config.json is damaged, or it or the base is another one than the
        checkpoint was made with.
      CheckpointError: the checkpoint cannot be read.
    """
    workdir = Path(workdir)
    settings = read_recorded(workdir)
    config: Config = ConfigDict(settings)
    config.update({"mesh": dict.fromkeys(AXES, 1), "accumulate": 1})
    config.beacons_from = ""  # a checkpoint has them all
    with (
        # Nothing is saved, so nothing is deleted, whatever `keep` says.
        contextlib.closing(Checkpoints(workdir / "checkpoints", 1)) as saved,
        Progress().stage("making the model", note=config.init_from) as stage,
    ):
        before = saved.record() or {}
        _check_exported(workdir, before.get("config"), settings)
        tokenizer, tokenizer_folder = make_tokenizer(config, list, workdir)
        placement = make_placement(config.mesh, config.rules, [1])
        model, trained, frozen = make_model(config, tokenizer, placement)
        if frozen:
            stage.becomes("hashing the base")
            _check_base(config, before, hf.tree_hash(frozen["params"]))
        optimizer = make_optimizer(config.optimizer, 1)  # the structure of its state
        state = fresh_state(placement, optimizer, trained)
        stage.becomes("restoring the checkpoint")
        restored = saved.restore(state, {}, allow=True, aside=False)
    if restored is None:
        raise FileNotFoundError(f"--src={workdir} has no checkpoint yet: train first.")
    variables = restored.state["trained"]
    if not config.init_from:
        variables = {**frozen, **variables}
    trained = fetch(variables)
    export(Path(dst), config, model, trained, tokenizer_folder, overwrite=overwrite)
    return int(restored.state["step"])


def _check_exported(
    workdir: Path, before: dict[str, Any] | None, now: dict[str, Any]
) -> None:
    """Raises ValueError unless config.json says what the newest checkpoint is of."""
    if before is None:
        return
    what = lambda config: {"config": {key: config.get(key) for key in EXPORTED}}
    if changed := changes(what(before), what(now)):
        raise ValueError(
            f"{workdir / 'config.json'} is not that of the newest checkpoint:\n  "
            + "\n  ".join(changed)
            + "\nPut these values back, or wait for the next checkpoint of a run that "
            "goes on with others."
        )


def _check_base(config: Config, before: dict[str, Any], now: str) -> None:
    """Raises ValueError unless the base is the one that beacons were trained on."""
    then = before.get("base_hash")
    if then and then != now:
        raise ValueError(
            f"init_from={config.init_from} is another model than the run began with "
            f"(hash {then[:16]} then, {now[:16]} now): put the weights back that the "
            "beacons were trained on."
        )


def fresh_state(placement: Placement, optimizer: Any, trained: Any) -> dict[str, Any]:
    """Makes a fresh state: what is trained, and an optimiser state split likewise."""
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
    """Makes the jitted step: (state, frozen, batch, plans) -> (state, values).

    The state is donated, and stays where `state` (arrays, or their shapes and
    shardings) is.
    """
    dtype = jnp.dtype(config.dtype)
    half = dtype == jnp.float16
    net = Net(model, dtype, config.attention or None, placement.partition)

    def loss(trained, frozen, batch, plan, partition):
        settings = LossConfig(
            kind=config.loss.kind,
            label_weight=config.loss.label_weight,
            attention_weight=config.loss.attention_weight,
            attention_queries=config.loss.attention_queries,
            skip_first_window=config.loss.skip_first_window,
            average=config.loss.average,
            remat=remat,
            offload=config.offload,
            memory_slots=slots(config, model, len(plan)) if model.beacon else 0,
        )
        return train_loss(
            dataclasses.replace(net, partition=partition),
            trained["beacon"],
            {**frozen, **trained}["params"],
            batch,
            plan,
            settings,
        )

    shardings = jax.tree.map(lambda x: x.sharding, state)
    sharded_value_and_grad = make_value_and_grad(
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
        # Over all devices, and over all parts of the batch.
        (value, aux), gradients = sharded_value_and_grad(trained, frozen, batch, plans)
        # Clips by the global norm, scales by the moments and the rate of this step, and
        # skips what is not finite: `optim.make_optimizer`.
        updates, optimizer_state = optimizer.update(
            gradients, state["optimizer"], state["trained"]
        )
        new = {
            "trained": optax.apply_updates(state["trained"], updates),
            "optimizer": optimizer_state,
            "step": state["step"] + 1,
        }
        counts: Any = optimizer_state
        values = {
            "loss": value,
            "grad_norm": optax.tree.norm(gradients),
            "nonfinite_in_a_row": counts.notfinite_count,
            "nonfinite": counts.total_notfinite,
            **aux,
        }
        return new, values

    return jax.jit(
        update, donate_argnums=0, out_shardings=(shardings, placement.everywhere)
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))
