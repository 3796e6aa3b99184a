"""The training loss of a batch of windows (docs/specification.md section 3)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.core.lean_vjp import REMAT, window_loop
from beacon_jax.core.loss import IGNORE, token_losses
from beacon_jax.core.step import (
    NOOP,
    lookup,
    training_window,
)
from beacon_jax.model.decoder import Decoder, Entries, apply, constrain_entries
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.names import meant


@functools.partial(
    jax.jit,
    static_argnames=(
        "net",
        "skip_first_window_loss",
        "loss_average",
        "remat",
        "offload",
        "ratios",
        "memory_slots",
        "outputs",
    ),
)
def train_loss(
    net: Net,
    beacon: dict[str, Any],
    params: dict[str, Any],
    batch: dict[str, Array],
    plan: Int[Array, " N"],
    *,
    skip_first_window_loss: bool = False,
    loss_average: str = "token",
    remat: str = "lean",
    offload: bool = False,
    ratios: tuple[int, ...] | None = None,
    memory_slots: int = 0,
    outputs: str = "loss",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Loss of a training batch; differentiate in `beacon` (and `params` for "all").

    Args:
      net: with `partition`, arrays are split over its mesh; None leaves that to the
        caller.
      batch: tokens [N, B, W]; labels [N, B, W], shifted, -100 ignored; valid [N, B],
        real tokens per window, rows aligned at their last windows (`split_windows`
        with align="right"); optional weights [N, B, W] of single labels.
      plan: ratio of each window; the last one gets no beacons whatever it says.
      skip_first_window_loss: the paper's eq. 11 instead of the release's recipe.
      loss_average: "token", over all counted labels, or "row", a mean of row means.
      remat, offload: what the backward pass recomputes, and where it finds the memory:
        see `lean_vjp.window_loop`.
      ratios: the static ratios to compile; the config's (0 included) if not given.
      memory_slots: room for what the plan appends; 0: for the lowest ratio throughout.
      outputs: "loss", or "logits" to have aux["logits"] [N, B, W, V] as well.

    Returns:
      (loss, aux): window_loss and window_count [N], token_loss [N, B, W], row_loss and
      row_count [B] (sums of weighted losses and of weights).
    """
    if remat not in REMAT:
        near = meant(remat, REMAT)
        raise ValueError(
            f"remat={remat!r} is unknown: {near}use one of {', '.join(REMAT)}."
        )
    config, dtype = net.config, net.dtype
    tokens, valid = batch["tokens"], batch["valid"]
    n, b, w = tokens.shape
    variables = {"params": params, "beacon": beacon}
    if ratios is None:
        ratios = config.beacon.ratios if config.beacon else ()
    static = tuple(sorted({0, *ratios}))
    keep_plain = 0 in ratios or not ratios
    law, windows = Law.of(config, w), []
    for ratio in static:
        # The last window, which has no beacons, is not compressed.
        dropped = not ratio and not (keep_plain and n > 1)
        keep = () if dropped else tuple(law.kept_entries(ratio).tolist())
        windows.append(training_window(net, ratio, w, keep, remat=remat == "lean"))
    weights = batch.get("weights", jnp.ones((n, b, w), jnp.float32))
    live = jnp.arange(w) < valid[..., None]
    labels = jnp.where(live, batch["labels"], IGNORE)
    if skip_first_window_loss:
        first = jnp.argmax(valid > 0, axis=0)  # [B] step of each row's first window
        labels = jnp.where((jnp.arange(n)[:, None] == first)[..., None], IGNORE, labels)
    weights = jnp.where(labels == IGNORE, 0.0, weights)
    last = jnp.arange(n) == n - 1
    plan = jnp.where(last, 0, plan)
    index = jnp.where(jnp.any(valid > 0, axis=1), lookup(plan, static), NOOP)
    closes = (valid == w) & ~last[:, None]

    # Slots before each step; they depend on plan and lengths only.
    def count(slots, x):
        added = jnp.where(x["closes"], law.kept(x["ratio"], slots), 0)
        return slots + added, (slots, added)

    counted = {"ratio": plan, "closes": closes}
    _, (slots, added) = lax.scan(count, jnp.zeros((b,), jnp.int32), counted)
    xs = {
        "tokens": tokens,
        "index": index,
        "ratio": plan,
        "slots": slots,
        "added": added,
    }
    if len(static) == 1 and n == 1:
        del xs["index"]  # a plain model in one window: no switch at all
    shape = (
        config.num_layers,
        b,
        _train_slots(law, ratios, n, memory_slots),
        config.num_kv_heads,
        config.head_dim,
    )
    buffers = Entries(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    hidden = window_loop(
        net,
        tuple(windows),
        variables,
        constrain_entries(net, buffers),
        xs,
        remat=remat,
        offload=offload,
    )
    head = Decoder(net, Layout(1, 1, 0))
    logits = lambda h: apply(head, variables, h, method="logits")

    # Behind the loop: the head is compiled once, not once per ratio, and is not run
    # again when the windows are.
    # Recomputed as a whole: what a branch keeps is stacked over the windows, the head's
    # weights included (14 GiB at 7B and 128 windows).
    @jax.checkpoint
    def losses(x):
        index, hidden, labels = x
        return lax.cond(
            index == NOOP,
            lambda: jnp.zeros(labels.shape, jnp.float32),
            lambda: token_losses(logits, hidden, labels),
        )

    token_loss = lax.map(losses, (index, hidden, labels))
    weighted = token_loss * weights
    row_loss, row_count = weighted.sum((0, 2)), weights.sum((0, 2))
    if loss_average == "row":
        loss = jnp.mean(row_loss / jnp.where(row_count > 0, row_count, 1.0))
    elif loss_average == "token":
        total = row_count.sum()
        loss = row_loss.sum() / jnp.where(total > 0, total, 1.0)
    else:
        raise ValueError(f"loss_average={loss_average!r}: use 'token' or 'row'.")
    aux: dict[str, Any] = {
        "window_loss": weighted.sum((1, 2)),
        "window_count": weights.sum((1, 2)),
        "token_loss": token_loss,
        "row_loss": row_loss,
        "row_count": row_count,
    }
    if outputs == "logits":
        aux["logits"] = lax.map(logits, hidden)
    return loss, aux


def _train_slots(law: Law, ratios: Sequence[int], windows: int, slots: int) -> int:
    """The buffer's size: `slots` of memory and the open window. A plain model keeps
    everything."""
    if not any(r > 0 for r in ratios):
        return windows * law.window
    if not slots:
        slots = law.closed(min(r for r in ratios if r > 0), max(windows - 1, 1))
        slots += law.window if 0 in ratios else 0  # allowed once
    return slots + law.room(ratios)
