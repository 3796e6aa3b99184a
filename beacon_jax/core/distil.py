"""The teacher of distillation: the model's own full attention on the same rows.

Beacons learn from few tokens when every next-token distribution behind compressed
windows is held to the one that full attention gives. Teacher and student are one model:
the teacher is the frozen base at ratio 0. Its pass costs one forward and keeps hidden
states, [N, B, W, D]; its logits are made chunk by chunk beside the student's
(`loss.taught_losses`), never [T, V].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from beacon_jax.core.attention_loss import Compared, shares_of_tokens
from beacon_jax.core.law import Law
from beacon_jax.core.step import (
    NOOP,
    count_slots,
    empty_buffers,
    training_window,
)
from beacon_jax.core.window_loop import window_loop
from beacon_jax.model.net import Net


def teach(
    net: Net,
    variables: dict[str, Any],
    tokens: Int[Array, "N B W"],
    valid: Int[Array, "N B"],
    compared: Compared | None = None,
) -> tuple[Float[Array, "N B W D"], Float[Array, "N L B Q U"] | None]:
    """Runs full attention; no gradient goes through what it returns.

    Args:
      tokens, valid: as in `train_loss`: rows aligned at their last windows, all windows
        but the last ones full.
      compared: of all windows, queries whose attention is wanted.

    Returns:
      Final hidden states, and what the queries pay to the tokens of the student's slots
      (`attention_loss.shares_of_tokens`), or None.
    """
    n, b, w = tokens.shape
    law, plan = Law.of(net.config, w), jnp.zeros((n,), jnp.int32)
    variables = jax.tree.map(lax.stop_gradient, variables)
    keep = tuple(law.kept_entries(0).tolist()) if n > 1 else ()
    closes = (valid == w) & (jnp.arange(n) < n - 1)[:, None]
    slots, added = count_slots(law, plan, closes)
    xs: dict[str, Any] = {
        "tokens": tokens,
        "index": jnp.where(jnp.any(valid > 0, axis=1), 1, NOOP),
        "ratio": plan,
        "slots": slots,
        "added": added,
    }
    watch = None
    if compared is not None:
        xs["compared"], watch = compared, shares_of_tokens
    windows = (training_window(net, 0, w, keep, watched=watch is not None),)
    found = window_loop(
        net,
        windows,
        variables,
        empty_buffers(net, b, n * w),
        xs,
        # A lean loop has no gradient of more than a number, and here none is taken.
        remat="none" if watch else "lean",
        watch=watch,
    )
    return lax.stop_gradient(found)
