"""One training step on one device: beacons on a frozen base, the trainer's own step.

Masters and optimiser state are float32, the base and all computing `dtype`; one row of
`length` tokens, a ratio per window drawn from the config's (seed 0). The ratio plan is
part of the row, since the FLOPs depend on it.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.bench.case import Bench, Case, timed
from beacon_jax.bench.device import check_fits, peak_bytes, random_variables, risen
from beacon_jax.bench.records import Row
from beacon_jax.bench.timing import compile_program, measure
from beacon_jax.core.plan import draw_ratios, memory_slots, plan_slots
from beacon_jax.data.windows import split_windows
from beacon_jax.flops import training_step
from beacon_jax.model.config import ModelConfig
from beacon_jax.training.config import default_config
from beacon_jax.training.hardware import peak_flops
from beacon_jax.training.memory import choose_remat, step_bytes
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.sharding import Placement, make_placement
from beacon_jax.training.trainer import fresh_state, make_update


def cases(s: Bench) -> Iterator[Case]:
    """Yields a step of every length, the shortest first."""
    for length in sorted(s.lengths):
        key = s.key("train", length=length)
        yield Case(key, functools.partial(_step, s, length))


def _step(s: Bench, length: int) -> Row:
    model = s.config
    config = default_config()
    config.dtype = s.dtype
    windows = -(-length // s.beacon.window)
    slots = memory_slots(model, windows, likely=True)
    placement, *_, need = abstract(model, config, [s.device], 1, windows, slots)
    remat = choose_remat(need, s.device)
    check_fits(s.device, need[remat])
    before = peak_bytes(s.device)
    trained, frozen = start(model, s.dtype)
    trained = jax.device_put(trained, placement.trained(model, trained))
    frozen = jax.device_put(frozen, placement.frozen(model, frozen))
    optimizer = make_optimizer(config.optimizer, 1000)
    state = fresh_state(placement, optimizer, trained)
    del trained
    update = make_update(config, model, optimizer, placement, state, remat)
    batch, plan = _inputs(s, length, windows, slots)
    spent = training_step(model, plan, batch["valid"])
    given = placement.batch(batch), placement.plan(plan)
    program = compile_program(update, state, frozen, *given, donate=[0])
    held = [state]
    del state

    def call():
        held[0], values = program.run(held[0], frozen, *given)
        return values

    timing = measure(call, repeats=s.repeats)
    peak = peak_flops([s.device])
    return timed(timing, program) | {
        "tokens_per_second": length / timing.median_s,
        "model_flops": spent,
        "tflops": spent / timing.median_s / 1e12,
        "mfu": spent / timing.median_s / peak if peak else None,
        "remat": remat,
        "plan": plan[:, 0].tolist(),
        "formula_bytes": need[remat],
        "peak_bytes": risen(s.device, before),
    }


def start(model: ModelConfig, dtype: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws (trained, frozen) parameters: beacons in float32, a base in `dtype`."""
    variables = random_variables(model, dtype)
    beacon = jax.tree.map(lambda x: x.astype(jnp.float32), variables["beacon"])
    return {"beacon": beacon}, {"params": variables["params"]}


def abstract(
    model: ModelConfig, config: Any, devices: Any, rows: int, windows: int, slots: int
) -> tuple[Placement, Any, Any, dict[str, float]]:
    """Describes a step of the trainer for devices that need not be here.

    Args:
      config: of a training run.
      rows: of the batch, one on each device that a batch is split over.
      windows, slots: of a row.

    Returns:
      The placement, shapes with shardings of the trained and of the frozen parameters,
      and the estimate of `training.memory`: bytes per device by `remat`.
    """
    placement = make_placement(config.mesh, config.rules, [rows], devices)
    trained, frozen = jax.eval_shape(lambda: start(model, config.dtype))
    trained = placed(trained, placement.trained(model, trained))
    frozen = placed(frozen, placement.frozen(model, frozen))
    need = step_bytes(
        config,
        model,
        placement,
        trained,
        frozen,
        rows=1,
        windows=windows,
        slots=slots,
    )
    return placement, trained, frozen, need


def placed(shapes: Any, shardings: Any) -> Any:
    """Returns the shapes of a tree of arrays with their shardings."""
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, shapes, shardings)


def _inputs(s: Bench, length: int, windows: int, slots: int):
    """Makes a batch of one row as windows, and its plan [N, 1] that fits `slots`."""
    model = s.config
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, length + 1))
    cut = functools.partial(
        split_windows, window=s.beacon.window, count=windows, align="right"
    )
    ids, valid = cut(tokens[:, :-1].astype(np.int32), None)
    labels, _ = cut(tokens[:, 1:].astype(np.int32), None, fill=-100)
    weights = np.ones(ids.shape, np.float32)
    batch = {"tokens": ids, "labels": labels, "valid": valid, "weights": weights}
    draw = functools.partial(
        draw_ratios, model, windows, mix="step-random", length=length, training=True
    )
    plans = (draw(seed=[0, attempt]) for attempt in itertools.count())
    plan = next(p for p in plans if plan_slots(model, p) <= slots)
    return batch, plan[:, None]
