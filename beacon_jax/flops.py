"""FLOPs of a model's matrix products, from its configuration alone.

Multiplying [m, k] by [k, n] is 2 m k n. Counted are the projections of every layer, the
two products of attention, and lm_head; norms, rotary, softmax and biases are not (XLA
counts 0.5 to 0.9 % more with them, tests/model/test_flops.py). Letters are those of
`beacon_jax`; P are the weights that a row meets:

  linear     2 P per row, P = L (D N H + 2 D K H + N H D + 3 D F); a raw row meets base
             weights, a beacon row the beacons' own for the letters in `param`; with a
             rank r it meets the base's too, and L r (inputs + outputs) of its own
  attention  4 L N H per pair of a query and a key that it sees: entry i of a window
             behind m slots sees m + i + 1 keys, T entries T m + T (T + 1) / 2 in all
  lm_head    2 D V per row whose logits are wanted

These are MODEL FLOPs, the numerator of MFU (PaLM, arXiv 2204.02311, appendix B):
padding, masked keys and anything computed twice do not count, so that no program looks
better by doing more. PaLM takes T keys for every query, here only those it sees count.
A backward pass is

  linear     1 x forward for the cotangents of the rows, 1 x more for weights that train
  attention  2 x forward: four products (for q, k, v and the weights) instead of two
  lm_head    as linear

so that training all parameters is the usual 3 x forward. With a frozen base only the
beacon rows' own projections have weight gradients, and the rest of linear is 2 x.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.plan import at
from beacon_jax.model.config import ModelConfig, check_ratio
from beacon_jax.model.presets import count_params
from beacon_jax.model.shapes import param_shapes

TRAINABLE = ("beacon", "all")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Forward FLOPs by what spends them.

    Attributes:
      base: rows x base weights: raw rows, and what beacons share with them.
      beacon: beacon rows x their own projections.
      attention: scores and weighted sums.
      lm_head: logits.
    """

    base: int = 0
    beacon: int = 0
    attention: int = 0
    lm_head: int = 0

    @property
    def total(self) -> int:
        """Forward FLOPs of everything."""
        return self.base + self.beacon + self.attention + self.lm_head

    def __add__(self, other: "Flops") -> "Flops":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Flops(*(a + b for a, b in zip(mine, others, strict=True)))

    def training(self, trainable: str = "beacon") -> int:
        """Counts a forward and a backward pass.

        Args:
          trainable: "beacon", or "all" parameters.
        """
        if trainable not in TRAINABLE:
            raise ValueError(
                f"trainable={trainable!r} is unknown: use {' or '.join(TRAINABLE)}."
            )
        base = 3 if trainable == "all" else 2
        linear = base * (self.base + self.lm_head) + 3 * self.beacon
        return linear + 3 * self.attention


def window(
    config: ModelConfig, ratio: int, memory: int, *, raw: int | None = None
) -> Flops:
    """Counts one window of `raw` tokens (else W) with its beacons, without lm_head.

    Args:
      ratio: 0 for no beacons.
      memory: slots in front of the window.
    """
    raw = _law(config).window if raw is None else raw
    _check(config, ratio)
    beacons = int(_law(config).beacons(ratio, raw))
    entries = raw + beacons
    pairs = entries * memory + entries * (entries + 1) // 2
    return _spent(config, raw=raw, beacons=beacons, pairs=pairs)


def prefill(
    config: ModelConfig, length: int, ratio: int | Sequence[int], *, scored: int = 1
) -> Flops:
    """Counts a text of `length` tokens fed into an empty memory, the open window too.

    Args:
      ratio: of every window, or one per window, whose last goes on.
      scored: rows whose logits are wanted, the last one by default.
    """
    size = _law(config).window
    count = -(-length // size)
    plan = at(np.atleast_1d(np.asarray(ratio)), np.arange(count))
    valid = np.clip(length - size * np.arange(count), 0, size)
    return _sequences(config, plan[:, None], valid[:, None], scored=scored)


def full_attention(config: ModelConfig, length: int, *, scored: int = 1) -> Flops:
    """Counts the same text with causal attention over all of it and no beacons."""
    pairs = length * (length + 1) // 2
    return _spent(config, raw=length, pairs=pairs, scored=scored)


def decode_step(config: ModelConfig, entries: int, *, beacons: int = 0) -> Flops:
    """Counts one generated token.

    Args:
      entries: in the memory and the open window, before the token.
      beacons: that are due behind the token: at ratio r 1 with every r-th token.
    """
    rows = 1 + beacons
    pairs = rows * entries + rows * (rows + 1) // 2
    return _spent(config, raw=1, beacons=beacons, pairs=pairs, scored=1)


def training_step(
    config: ModelConfig,
    plans: Int[np.ndarray, "N P"],
    valid: Int[np.ndarray, "N B"],
    *,
    trainable: str = "beacon",
    taught: bool = False,
) -> int:
    """Counts a training step: forward and backward pass over a batch.

    Args:
      plans: ratio of every window, a column for each of P equal groups of rows, in
        order; the last window gets no beacons whatever it says (docs/specification.md
        section 3).
      valid: real tokens of every window, rows aligned at their last window as in
        `core.train_loss`. Logits of every real token count, labelled or not.
      trainable: "beacon" or "all".
      taught: full attention reads the batch, too (`core.distil`).
    """
    plans = np.repeat(plans, valid.shape[1] // plans.shape[1], axis=1)
    plans[-1] = 0
    scored = int(valid.sum())
    spent = _sequences(config, plans, valid, scored=scored).training(trainable)
    if taught:
        full = np.zeros_like(plans)
        spent += _sequences(config, full, valid, scored=scored).total
    return spent


def break_even(config: ModelConfig, ratio: int, longest: int = 2**20) -> int | None:
    """Finds the shortest prompt, in tokens, that costs no more FLOPs compressed.

    It is one of whole windows; None: there is none up to `longest` tokens.
    """
    law = _law(config)
    spent, memory = Flops(lm_head=full_attention(config, 0).lm_head), 0
    for length in range(law.window, longest + 1, law.window):
        spent += window(config, ratio, memory)
        memory += int(law.kept(ratio, memory))
        if spent.total <= full_attention(config, length).total:
            return length
    return None


def _law(config: ModelConfig) -> Law:
    # Without beacons the cut into windows changes nothing: one window does.
    return Law.of(config) if config.beacon else Law(2**62)


def _check(config: ModelConfig, ratios: Any) -> None:
    for ratio in np.unique(ratios):
        check_ratio(int(ratio), _law(config).window)


def _sequences(
    config: ModelConfig,
    plans: Int[np.ndarray, "N B"],
    valid: Int[np.ndarray, "N B"],
    *,
    scored: int,
) -> Flops:
    """Counts texts of windows, each behind what those before it left."""
    _check(config, plans)
    law = _law(config)
    plans, valid = plans.astype(np.int64), valid.astype(np.int64)
    beacons = law.beacons(plans, valid)
    behind = np.cumsum(valid > 0, axis=0) > 1
    closed = np.where(valid == law.window, law.kept(plans, behind), 0)
    slots = np.where(plans > 0, closed, valid)
    memory = np.cumsum(slots, axis=0) - slots
    entries = valid + beacons
    pairs = entries * memory + entries * (entries + 1) // 2
    return _spent(
        config,
        raw=int(valid.sum()),
        beacons=int(beacons.sum()),
        pairs=int(pairs.sum()),
        scored=scored,
    )


def _spent(
    config: ModelConfig, *, raw: int, beacons: int = 0, pairs: int = 0, scored: int = 0
) -> Flops:
    """Counts FLOPs of raw and beacon rows, pairs of query and key, and logits."""
    c = config
    layers = param_shapes(c)["params"]["layers"]
    weights = {
        name: math.prod(module["kernel"])
        for block in ("attention", "mlp")
        for name, module in layers[block].items()
        if "kernel" in module
    }
    everything, own, replaced = sum(weights.values()), 0, 0
    if c.beacon and c.beacon.rank:
        own = count_params(c)[1] - c.hidden_size  # less the embedding's row
        if c.beacon.anchor != "none":
            replaced = weights["k_proj"] + weights["v_proj"]
    elif c.beacon:
        own = replaced = sum(weights[f"{letter}_proj"] for letter in c.beacon.param)
    return Flops(
        base=2 * (raw * everything + beacons * (everything - replaced)),
        beacon=2 * beacons * own,
        attention=4 * c.num_layers * c.num_heads * c.head_dim * pairs,
        lm_head=2 * scored * c.hidden_size * c.vocab_size,
    )
