"""Trains the correction of `Retention` by distillation, in minutes.

A text is read with full attention and compressed; the window behind it is to be
predicted as full attention predicts it. Gradients go through that window alone, so a
step costs little more than reading the text.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.loss import taught_losses
from beacon_jax.core.step import training_window
from beacon_jax.inference.compressors.attention_matching import Kept, Seen
from beacon_jax.inference.compressors.correction import change, changeable
from beacon_jax.inference.compressors.piece import Made, Piece
from beacon_jax.inference.compressors.retention import Retention
from beacon_jax.inference.fit_retention import check_rows
from beacon_jax.inference.piecewise import close, make_piece
from beacon_jax.model.buffers import Biased, Buffer, resized
from beacon_jax.model.decoder import Decoder, apply, split_layers
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

WARMUP, END = 10, 0.05  # steps, and the learning rate's last share
HELD = 12  # texts that are not trained on: they tell whether the correction helps


@dataclasses.dataclass(frozen=True)
class Correcting:
    """Settings of the training.

    Attributes:
      steps: of Adam.
      texts: of each.
      ratios: of the steps, in turn.
      length: tokens of a text; its last quarter is predicted.
      lr: the learning rate at its highest.
      seed: of the texts.
    """

    steps: int = 75
    texts: int = 2
    ratios: tuple[int, ...] = (2, 4, 8)
    length: int = 1024
    lr: float = 7e-4
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "texts": 1, "length": 128, "seed": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be >= {low}.")
        past = self.length - self.window
        if not self.ratios or not all(2 <= r <= past // 8 for r in self.ratios):
            raise ValueError(
                f"ratios={self.ratios} must be numbers from 2 to {past // 8}, which "
                f"leave 8 slots of the {past} tokens in front of the last quarter."
            )
        if not 0 < self.lr < np.inf:
            raise ValueError(f"lr={self.lr} must be a number above 0, as 7e-4.")

    @property
    def window(self) -> int:
        """Tokens of a text that are predicted."""
        return self.length // 4


class Trained(NamedTuple):
    """What a training made.

    Attributes:
      retention: with the correction; as it was given where none helps.
      before, after: divergence from full attention without and with the correction,
        nats per token, of texts that were not trained on.
    """

    retention: Retention
    before: float
    after: float


class _Read(NamedTuple):
    """Texts that were compressed, and what full attention predicts behind them.

    Attributes:
      k, v: slots of the memory; the values are those without a correction.
      slots: how many of them are in use.
      free: those that are corrected.
      crowd: log of the tokens per slot.
      tokens: the window behind.
      taught: its final hidden states behind the whole text.
    """

    k: Biased
    v: Float[Array, "L B n K H"]
    slots: Int[Array, " B"]
    free: Bool[Array, "L B K n"]
    crowd: Float[Array, " B"]
    tokens: Int[Array, "B W"]
    taught: Float[Array, "B W D"]


def train_correction(
    model: "Model",
    retention: Retention,
    text: Int[np.ndarray, " n"],
    settings: Correcting = Correcting(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Trains a correction for what a `Retention` makes; the model is not changed.

    Args:
      retention: its own correction, if it has one, is not used.
      text: tokens of documents, from which texts are cut at random.
      on_progress: called with (texts read, of how many).

    Raises:
      ValueError: too little text, positions that the model was not trained for, or a
        mesh that splits rows or layers.
    """
    check(model, text, settings)
    back = max(len(text) // 10, settings.length)
    held_reads = -(-HELD // settings.texts)
    total, done = settings.steps + held_reads, 0

    def reads(text: Int[np.ndarray, " n"], count: int) -> Iterator[_Read]:
        nonlocal done
        rng = np.random.default_rng(settings.seed)
        for number in range(count):
            starts = rng.integers(0, len(text) - settings.length + 1, settings.texts)
            rows = np.stack([text[at : at + settings.length] for at in starts])
            ratio = settings.ratios[number % len(settings.ratios)]
            yield _read(model, retention, rows, settings.window, ratio)
            done += 1
            if on_progress:
                on_progress(done * settings.texts, total * settings.texts)

    held = list(reads(text[-back:], held_reads))
    found = _trained(model, reads(text[:-back], settings.steps), _unit(held), settings)
    run = jax.jit(functools.partial(_divergence, model.net))
    before, after = (
        float(np.mean([run(model.variables, read, x) for read in held]))
        for x in (jnp.zeros_like(found), found)
    )
    helps = np.asarray(found) if after < before else None
    return Trained(retention.with_correction(helps), before, after)


def check(model: "Model", text: Int[np.ndarray, " n"], settings: Correcting) -> None:
    """Raises ValueError for what cannot be trained."""
    check_rows(model, text, settings.length, rows=2)  # one is not trained on
    if model.partition is None:
        return
    shape = model.partition.mesh.shape
    if any(n > 1 for axis, n in shape.items() if axis != "tensor"):
        mesh = ",".join(f"{axis}:{n}" for axis, n in shape.items())
        raise ValueError(
            f"mesh={mesh} splits more than heads, but a correction is trained on few "
            "rows at a time, through all layers: split heads alone, as tensor:8, train "
            "on one device, or leave it out (--steps=0)."
        )


def _trained(
    model: "Model",
    reads: Iterator[_Read],
    unit: Float[Array, "L K H"],
    settings: Correcting,
) -> Float[Array, "L K H"]:
    """Takes a step with each read; `unit` is what a step of rate 1 is measured in."""
    most = max(settings.steps, WARMUP + 1)
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0, settings.lr, WARMUP, most, settings.lr * END
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98)
    )

    @jax.jit
    def step(weights: Array, state: Any, variables: Any, read: _Read) -> Any:
        loss = lambda weights: _divergence(model.net, variables, read, weights * unit)
        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jnp.zeros(unit.shape)
    state = optimizer.init(weights)
    for read in reads:
        weights, state = step(weights, state, model.variables, read)
    return weights * unit


def _unit(held: list[_Read]) -> Float[Array, "L K H"]:
    """Measures the root mean square of the values of each head."""

    def square(read: _Read) -> Float[Array, "L K"]:
        free = jnp.moveaxis(read.free, 2, 3)  # [L, B, n, K]
        squares = (read.v.astype(jnp.float32) ** 2).mean(-1) * free
        return squares.sum((1, 2)) / jnp.maximum(free.sum((1, 2)), 1)

    size = jnp.sqrt(jnp.mean(jnp.stack([square(x) for x in held]), 0))[..., None]
    return jnp.broadcast_to(size, (*size.shape[:2], held[0].v.shape[-1]))


class _Watched(Retention):
    """A `Retention` without a correction that keeps what training has to know."""

    def __init__(self, of: Retention, tokens: Int[Array, "B W"]):
        super().__init__(of.weights, of.bias, of.threshold, of.sample)
        self._tokens = tokens

    def made(self, piece: Piece, seen: Seen, kept: Kept, size: int) -> Made:
        stop = jnp.asarray(piece.stop, jnp.int32)
        entries = piece.state.k, piece.state.v
        self.taught = _predicted(
            piece.net, piece.variables, *entries, self._tokens, stop
        )
        self.free = changeable(kept, size)
        return super().made(piece, seen, kept, size)


def _read(
    model: "Model",
    retention: Retention,
    rows: Int[np.ndarray, "B T"],
    window: int,
    ratio: int,
) -> _Read:
    """Compresses the front of texts; full attention predicts their last window."""
    past, tokens = rows[:, :-window], jnp.asarray(rows[:, -window:], jnp.int32)
    state = model.compress(list(past), ratio=0).state
    stop = np.full(len(rows), past.shape[1])
    none = [np.zeros(0, int)] * len(rows)
    piece = make_piece(model, state, np.zeros_like(stop), stop, list(past), none)
    watched, count = _Watched(retention, tokens), stop // ratio
    state = close(watched, piece, count)
    n = watched.free.shape[-1]
    assert isinstance(state.k, Biased) and isinstance(state.v, jax.Array)
    k = Biased(state.k.entries[:, :, :n], state.k.bias[..., :n])
    crowd = jnp.log(jnp.asarray(stop / count, jnp.float32))
    slots = jnp.asarray(count, jnp.int32)
    return _Read(
        k, state.v[:, :, :n], slots, watched.free, crowd, tokens, watched.taught
    )


def _divergence(
    net: Net, variables: Any, read: _Read, correction: Float[Array, "L K H"]
) -> Float[Array, ""]:
    """Computes how far the window's predictions are from those of full attention."""
    more = change(read.free, read.crowd, correction)
    v = (read.v.astype(jnp.float32) + more).astype(read.v.dtype)
    hidden = _behind(net, variables, read.k, v, read.tokens, read.slots)
    head = Decoder(net, Layout(1, 1, 0))
    logits = lambda h: apply(head, variables, h, method="logits")
    none = jnp.zeros(read.tokens.shape)
    return taught_losses(logits, hidden, read.taught, read.tokens, none).mean()


@functools.partial(jax.jit, static_argnames="net")
def _predicted(net, variables, k, v, tokens, prefix) -> Float[Array, "B W D"]:
    return _behind(net, variables, k, v, tokens, prefix)


def _behind(
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
    outer, layers = split_layers(variables)

    @jax.checkpoint
    def layer(x, of_layer):
        weights, k, v = of_layer
        return window.layer(weights, x, k, v, prefix)[0], None

    x, _ = lax.scan(layer, window.begin(outer, tokens), (layers, k, v))
    return window.finish(outer, x)
