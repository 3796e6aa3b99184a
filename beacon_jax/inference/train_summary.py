"""Trains the summaries of `Retention` by distillation.

A text is read with full attention and compressed; the window behind it is to be
predicted as full attention predicts it. Gradients go through that window alone, so a
step costs little more than reading the text.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from beacon_jax.core.loss import taught_losses
from beacon_jax.core.step import training_window
from beacon_jax.inference.compressors import summary
from beacon_jax.inference.compressors.attention_matching import matched
from beacon_jax.inference.compressors.piece import Kept, Piece
from beacon_jax.inference.compressors.retention import Retention
from beacon_jax.inference.compressors.summary import Slots, Summary
from beacon_jax.inference.fit_retention import check_text
from beacon_jax.inference.piecewise import make_piece
from beacon_jax.model.buffers import Biased, Buffer, resized
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

WARMUP, END = 10, 0.05  # steps, and the learning rate's last share


@dataclasses.dataclass(frozen=True)
class Steps:
    """Settings of the training.

    Attributes:
      count: steps, of one text each.
      ratios: in turn.
      length: tokens of a text, with the window that is predicted.
      window: of it, tokens.
      lr: the learning rate at its highest.
      seed: of texts and start.
    """

    count: int = 300
    ratios: tuple[int, ...] = (2, 4, 8)
    length: int = 1024
    window: int = 256
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"steps={self.count} must be >= 1.")
        if self.length < 2 * self.window:
            raise ValueError(
                f"length={self.length} must be at least two windows of {self.window}."
            )
        past = self.length - self.window
        if not self.ratios or not all(1 <= r <= past for r in self.ratios):
            raise ValueError(
                f"ratios={self.ratios} must be numbers from 1 to {past}, the tokens in "
                "front of the window."
            )
        if not 0 <= self.lr < np.inf:
            raise ValueError(f"lr={self.lr} must be a number from 0 on, as 1e-3.")


class Trained(NamedTuple):
    """What a training made.

    Attributes:
      retention: with the summary.
      losses: of each step, divergence from full attention, nats per token.
    """

    retention: Retention
    losses: Float[np.ndarray, " n"]


class _Row(NamedTuple):
    slots: Slots
    tokens: Int[Array, "1 W"]
    taught: Float[Array, "1 W D"]


def train_summary(
    model: "Model",
    retention: Retention,
    text: Int[np.ndarray, " n"],
    settings: Steps = Steps(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Trains a summary for what a `Retention` keeps; the model is not changed.

    Args:
      retention: what it has as a summary is where training begins.
      text: tokens of documents, from which texts are cut at random.
      on_progress: called with (steps done, of how many).
    """
    check(model, text, settings)
    rng = np.random.default_rng(settings.seed)
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0,
        settings.lr,
        WARMUP,
        max(settings.count, WARMUP + 1),
        settings.lr * END,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98)
    )
    begun = retention.summary or summary.fresh(model.config, settings.seed)
    weights = Summary(*(jnp.asarray(x, jnp.float32) for x in begun))
    state, losses = optimizer.init(weights), []

    @jax.jit
    def step(weights: Summary, state: Any, variables: Any, row: _Row) -> Any:
        run = functools.partial(_divergence, model.net, variables, row)
        loss, gradient = jax.value_and_grad(run)(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    for number in range(settings.count):
        start = int(rng.integers(0, len(text) - settings.length + 1))
        ratio = settings.ratios[number % len(settings.ratios)]
        piece = text[start : start + settings.length]
        row = _row(model, retention, piece, settings.window, ratio)
        weights, state, loss = step(weights, state, model.variables, row)
        losses.append(float(loss))
        if on_progress:
            on_progress(number + 1, settings.count)
    return Trained(retention.with_summary(weights), np.asarray(losses))


def check(model: "Model", text: Int[np.ndarray, " n"], settings: Steps) -> None:
    """Raises ValueError for what cannot be trained: too little text, split rows."""
    check_text(text, settings.length)
    if model.partition is None:
        return
    try:
        model.partition.spec(("batch",), (1,))
    except ValueError as error:
        mesh = ",".join(f"{k}:{n}" for k, n in model.partition.mesh.shape.items())
        raise ValueError(
            f"mesh={mesh} splits rows, but summaries are trained on one text at a "
            "time: split heads alone, as tensor:8, or train on one device."
        ) from error


def _row(
    model: "Model", retention: Retention, text: Any, window: int, ratio: int
) -> _Row:
    """Compresses the front of a text, and asks full attention about its last window."""
    past, tokens = text[:-window], jnp.asarray(text[None, -window:], jnp.int32)
    state = model.compress(past, ratio=0).state
    stop = np.asarray([len(past)])
    piece = make_piece(
        model, state, np.zeros_like(stop), stop, [past], [np.zeros(0, int)]
    )
    taught = _predicted(
        model.net, model.variables, state.k, state.v, tokens, jnp.asarray(stop)
    )
    return _Row(kept_slots(retention, piece, len(past) // ratio), tokens, taught)


def kept_slots(retention: Retention, piece: Piece, count: int) -> Slots:
    """Chooses the slots of a piece of one row that fills a memory of its own."""
    each, seen = jnp.asarray([count], jnp.int32), retention.observe(piece)
    scores = retention.exact(retention.score(piece, seen, each))
    scores = jnp.where(jnp.asarray(piece.inside)[None, :, None], scores, -jnp.inf)
    kept = Kept.of(piece, scores, each)
    found = matched(piece.net, piece.state, *seen, kept, count)
    return summary.slots_of(piece.net, piece.state, kept, found)


def _divergence(
    net: Net, variables: Any, row: _Row, weights: Summary
) -> Float[Array, ""]:
    """Computes how far the window's predictions are from those of full attention."""
    k, v = summary.gained(weights, row.slots)
    count = k.shape[2]
    k = rotate(k, *cos_sin(net.config, jnp.arange(count), scaled=False))
    k, v = (x.astype(net.dtype) for x in (k, v))
    k = Biased(k, lax.stop_gradient(row.slots.bias))
    prefix = jnp.full((len(row.tokens),), count, jnp.int32)
    hidden = _read(net, variables, k, v, row.tokens, prefix)
    head = Decoder(net, Layout(1, 1, 0))
    logits = lambda h: apply(head, variables, h, method="logits")
    none = jnp.zeros(row.tokens.shape)
    return taught_losses(logits, hidden, row.taught, row.tokens, none).mean()


@functools.partial(jax.jit, static_argnames="net")
def _predicted(net, variables, k, v, tokens, prefix) -> Float[Array, "B W D"]:
    return _read(net, variables, k, v, tokens, prefix)


def _read(
    net: Net,
    variables: Any,
    k: Buffer,
    v: Buffer,
    tokens: Int[Array, "B W"],
    prefix: Int[Array, " B"],
) -> Float[Array, "B W D"]:
    """Reads a window behind `prefix` slots; layers are recomputed for gradients."""
    size = tokens.shape[1]
    window = training_window(net, 0, size, ())
    k, v = (resized(x, x.shape[2] + size) for x in (k, v))
    layers = {
        part: tree["layers"] for part, tree in variables.items() if "layers" in tree
    }
    outer = {
        part: {name: x for name, x in tree.items() if name != "layers"}
        for part, tree in variables.items()
    }

    @jax.checkpoint
    def layer(x, of_layer):
        weights, k, v = of_layer
        return window.layer(weights, x, k, v, prefix)[0], None

    x, _ = lax.scan(layer, window.begin(outer, tokens), (layers, k, v))
    return window.finish(outer, x)
