"""Trains the parts of the experiment: the base, and what compresses on top of it.

A part is a loss, where it starts from, and stages of texts. Many steps are one compiled
call: a step of a model of this size is too short to be started from Python each time.
A part is saved as it goes, and a finished one is read back.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from beacon_jax.core.loss import IGNORE
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.data.windows import split_windows
from beacon_jax.experiments.miniature import data
from beacon_jax.experiments.miniature.data import Recall, Texts
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from beacon_jax.paths import whole_file
from beacon_jax.progress import say

type Tree = dict[str, Any]
type Batch = dict[str, np.ndarray]
# (what is trained, what is frozen, a batch) -> (loss, recall: the share of answers).
type Loss = Callable[[Tree, Tree, Any], tuple[Array, Array]]

WINDOW, RATIOS, UNSEEN = 32, (2, 4, 8), 16
CONTEXT, MOST_PAIRS = 128, 24
TRAINED = Recall(CONTEXT, 8, MOST_PAIRS, questions=WINDOW // 2)
# A Llama of 0.30M parameters.
PLAIN = ModelConfig(
    family="llama",
    vocab_size=data.VOCAB,
    hidden_size=96,
    intermediate_size=192,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=24,
    max_position=TRAINED.length,
    tie_embeddings=True,
    bos_ids=(data.EOS,),
    eos_ids=(data.EOS,),
)
WARMUP, DECAY_START, LAST_RATE = 100, 0.6, 0.05  # steps; shares of the steps and of lr
SAVE_EVERY = 250  # steps
# Shares of the steps without the attention of a layer, counted from 0: in the base's
# first stage, its second, later ones. Else layer 1 recalls and layer 2 does nothing; a
# beacon then has to read all that it hands over in layer 0.
WITHOUT = {1: 1.0}, {1: 0.4, 2: 0.6}, {1: 0.2, 2: 0.3}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run, the same for all its seeds.

    Attributes:
      scale: of the numbers of steps; a run of a few steps shows that all works.
      base_steps: of the base's last stage, texts as long as those of the beacons.
        Recall is there after 200, but symbols still cost 3.5 nats of the 1.4 they have
        to, and beacons then learn what the base has not.
      beacon_steps: of every way to compress.
      dropped: share of the base's heads that a step of its later stages is without.
        Else no head recalls alone, and a beacon has one key and value per head.
      base_batch, batch: rows of a step.
      base_lr, lr: Adam's at their peaks, of the base and of every way to compress.
        After 400 steps an answer at x2 cost 2.3 nats at 4e-3, 3.0 at 2e-3 and 8e-3.
      chunk: steps of a compiled call.
      sequences: of a cell; each has `questions`.
    """

    scale: float = 1.0
    base_steps: int = 1200
    beacon_steps: int = 3000
    dropped: float = 0.3
    base_batch: int = 32
    batch: int = 16
    base_lr: float = 2e-3
    lr: float = 4e-3
    chunk: int = 50
    sequences: int = 128
    questions: int = 8

    def steps(self, whole: int) -> int:
        """Returns so many steps at this scale, one at least."""
        return max(round(whole * self.scale), 1)


def beacon_config(placement: str = "interleave") -> ModelConfig:
    """Makes the model with beacons of its own q, k and v, the paper's form."""
    beacon = BeaconConfig(window=WINDOW, ratios=RATIOS, placement=placement)
    return dataclasses.replace(PLAIN, beacon=beacon)


def init_base(seed: int) -> Tree:
    """Draws the base's parameters, small ones: standard deviations are 0.02.

    Recall of repeated segments began after 250 steps. From weights of 1/sqrt(fan in),
    five times as large, it had not begun after 500.
    """
    return nn.unbox(init_variables(PLAIN, jax.random.key(seed)))["params"]


# --- losses ----------------------------------------------------------------------


def plain_loss(trained: Tree, frozen: Tree, batch: Any) -> tuple[Array, Array]:
    """Computes the loss of the base itself: one window, which is the whole row.

    batch["heads"] [L, N] are factors of what the heads write.
    """
    del frozen
    batch = dict(batch)
    params = _with_heads(trained, batch.pop("heads"))
    return _loss(Net(PLAIN, attention="reference"), {}, params, batch)


def beacon_loss(
    config: ModelConfig, trained: Tree, frozen: Tree, batch: Any
) -> tuple[Array, Array]:
    """Computes the loss of beacons on a frozen base, at the batch's plan."""
    return _loss(Net(config, attention="reference"), trained, frozen, batch)


def _loss(net: Net, beacon: Tree, params: Tree, batch: Any) -> tuple[Array, Array]:
    batch = dict(batch)
    answers, plan = batch.pop("answers"), batch.pop("plan")
    # Plain reverse mode keeps the activations of every ratio's branch, taken or not. It
    # takes 0.3 s of processor time a step, the lean backward pass 0.2.
    kind = LossConfig(remat="lean" if net.config.beacon else "none")
    loss, aux = train_loss(net, beacon, params, batch, plan, kind)
    return loss, recalled(aux["token_loss"], answers)


def _with_heads(params: Tree, factors: Float[Array, "L N"]) -> Tree:
    layers = params["layers"]
    attention = layers["attention"]
    kernel = attention["o_proj"]["kernel"] * factors[..., None, None]
    attention = {**attention, "o_proj": {"kernel": kernel}}
    return {**params, "layers": {**layers, "attention": attention}}


def recalled(token_loss: Array, answers: Array) -> Float[Array, ""]:
    """Returns the share of answers whose probability is above one half."""
    hits = jnp.where(answers, token_loss < jnp.log(2.0), False)
    return hits.sum() / jnp.maximum(answers.sum(), 1)


# --- batches ---------------------------------------------------------------------


def whole_rows(texts: Texts) -> Batch:
    """Makes a batch of one window per row."""
    return in_windows(texts, texts.tokens.shape[1], [0])


def in_windows(texts: Texts, window: int, plan: Any) -> Batch:
    """Makes a batch of windows [N, B, W]; plan: their ratios, or one for all."""
    cut = lambda x, fill: split_windows(x, None, window, fill=fill)
    tokens, valid = cut(texts.tokens, data.EOS)
    return {
        "tokens": tokens,
        "valid": valid,
        "labels": cut(texts.labels, IGNORE)[0],
        "weights": cut(texts.weights, 0)[0],
        "answers": cut(texts.answers, False)[0],
        "plan": np.broadcast_to(np.asarray(plan, np.int32), len(tokens)),
    }


def repeated(without: dict[int, float], rows: int, rng: np.random.Generator) -> Batch:
    """Draws the warm-up of the base: repeated segments, all of them.

    Args:
      without: shares of steps without the attention of a layer.
    """
    batch = whole_rows(data.repeats(rng, rows, 48))
    return batch | {"heads": heads_left(0.0, without, rng)}


def heads_left(
    dropped: float, without: dict[int, float], rng: np.random.Generator
) -> Float[np.ndarray, "L N"]:
    """Draws factors of the heads of a step, 0 for dropped ones.

    A layer is left with one head at least, or has none at all (Zhou et al. 2020, arXiv
    2004.13342).

    Args:
      dropped: the share of the heads.
      without: shares of steps without the attention of a layer; never of two.
    """
    heads = rng.random((PLAIN.num_layers, PLAIN.num_heads)) >= dropped
    heads[np.arange(len(heads)), rng.integers(PLAIN.num_heads, size=len(heads))] = True
    factors = heads * PLAIN.num_heads / heads.sum(axis=1, keepdims=True)
    drawn, upto = rng.random(), 0.0
    for layer, share in without.items():
        if upto <= drawn < upto + share:
            factors[layer] = 0.0
        upto += share
    return factors.astype(np.float32)


def curriculum(
    kind: Recall, rows: int, dropped: float, rng: np.random.Generator
) -> Batch:
    """Draws a later stage of the base: a quarter are still repeated segments.

    Args:
      dropped: share of the heads that the step is without.
    """
    some = rows // 4
    again = data.repeats(rng, some, kind.length) if some else None
    texts = kind.draw(rng, rows - some)
    factors = {"heads": heads_left(dropped, WITHOUT[-1], rng)}
    if again is None:
        return whole_rows(texts) | factors
    again = again._replace(answers=np.zeros_like(again.answers))  # not in the recall
    return whole_rows(data.joined(texts, again)) | factors


def compressed(per: str, rows: int, rng: np.random.Generator) -> Batch:
    """Draws a step of a way to compress; per: "window" or "sequence", its ratios.

    All rows of a step share their ratios. The last window, the questions, has none.
    """
    texts = TRAINED.draw(rng, rows)  # first: the same whatever the plan
    windows = TRAINED.length // WINDOW
    plan = rng.choice(RATIOS, windows if per == "window" else 1)
    return in_windows(texts, WINDOW, plan)


# --- parts -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps on texts of one kind.

    Attributes:
      draw: makes the batch of a step from a generator.
      steps: of the stage, at most.
      gate: recall that ends it early; above 1: nothing does.
      decays: whether the learning rate falls towards its end.
    """

    draw: Callable[[np.random.Generator], Batch]
    steps: int
    gate: float = 2.0
    decays: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
    """Something that is trained.

    Attributes:
      name: of its file and in what is printed.
      number: of its stream of random texts. Parts with one number have the same texts.
      loss: a function of the module's top level, or a `functools.partial` of one.
      lr: Adam's, at its peak.
      stages: one after the other.
    """

    name: str
    number: int
    loss: Loss
    lr: float
    stages: tuple[Stage, ...]


@functools.partial(
    jax.jit, static_argnames="loss", donate_argnames=("trained", "moments")
)
def run_steps(
    loss: Loss,
    trained: Tree,
    moments: Any,
    frozen: Tree,
    batches: Any,
    rates: Float[Array, " n"],
) -> tuple[Tree, Any, Float[Array, "2 n"]]:
    """Runs n steps; `batches` are n of them, stacked, and `rates` their learning rates.

    Returns:
      What is trained, its moments, and each step's loss and recall.
    """

    def step(carry, x):
        trained, moments = carry
        batch, rate = x
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, recall), gradients = value_and_grad(trained, frozen, batch)
        updates, moments = optimizer().update(gradients, moments)
        trained = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
        return (trained, moments), (value, recall)

    carry, found = jax.lax.scan(step, (trained, moments), (batches, rates))
    return *carry, jnp.stack(found)


def optimizer() -> optax.GradientTransformation:
    """Makes Adam on clipped gradients, without its learning rate."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98))


def rates(lr: float, stage: Stage, steps: np.ndarray, before: int) -> np.ndarray:
    """Returns learning rates of a stage's steps: a warm-up, and a fall at the end.

    before: steps of earlier stages. The warm-up is the first ones of the part.
    """
    rise = np.minimum((before + steps + 1) / WARMUP, 1.0)
    fall = (stage.steps - steps) / (stage.steps * (1 - DECAY_START))
    share = np.clip(fall, LAST_RATE, 1.0) if stage.decays else 1.0
    return (lr * rise * share).astype(np.float32)


def train(
    part: Part,
    seed: int,
    settings: Settings,
    start: Tree,
    frozen: Tree,
    folder: Path,
) -> Tree:
    """Trains a part, or goes on where it was killed; a finished one is read back.

    Args:
      start: what is trained, before it is.
      folder: of the seed; gets part.name.msgpack and lines of log.jsonl.
    """
    file = folder / f"{part.name}.msgpack"
    start = jax.tree.map(jnp.array, start)  # its own, to be donated
    state = {
        "trained": start,
        "moments": optimizer().init(start),
        "stage": 0,
        "step": 0,
        "before": 0,  # steps of earlier stages
        "seconds": 0.0,
    }
    if file.exists():
        state = flax.serialization.from_bytes(state, file.read_bytes())
    while state["stage"] < len(part.stages):
        stage = part.stages[state["stage"]]
        saved = state["before"] + state["step"]
        while state["step"] < stage.steps:
            done = _advance(part, stage, seed, settings, state, frozen, folder)
            if done:
                break
            if state["before"] + state["step"] - saved >= SAVE_EVERY:
                saved = state["before"] + state["step"]
                _save(file, state)
        state["before"] += state["step"]
        state["stage"], state["step"] = state["stage"] + 1, 0
        _save(file, state)
    return jax.tree.map(jnp.asarray, state["trained"])


def _advance(
    part: Part,
    stage: Stage,
    seed: int,
    settings: Settings,
    state: dict[str, Any],
    frozen: Tree,
    folder: Path,
) -> bool:
    """Runs one compiled call of steps; returns whether the stage's gate is passed."""
    began = time.perf_counter()
    first = state["step"]
    steps = np.arange(first, min(first + settings.chunk, stage.steps))
    rng = data.generator(seed, data.TRAINING, part.number, state["stage"], first)
    batches = jax.tree.map(lambda *x: np.stack(x), *(stage.draw(rng) for _ in steps))
    state["trained"], state["moments"], found = run_steps(
        part.loss,
        state["trained"],
        state["moments"],
        frozen,
        batches,
        rates(part.lr, stage, steps, state["before"]),
    )
    loss, recall = np.asarray(found)[:, -20:].mean(1).tolist()
    took = time.perf_counter() - began
    state["step"] += len(steps)
    state["seconds"] += took
    total = state["before"] + state["step"]
    row = {"part": part.name, "stage": state["stage"], "step": total}
    row |= {"loss": round(loss, 4), "recall": round(recall, 4)}
    row |= {"seconds": round(state["seconds"], 1)}
    with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")
    say(
        f"seed {seed}, {part.name}: step {total}, loss {loss:.3f}, recall "
        f"{recall:.3f}, {1000 * took / len(steps):.0f} ms a step"
    )
    return recall >= stage.gate


def _save(file: Path, state: dict[str, Any]) -> None:
    with whole_file(file) as out:
        out.write(flax.serialization.to_bytes(jax.device_get(state)))


def seconds(folder: Path) -> dict[str, dict[str, float]]:
    """Reads from a seed's log what each part took: steps and seconds."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)  # the last line of a part is its end
    return {row["part"]: {k: row[k] for k in ("step", "seconds")} for row in rows}
