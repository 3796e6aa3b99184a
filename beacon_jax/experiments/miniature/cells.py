"""Asks every method the same questions: accuracy by context, ratio and method.

A method makes a memory of the context, with the slots that beacons of its ratio take
(`evaluation.methods.remember` asserts it), and the questions are read behind it,
without beacons among them. An answer is right if it is the most likely token.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from beacon_jax.core import plan
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.baselines import FAMILIES
from beacon_jax.evaluation.methods import Method, remember
from beacon_jax.evaluation.statistics import mean_interval
from beacon_jax.experiments.miniature import data, soft
from beacon_jax.experiments.miniature.data import Recall, Texts
from beacon_jax.experiments.miniature.training import (
    CONTEXT,
    MOST_PAIRS,
    PLAIN,
    RATIOS,
    UNSEEN,
    WINDOW,
    Settings,
    Tree,
    beacon_config,
)
from beacon_jax.inference.model import Model
from beacon_jax.model.net import Net

# Tokens of context and pairs in it; the base and the beacons were trained up to 128.
CONTEXTS = ((CONTEXT, 8), (CONTEXT, MOST_PAIRS), (2 * CONTEXT, 16), (4 * CONTEXT, 16))
LONGEST = max(context for context, _ in CONTEXTS)  # programs serve all up to it
ASKED = (*RATIOS, UNSEEN)
MIXED = "mixed"  # a ratio of its own for each window, as in training
BATCH = 32  # rows at once
PLAIN_METHODS = ("full", "window", "random", "mean-pool", "snapkv", "snapkv_aware")
# What is trained, each as often: placement and what draws its ratio.
BEACONS = {
    "beacons": ("interleave", "window"),
    "appended": ("append", "window"),
    "per sequence": ("interleave", "sequence"),
}
SOFT = "soft tokens"


class Cell(NamedTuple):
    """The answers of a method to the questions about one kind of context.

    Attributes:
      context, pairs: of the texts.
      method: its name; ratio: raw tokens per slot, "mixed", or None: it has none.
      hits, questions: right answers, of how many.
      low, high: of the accuracy, a bootstrap interval (95 %) over texts.
    """

    context: int
    pairs: int
    method: str
    ratio: int | str | None
    hits: int
    questions: int
    low: float
    high: float


def measure(seed: int, settings: Settings, params: Tree, trained: Tree) -> list[Cell]:
    """Measures all cells of a seed.

    Args:
      trained: what each name of BEACONS and SOFT has learnt.
    """
    made = []
    models = {
        name: model_of(params, trained[name], placement)
        for name, (placement, _) in BEACONS.items()
    }
    for number, (context, pairs) in enumerate(CONTEXTS):
        kind = Recall(context, pairs, pairs, min(settings.questions, pairs))
        rng = data.generator(seed, data.EVALUATION, number)
        texts = kind.draw(rng, settings.sequences)
        cell = functools.partial(_cell, context, pairs)
        for name in PLAIN_METHODS:
            family = FAMILIES[name]
            for ratio in ASKED if family.per_ratio else (None,):
                method = family(ratio).sized(LONGEST)
                ask = functools.partial(answer, models["beacons"], method)
                made.append(cell(name, ratio, in_batches(ask, texts, context)))
        for name, model in models.items():
            for ratio in ASKED:
                method = FAMILIES["beacon"](ratio).sized(LONGEST)
                ask = functools.partial(answer, model, method)
                made.append(cell(name, ratio, in_batches(ask, texts, context)))
            if context == CONTEXT:
                drawn = np.random.default_rng([seed, number])
                ask = functools.partial(answer_mixed, model, drawn)
                made.append(cell(name, MIXED, in_batches(ask, texts, context)))
        for ratio in ASKED:
            ask = functools.partial(answer_soft, params, trained[SOFT], ratio)
            made.append(cell(SOFT, ratio, in_batches(ask, texts, context)))
    return made


def model_of(params: Tree, beacon: Tree, placement: str) -> Model:
    """Makes the package's model of these weights; ids go in and out."""
    return Model(beacon_config(placement), {"params": params, "beacon": beacon})


def in_batches(ask: Any, texts: Texts, context: int) -> Bool[np.ndarray, "B Q"]:
    """Asks `ask` for the right answers of some rows at a time."""
    rows = range(0, len(texts.tokens), BATCH)
    parts = [Texts(*(x[at : at + BATCH] for x in texts)) for at in rows]
    right = [ask(part, context)[part.answers[:, context:]] for part in parts]
    return np.concatenate(right).reshape(len(texts.tokens), -1)


def answer(model: Model, method: Method, texts: Texts, context: int) -> Any:
    """Tells which labels behind the context are most likely, [B, T - C]."""
    past, following = _split(texts, context)
    memory, _ = remember(model, method, past, following)
    return _greedy(model, memory.state, texts, context)


def answer_mixed(
    model: Model, rng: np.random.Generator, texts: Texts, context: int
) -> Any:
    """As `answer`, by beacons whose windows have all the ratios, in a drawn order."""
    windows = context // WINDOW
    drawn = rng.permutation(np.resize(RATIOS, windows)).astype(np.int32)
    room = plan.capacity(model.config, np.full(windows + 1, min(RATIOS)))
    state = init_memory(model.config, len(texts.tokens), room)
    _, state = feed(
        model.net, model.variables, state, texts.tokens[:, :context], None, drawn
    )
    return _greedy(model, state, texts, context)


def answer_soft(
    params: Tree, trained: Tree, ratio: int, texts: Texts, context: int
) -> Any:
    """As `answer`, by soft tokens."""
    net = Net(beacon_config())
    past, following = texts.tokens[:, :context], texts.tokens[:, context:]
    room = LONGEST // ratio
    memory = soft.remember(net, trained, params, past, ratio, room)
    assert (np.asarray(memory.slots) == context // ratio).all()
    labels = texts.labels[:, context:]
    return soft.greedy(net, trained, params, memory, following, labels)


def _greedy(model: Model, state: Any, texts: Texts, context: int) -> Any:
    _, following = _split(texts, context)
    labels = list(texts.labels[:, context:])
    out, _ = reading.feed_state(model, state, following, 0, "score", labels)
    return np.asarray(out.greedy)[:, : len(labels[0])]


def _split(texts: Texts, context: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return list(texts.tokens[:, :context]), list(texts.tokens[:, context:])


def _cell(
    context: int, pairs: int, method: str, ratio: Any, right: Bool[np.ndarray, "B Q"]
) -> Cell:
    _, low, high = mean_interval(right.mean(axis=1))
    hits, questions = int(right.sum()), right.size
    interval = round(low, 4), round(high, 4)
    return Cell(context, pairs, method, ratio, hits, questions, *interval)


def same_without_beacons(params: Tree, trained: Tree, seed: int) -> bool:
    """Tells whether logits with beacons off are the plain base's, bit by bit."""
    texts = Recall(CONTEXT, 8, 8, 8).draw(data.generator(seed, data.EVALUATION, 99), 4)
    # A plain model is fed in windows of as many tokens as it has positions.
    plain = dataclasses.replace(PLAIN, max_position=WINDOW)
    variables: Tree = {"params": params, "beacon": {}}
    base = _logits(plain, variables, texts.tokens)
    return all(
        np.array_equal(
            base,
            _logits(
                beacon_config(placement),
                {"params": params, "beacon": trained[name]},
                texts.tokens,
            ),
        )
        for name, (placement, _) in BEACONS.items()
    )


def _logits(config: Any, variables: Tree, tokens: np.ndarray) -> np.ndarray:
    """Computes the logits of all tokens, every window at ratio 0."""
    memory = init_memory(config, len(tokens), 8 * WINDOW)
    off = np.zeros(1, np.int32)
    out, _ = feed(Net(config), variables, memory, tokens, None, off, outputs="logits")
    return np.asarray(jax.device_get(jnp.asarray(out.logits)))
