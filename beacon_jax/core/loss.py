"""Next-token cross entropy (docs/specification.md section 3)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

IGNORE = -100
# Positions of all rows together that are expanded to V at a time where nothing is
# trained: 311 MB of float32 logits with Qwen2's 151,936 tokens.
SCORED = 512
LIKELY = 20  # most likely tokens that are told, as many as OpenAI's protocol has


class Likely(NamedTuple):
    """How likely tokens were, as natural logarithms.

    Attributes:
      chosen: of the token itself.
      ids, best: of the `LIKELY` most likely tokens, in descending order; as many as
        there are in a smaller vocabulary.
    """

    chosen: Float[Array, "*N"] | Float[np.ndarray, "*N"]
    ids: Int[Array, "*N K"] | Int[np.ndarray, "*N K"]
    best: Float[Array, "*N K"] | Float[np.ndarray, "*N K"]


def likely(logits: Float[Array, "*N V"], tokens: Int[Array, "*N"]) -> Likely:
    """Computes how likely `tokens` and the most likely others are."""
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(scores, jnp.maximum(tokens, 0)[..., None], axis=-1)
    best, ids = jax.lax.top_k(scores, min(LIKELY, scores.shape[-1]))
    return Likely(chosen[..., 0], ids.astype(jnp.int32), best)


def token_likely(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "B W D"],
    labels: Int[Array, "B W"],
) -> Likely:
    """Computes `likely` of shifted labels, `SCORED` positions at a time."""
    return _by_chunk(lambda h, y: likely(logits(h), y), hidden, labels)


def _by_chunk(
    score: Callable[[Array, Array], Any],
    hidden: Float[Array, "B W D"],
    labels: Int[Array, "B W"],
) -> Any:
    """Calls `score` for `SCORED` positions at a time; joins what it returns."""
    b, w, d = hidden.shape
    chunk = next(n for n in range(min(max(SCORED // b, 1), w), 0, -1) if w % n == 0)
    parts = (
        hidden.reshape(b, -1, chunk, d).swapaxes(0, 1),
        labels.reshape(b, -1, chunk).swapaxes(0, 1),
    )
    out = jax.lax.map(lambda part: score(*part), parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, w, *x.shape[3:]), out)


def token_losses(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "B W D"],
    labels: Int[Array, "B W"],
    *,
    chunk: int = 256,
) -> Float[Array, "B W"]:
    """Computes losses in nats of shifted labels; 0 where the label is -100.

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


def taught_losses(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "B W D"],
    taught: Float[Array, "B W D"],
    labels: Int[Array, "B W"],
    weights: Float[Array, "B W"],
    *,
    chunk: int = 256,
) -> Float[Array, "B W"]:
    """Divergences in nats from what a teacher predicts, plus weighted label losses.

    Of every position KL(teacher || student), and `weights` times the loss of its label.
    As in `token_losses`, `chunk` positions of a row are expanded to V at a time.

    Args:
      hidden, taught: final hidden states of the student and of the teacher, who share
        `logits`.
      weights: 0 where a label is -100.
    """

    @jax.checkpoint
    def losses(h, t, y, weight):
        student = jax.nn.log_softmax(logits(h))
        teacher = jax.lax.stop_gradient(jax.nn.log_softmax(logits(t)))
        divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
        label = jnp.take_along_axis(student, jnp.maximum(y, 0)[..., None], axis=-1)
        return divergence - weight * label[..., 0]

    parts = (hidden, taught, labels, weights)
    b, w = labels.shape
    if w <= chunk or w % chunk:
        return losses(*parts)
    cut = lambda x: x.reshape(b, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(lambda p: losses(*p), tuple(map(cut, parts)))
    return out.swapaxes(0, 1).reshape(b, w)


def token_scores(
    logits: Callable[[Array], Array],
    hidden: Float[Array, "B W D"],
    labels: Int[Array, "B W"],
) -> tuple[Float[Array, "B W"], Bool[Array, "B W"]]:
    """Computes `token_losses`, and whether each label is the most likely token.

    It has no gradient. `SCORED` positions are expanded at a time, and parts without a
    label cost nothing: lm_head is a quarter of Qwen2-0.5B, and a few labels behind a
    long context are the usual case.
    """

    def some(h, y):
        scores = logits(h)
        target = jnp.take_along_axis(scores, jnp.maximum(y, 0)[..., None], axis=-1)
        loss = jax.nn.logsumexp(scores, axis=-1) - target[..., 0]
        return jnp.where(y == IGNORE, 0.0, loss), jnp.argmax(scores, axis=-1) == y

    def none(h, y):
        return jnp.zeros(y.shape, jnp.float32), jnp.zeros(y.shape, bool)

    def scored(h, y):
        return jax.lax.cond(jnp.any(y != IGNORE), some, none, h, y)

    return _by_chunk(scored, hidden, labels)
