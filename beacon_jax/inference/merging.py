"""Writes low-rank beacons in the release's form, and says what that changes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.hf.adapter import materialised
from beacon_jax.hf.checkpoint import load, save_hf
from beacon_jax.hf.conversion import model_config
from beacon_jax.inference.verify import MAX_KL
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from beacon_jax.progress import Progress

WINDOWS, ROWS, LEAST = 3, 2, 32  # of random tokens; LEAST: of a window

Pair = tuple[ModelConfig, Mapping[str, Any]]


def merge(src: Path, dst: Path, *, overwrite: bool = False) -> str:
    """Writes a model with low-rank beacons as a folder that the release reads.

    Each change becomes a whole projection W + A B. It has the dtype of a 16-bit base if
    that stays within 1e-4 nats per token of the low-rank beacons, else float32.

    Args:
      src: an HF or a converted folder.
      dst: the new HF folder.
      overwrite: as `save_hf`.

    Returns:
      What was written, with the KL per token against the low-rank beacons.

    Raises:
      ValueError: the beacons of `src` have no rank, or anchors, which the release does
        not know.
    """
    beacon = model_config(src, ignore_sliding_window=True).beacon
    if beacon is None or not beacon.rank:
        raise ValueError(f"--src={src} has no low-rank beacons: there is none to add.")
    if beacon.anchor != "none":
        raise ValueError(
            f"--src={src} has beacon_anchor={beacon.anchor!r}: projections of the "
            "beacons' own, which the release reads, cannot say what such beacons do. "
            "Use --adapter, and load them with --beacons."
        )
    model = load(src)
    with Progress().stage("merging"):
        config, variables = materialised(model.config, model.variables)
        low = model.config, model.variables
        base = model.variables["params"]["embed"]["embedding"].dtype
        kind, kl = "float32", beacon_kl(low, (config, variables))
        if base.itemsize == 2:
            small = _cast(variables, base)
            rounded = beacon_kl(low, (config, small))
            if rounded.max() <= MAX_KL:
                kind, kl, variables = base.name, rounded, small
    save_hf(dst, config, variables, src, overwrite=overwrite)
    return (
        f"W + A B in {kind}: KL per token against rank {beacon.rank} mean "
        f"{kl.mean():.2e}, max {kl.max():.2e} nats, of {kl.size} random tokens"
    )


def beacon_kl(a: Pair, b: Pair, seed: int = 0) -> Float[np.ndarray, " T"]:
    """Returns KL(a || b) in nats of tokens that read compressed windows.

    Args:
      a, b: configs and variables of models of one vocabulary and window, which compute
        in float32, on random tokens.
    """
    x, y = (_log_probabilities(*pair, seed) for pair in (a, b))
    return np.sum(np.exp(x) * (x - y), axis=-1).reshape(-1)


def _log_probabilities(
    config: ModelConfig, variables: Mapping[str, Any], seed: int
) -> Float[np.ndarray, "N B W V"]:
    """Of all windows but the first, behind others at the lowest ratio."""
    assert config.beacon is not None
    ratio = min((r for r in config.beacon.ratios if r), default=1)
    window = max(LEAST // ratio, 1) * ratio
    sink = min(config.beacon.sink, window)
    # Windows of any length have the same weights; long ones would take long.
    beacon = dataclasses.replace(
        config.beacon, window=window, ratios=(ratio,), sink=sink
    )
    config = dataclasses.replace(config, beacon=beacon)
    shape = (WINDOWS, ROWS, window)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, shape).astype(np.int32)
    valid = np.full(shape[:2], window, np.int32)
    with jax.default_matmul_precision("highest"):
        _, aux = train_loss(
            Net(config, np.dtype(np.float32)),
            variables["beacon"],
            variables["params"],
            {"tokens": tokens, "labels": tokens, "valid": valid},
            np.full(WINDOWS, ratio, np.int32),
            LossConfig(),
            outputs="logits",
        )
    logits = np.asarray(aux["logits"][1:], np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def _cast(variables: Mapping[str, Any], dtype: np.dtype) -> dict[str, Any]:
    """Casts the beacons, and leaves the base as it is."""
    beacon = jax.tree.map(lambda x: np.asarray(x, dtype), variables["beacon"])
    return {"params": variables["params"], "beacon": beacon}
