"""Soft tokens: a memory of input embeddings, as AutoCompressor and ICAE have it.

Behind each window stand as many summary tokens as beacons would, with an embedding and
projections of their own, as beacons have them. What the last layer makes of them, times
a trained matrix, are embeddings that the frozen model reads in front of later windows.
(Chevalier et al. 2023, arXiv 2305.14788; Ge et al. 2024, arXiv 2307.06945.) A beacon
hands over the keys and values of every layer instead.

The model's keys and values of soft tokens are the memory: nothing behind them changes
them, so they are computed once. A slot costs the bytes of a beacon's.

Shapes: B rows, W tokens of a window, n summary tokens, buffers [L, B, S, K, H].
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.core.loss import IGNORE, token_losses
from beacon_jax.core.step import empty_buffers
from beacon_jax.experiments.miniature.training import RATIOS, Tree, recalled
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import Decoder, apply, place_of
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net


class SoftMemory(NamedTuple):
    """Keys and values of the soft tokens so far.

    Attributes:
      k, v: buffers; what lies behind the slots has no use.
      slots: soft tokens of each row.
    """

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]
    slots: Int[Array, " B"]


class SoftDecoder(Decoder):
    """The decoder, with its summary tokens' final states, and reading embeddings."""

    def read(
        self, tokens: Int[Array, "B W"], memory: SoftMemory
    ) -> tuple[Float[Array, "B W D"], Float[Array, "B n D"]]:
        """Returns final hidden states of the tokens and of the summary behind them."""
        x = self._through(self.begin(tokens), memory)[0]
        raw, summary = self.layout.split(x)
        return self.final_norm(raw), self.final_norm(summary)

    def write(self, soft: Float[Array, "B n D"], memory: SoftMemory) -> SoftMemory:
        """Reads n embeddings behind the memory, which has them then."""
        _, k, v = self._through(soft, memory)
        return SoftMemory(k, v, memory.slots + soft.shape[1])

    def _through(self, x: Array, memory: SoftMemory) -> tuple[Array, Array, Array]:
        place = place_of(self.net.config, self.layout, memory.slots)
        numbers = jnp.arange(self.net.config.num_layers)
        carry = (x, memory.k, memory.v)
        return self.layers.over_layers(carry, numbers, place)[0]


def init_soft(params: Tree, config: ModelConfig) -> Tree:
    """Makes what soft tokens train: what beacons do, and the matrix [D, D].

    The matrix starts as one that gives final hidden states the size of embeddings.
    """
    size = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x)))))
    scale = size(params["embed"]["embedding"]) / size(params["final_norm"]["scale"])
    matrix = scale * jnp.eye(config.hidden_size)
    return {"beacon": init_beacon(params, config), "matrix": matrix}


def empty(net: Net, rows: int, slots: int) -> SoftMemory:
    """Makes an empty memory with room for so many soft tokens and an open window."""
    room = Law.of(net.config).room(RATIOS)
    return SoftMemory(*empty_buffers(net, rows, slots + room), jnp.zeros(rows, int))


def compress(
    net: Net,
    trained: Tree,
    params: Tree,
    ratio: int,
    tokens: Int[Array, "B W"],
    memory: SoftMemory,
) -> tuple[Float[Array, "B W D"], SoftMemory]:
    """Reads a window at a ratio; 0 leaves no soft tokens.

    Returns:
      The hidden states of its tokens, and the memory with its soft tokens.
    """
    window = tokens.shape[1]
    variables = {"params": params, "beacon": trained["beacon"]}
    layout = Layout(1, window, window // ratio if ratio else 0)
    model = SoftDecoder(net, layout)
    hidden, summary = apply(model, variables, tokens, memory, method="read")
    if ratio:
        # Soft tokens are input of the frozen model: they take its own projections.
        model = SoftDecoder(net, Layout(1, layout.beacons, 0))
        soft = summary @ trained["matrix"]
        memory = apply(model, variables, soft, memory, method="write")
    return hidden, memory


def soft_loss(
    config: ModelConfig, trained: Tree, frozen: Tree, batch: Any
) -> tuple[Array, Array]:
    """Computes the loss of a batch [N, B, W], as beacons have it.

    The last window has no summary, whatever its plan says.
    """
    net = Net(config, attention="reference")
    windows, rows, w = batch["tokens"].shape
    plan = jnp.where(jnp.arange(windows) < windows - 1, batch["plan"], 0)
    ratios = (0, *RATIOS)
    # Recomputed: else the activations of every ratio's branch are kept, taken or not.
    read = [
        jax.checkpoint(functools.partial(compress, net, trained, frozen, r))
        for r in ratios
    ]

    def step(memory: SoftMemory, x: Any) -> tuple[SoftMemory, Array]:
        tokens, index = x
        hidden, memory = jax.lax.switch(index, read, tokens, memory)
        return memory, hidden

    memory = empty(net, rows, (windows - 1) * w // min(RATIOS))
    index = jnp.searchsorted(jnp.asarray(ratios), plan)
    _, hidden = jax.lax.scan(step, memory, (batch["tokens"], index))
    flat = lambda x: x.reshape(windows * rows, *x.shape[2:])
    labels, weights, answers = (
        flat(batch[name]) for name in ("labels", "weights", "answers")
    )
    losses = token_losses(_logits(net, trained, frozen), flat(hidden), labels)
    weights = jnp.where(labels == IGNORE, 0.0, weights)
    return (losses * weights).sum() / weights.sum(), recalled(losses, answers)


def remember(
    net: Net,
    trained: Tree,
    params: Tree,
    past: Int[np.ndarray, "B C"],
    ratio: int,
    room: int,
) -> SoftMemory:
    """Reads whole windows at one ratio, into a memory for `room` soft tokens."""
    w, memory = Law.of(net.config).window, empty(net, len(past), room)
    for start in range(0, past.shape[1], w):
        tokens = jnp.asarray(past[:, start : start + w])
        memory = _compress(net, trained, params, ratio, tokens, memory)[1]
    return memory


def greedy(
    net: Net,
    trained: Tree,
    params: Tree,
    memory: SoftMemory,
    following: Int[np.ndarray, "B T"],
    labels: Int[np.ndarray, "B T"],
) -> Bool[np.ndarray, "B T"]:
    """Tells which labels are the most likely token behind a memory."""
    tokens = jnp.asarray(following)
    hidden, _ = _compress(net, trained, params, 0, tokens, memory)
    return np.asarray(_logits(net, trained, params)(hidden).argmax(-1)) == labels


_compress = jax.jit(compress, static_argnames=("net", "ratio"))


def _logits(net: Net, trained: Tree, params: Tree) -> Callable[[Array], Array]:
    """Makes the function from hidden states to logits of the frozen head."""
    head = Decoder(net, Layout(1, 1, 0))
    variables = {"params": params, "beacon": trained["beacon"]}
    return lambda hidden: apply(head, variables, hidden, method="logits")
