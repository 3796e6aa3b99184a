"""Next-token cross entropy (SPEC section 3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE = -100


def token_losses(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "B W D"],
    labels: Int[Array, "B W"],
    *,
    chunk: int = 256,
) -> Float[Array, "B W"]:
    """Losses in nats of labels that are shifted already; 0 where the label is -100.

    `logits` maps hidden states to float32 logits. At most `chunk` positions of a row
    are expanded to V at a time, forward and backward.
    """

    @jax.checkpoint
    def losses(h, y):
        scores = logits(h)
        target = jnp.take_along_axis(scores, jnp.maximum(y, 0)[..., None], axis=-1)
        loss = jax.nn.logsumexp(scores, axis=-1) - target[..., 0]
        return jnp.where(y == IGNORE, 0.0, loss)

    b, w, d = hidden.shape
    if w <= chunk or w % chunk:
        return losses(hidden, labels)
    parts = (
        hidden.reshape(b, -1, chunk, d).swapaxes(0, 1),
        labels.reshape(b, -1, chunk).swapaxes(0, 1),
    )
    out = jax.lax.map(lambda p: losses(*p), parts)
    return out.swapaxes(0, 1).reshape(b, w)
