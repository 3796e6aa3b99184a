"""Makes the optimiser: AdamW or Muon, one schedule for both, only finite updates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from beacon_jax.names import meant
from beacon_jax.training.config import Config
from beacon_jax.training.sharding import map_named

NAMES = ("adamw", "muon")
SCHEDULES = ("linear", "cosine")


def learning_rate(config: Config, steps: int) -> optax.Schedule:
    """Makes the schedule: the share of the peak rate at a step counted from 0.

    It has a linear warm-up, a constant part, and a decay after the share decay_start of
    the steps. "linear" aims at 0 and stops falling at `end`; while the rate still
    rises, the lower of both counts. "cosine" comes to rest at `end`, and does not begin
    before the warm-up is over.

    Args:
      config: with schedule, warmup [steps], decay_start and end [shares].
      steps: length of the run, where the decay ends.

    Raises:
      ValueError: an unknown schedule, or a share that is none.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule={config.schedule!r} is unknown: "
            f"{meant(config.schedule, SCHEDULES)}use {' or '.join(SCHEDULES)}."
        )
    if not 0.0 <= config.decay_start < 1.0:
        raise ValueError(
            f"optimizer.decay_start={config.decay_start} must lie in [0, 1)."
        )
    if not 0.0 <= config.end <= 1.0:
        raise ValueError(f"optimizer.end={config.end} must lie in [0, 1].")
    if config.schedule == "cosine":
        begin = max(steps * config.decay_start, config.warmup)
        fall = optax.cosine_decay_schedule(1.0, max(steps - begin, 1), config.end)
        decay = optax.join_schedules([optax.constant_schedule(1.0), fall], [begin])
    else:
        # optax.linear_schedule rounds differently: runs would not be those measured.
        span = steps * (1.0 - config.decay_start)
        decay = lambda step: jnp.maximum((steps - step) / span, config.end)

    def share(step):
        rise = (step + 1) / max(config.warmup, 1)
        return jnp.minimum(jnp.minimum(rise, decay(step)), 1.0)

    return share


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Makes the gradient transformation of a run: clips, and skips what is not finite.

    `max_nonfinite` skipped updates in a row stop the run (`trainer`). optax itself lets
    them through after a number of errors, so that number is out of reach.

    Args:
      config: config.optimizer.
      steps: length of the run, for the schedule.

    Raises:
      ValueError: an unknown name, or what `learning_rate` refuses.
    """
    if config.name not in NAMES:
        raise ValueError(
            f"optimizer.name={config.name!r} is unknown: {meant(config.name, NAMES)}"
            f"use {' or '.join(NAMES)}."
        )
    share = learning_rate(config, steps)

    def scaled(peak: float) -> optax.Schedule:
        return lambda step: peak * share(step)

    if config.name == "adamw":
        rule = optax.adamw(
            scaled(config.lr),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    else:
        rule = optax.contrib.muon(
            scaled(config.lr),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            adam_learning_rate=scaled(config.adam_lr),
            muon_weight_dimension_numbers=matrix_axes,
        )
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.apply_if_finite(
        optax.chain(clip, rule), max_consecutive_errors=2**31 - 2
    )


def matrix_axes(params: Any) -> Any:
    """Tells which axes of a stacked parameter are a layer's matrix; None: no matrix.

    Axis 0 is the layer and is never mixed. Embeddings and lm_head are left to Adam, as
    Muon's authors recommend.
    """

    def axes(name: str, x: Any) -> Any:
        names = name.split("/")
        if "layers" not in names or names[-1] not in ("kernel", "lora_a", "lora_b"):
            return None
        if names[-2] == "o_proj" and names[-1] != "lora_b":  # [L, N, H, D]
            return optax.contrib.MuonDimensionNumbers((1, 2), 3)
        return optax.contrib.MuonDimensionNumbers(1, tuple(range(2, x.ndim)))

    return map_named(axes, params)


def starting_at(state: Any, updates: int) -> Any:
    """Returns a fresh optimiser state with the learning rates after `updates` updates.

    Moments, and what corrects their bias, start at 0.
    """

    def count(node: Any) -> Any:
        if not isinstance(node, optax.ScaleByScheduleState):
            return node
        old: Any = node.count
        return node._replace(
            count=jax.device_put(jnp.full_like(old, updates), old.sharding)
        )

    known = lambda node: isinstance(node, optax.ScaleByScheduleState)
    return jax.tree.map(count, state, is_leaf=known)


def skipped(state: Any) -> tuple[int, int]:
    """Counts the updates skipped as not finite: in a row up to now, and in all."""
    return int(state.notfinite_count), int(state.total_notfinite)
