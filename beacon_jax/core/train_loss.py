"""The training loss of a batch of windows (docs/specification.md section 3)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from beacon_jax.core.attention_loss import (
    Compared,
    attention_loss,
    choose,
    slot_ends,
)
from beacon_jax.core.distil import teach
from beacon_jax.core.law import Law
from beacon_jax.core.loss import IGNORE, taught_losses, token_losses
from beacon_jax.core.step import (
    NOOP,
    Window,
    count_slots,
    empty_buffers,
    lookup,
    training_window,
)
from beacon_jax.core.window_loop import REMAT, window_loop
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import Decoder, Entries, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.names import check_choice, meant

KINDS = ("labels", "distil")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of a training loss and of its gradient; hashable.

    Attributes:
      kind: "labels", the cross entropy of labels, or "distil", the divergence from the
        model's own full attention (`distil.teach`) at every token behind the first
        window of its row, weighted as its label is (1 without one).
      label_weight: of "distil": how much of a label's cross entropy is added to the
        divergence at its token.
      attention_weight: how much is added of the cross entropy between the attention
        that tokens pay to the memory and the attention that the model's own full
        attention pays to what it stands for (`core.attention_loss`). A token behind
        its row's first window weighs what its loss does.
      attention_queries: tokens of a window whose attention is compared, at most: those
        of the largest weights. The others add nothing.
      skip_first_window: leaves out the labels of each row's first window (the paper's
        eq. 11) instead of counting all, as the release does.
      average: "token", over all that counts, or "row", a mean of row means.
      remat, offload: what the backward pass recomputes, and where it finds the memory:
        see `core.window_loop`.
      memory_slots: room for what a plan appends; 0: for the lowest ratio throughout.
      ratios: the static ratios to compile; None: those of the model's config.
    """

    kind: str = "labels"
    label_weight: float = 0.0
    attention_weight: float = 0.0
    attention_queries: int = 64
    skip_first_window: bool = False
    average: str = "token"
    remat: str = "lean"
    offload: bool = False
    memory_slots: int = 0
    ratios: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.remat not in REMAT:
            near = meant(self.remat, REMAT)
            raise ValueError(
                f"remat={self.remat!r} is unknown: {near}use one of {', '.join(REMAT)}."
            )
        check_choice("loss.kind", self.kind, KINDS)
        if self.average not in ("token", "row"):
            raise ValueError(f"loss_average={self.average!r}: use 'token' or 'row'.")

    def of_model(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the ratios that a window behind others may be compressed at."""
        if self.ratios is not None:
            return self.ratios
        return config.beacon.ratios if config.beacon else ()


@functools.partial(jax.jit, static_argnames=("net", "loss", "outputs"))
def train_loss(
    net: Net,
    beacon: dict[str, Any],
    params: dict[str, Any],
    batch: dict[str, Array],
    plan: Int[Array, " N"],
    loss: LossConfig = LossConfig(),
    *,
    outputs: str = "loss",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes the loss of a batch; differentiate in `beacon` (and `params` for "all").

    With kind="distil" the teacher has the parameters at hand and no gradient.

    Args:
      net: with `partition`, arrays are split over its mesh; None leaves that to the
        caller.
      batch: tokens [N, B, W]; labels [N, B, W], shifted, -100 ignored; valid [N, B],
        real tokens per window, rows aligned at their last windows (`split_windows`
        with align="right"); optional weights [N, B, W] of single labels.
      plan: ratio of each window; the last one gets no beacons whatever it says.
      outputs: "loss", or "logits" to have aux["logits"] [N, B, W, V] as well.

    Returns:
      (loss, aux): window_loss and window_count [N], token_loss [N, B, W], row_loss and
      row_count [B] (sums of weighted losses and of weights), attention_loss, which is
      part of the loss times its weight. What counts is a label or, with "distil", a
      token behind its row's first window.
    """
    tokens, valid = batch["tokens"], batch["valid"]
    n, _, w = tokens.shape
    law = Law.of(net.config, w)
    last = jnp.arange(n) == n - 1
    plan = jnp.where(last, 0, plan)
    windows = _windows(net, law, n, loss)
    buffers = _buffers(net, law, tokens.shape, loss)
    index = jnp.where(jnp.any(valid > 0, axis=1), lookup(plan, tuple(windows)), NOOP)
    slots, added = count_slots(law, plan, (valid == w) & ~last[:, None])
    xs: dict[str, Any] = {
        "tokens": tokens,
        "ratio": plan,
        "slots": slots,
        "added": added,
    }
    if len(windows) > 1 or n > 1:  # else a plain model in one window: no switch at all
        xs["index"] = index
    variables = {"params": params, "beacon": beacon}
    labels, weights = _labels(batch, loss)
    scored = {"labels": labels}
    behind, compared, watch = _behind_first(valid, w), None, None
    if loss.kind == "distil":
        scored["weights"] = loss.label_weight * (weights > 0)
        # An answer counts tenfold here, too; all tokens count.
        weights = jnp.where(labels == IGNORE, 1.0, weights) * behind
    row_count = weights.sum((0, 2))
    count = row_count.sum() if loss.average == "token" else row_count * row_count.size
    if loss.attention_weight > 0:
        share = weights / jnp.where(count > 0, count, 1.0)[..., None]
        ends = slot_ends(law, plan, slots, added, buffers.k.shape[2] - law.window)
        ends = jnp.broadcast_to(ends, (n, *ends.shape))
        compared = Compared(*choose(share * behind, loss.attention_queries), ends)
        watch = attention_loss
    if loss.kind == "distil" or compared is not None:
        taught, shares = teach(net, variables, tokens, valid, compared)
        if loss.kind == "distil":
            scored["taught"] = taught
        if compared is not None:
            xs["compared"] = compared._replace(shares=shares)
    hidden, paid = window_loop(
        net,
        tuple(windows.values()),
        variables,
        buffers,
        xs,
        remat=loss.remat,
        offload=loss.offload,
        watch=watch,
    )
    scored["hidden"] = hidden
    token_loss, logits = _losses(net, variables, index, scored)
    weighted = token_loss * weights
    row_loss = weighted.sum((0, 2))
    if loss.average == "row":
        value = jnp.mean(row_loss / jnp.where(row_count > 0, row_count, 1.0))
    else:
        value = row_loss.sum() / jnp.where(count > 0, count, 1.0)
    attention = jnp.zeros(()) if paid is None else paid.sum()
    value = value + loss.attention_weight * attention
    aux: dict[str, Any] = {
        "window_loss": weighted.sum((1, 2)),
        "window_count": weights.sum((1, 2)),
        "token_loss": token_loss,
        "row_loss": row_loss,
        "row_count": row_count,
        "attention_loss": attention,
    }
    if outputs == "logits":
        aux["logits"] = lax.map(logits, hidden)
    return value, aux


def _windows(net: Net, law: Law, count: int, loss: LossConfig) -> dict[int, Window]:
    """Makes the window of each static ratio, {ratio: window} in order."""
    ratios = loss.of_model(net.config)
    made = {}
    for ratio in sorted({0, *ratios}):
        # The last window, which has no beacons, is not compressed.
        kept = ratio or (count > 1 and (0 in ratios or not ratios))
        keep = tuple(law.kept_entries(ratio).tolist()) if kept else ()
        options = {"remat": loss.remat == "lean"}
        options["watched"] = loss.attention_weight > 0
        made[ratio] = training_window(net, ratio, law.window, keep, **options)
    return made


def _buffers(net: Net, law: Law, shape: tuple[int, ...], loss: LossConfig) -> Entries:
    """Makes empty buffers [L, B, S, K, H]: the memory, and the open window behind it.

    A plain model keeps everything.
    """
    windows, rows, w = shape
    ratios = loss.of_model(net.config)
    compressing = [r for r in ratios if r > 0]
    if not compressing:
        size = windows * w
    else:
        lowest = law.closed(min(compressing), max(windows - 1, 1))
        lowest += w if 0 in ratios else 0  # allowed once
        size = (loss.memory_slots or lowest) + law.room(ratios)
    return empty_buffers(net, rows, size)


def _labels(
    batch: dict[str, Array], loss: LossConfig
) -> tuple[Int[Array, "N B W"], Float[Array, "N B W"]]:
    """Returns the labels that count, -100 elsewhere, and their weights, 0 elsewhere."""
    valid, labels = batch["valid"], batch["labels"]
    w = labels.shape[-1]
    labels = jnp.where(jnp.arange(w) < valid[..., None], labels, IGNORE)
    if loss.skip_first_window:
        labels = jnp.where(_behind_first(valid, w) > 0, labels, IGNORE)
    weights = batch.get("weights", jnp.ones(labels.shape, jnp.float32))
    return labels, jnp.where(labels == IGNORE, 0.0, weights)


def _behind_first(valid: Int[Array, "N B"], window: int) -> Float[Array, "N B W"]:
    """Returns 1 for real tokens behind the first window of their row, else 0."""
    first = jnp.argmax(valid > 0, axis=0)  # [B] step of each row's first window
    behind = jnp.arange(len(valid))[:, None] > first
    live = jnp.arange(window) < valid[..., None]
    return (live & behind[..., None]).astype(jnp.float32)


def _losses(
    net: Net,
    variables: dict[str, Any],
    index: Int[Array, " N"],
    scored: dict[str, Array],
) -> tuple[Float[Array, "N B W"], Any]:
    """Returns the losses of all tokens, and the function that makes logits.

    scored: hidden [N, B, W, D] and labels [N, B, W]; of distillation taught
    [N, B, W, D] and weights of the labels [N, B, W], too.

    This comes behind the loop over windows. So the head is compiled once, not once per
    ratio, and is not run again when the windows are.
    """
    head = Decoder(net, Layout(1, 1, 0))
    logits = lambda h: apply(head, variables, h, method="logits")

    # Recomputed as a whole: what a branch keeps is stacked over the windows, the head's
    # weights included (14 GiB at 7B and 128 windows).
    @jax.checkpoint
    def losses(x):
        index, scored = x
        some = taught_losses if "taught" in scored else token_losses
        return lax.cond(
            index == NOOP,
            lambda: jnp.zeros(scored["labels"].shape, jnp.float32),
            lambda: some(logits, **scored),
        )

    return lax.map(losses, (index, scored)), logits
