"""Soft tokens: a memory of input embeddings, as AutoCompressor and ICAE have it.

Behind each window stand as many summary tokens as beacons would, with an embedding and
projections of their own, as beacons have them. What the last layer makes of them, times
a trained matrix, are the embeddings that later windows read in front of their tokens.
(Chevalier et al. 2023, arXiv 2305.14788; Ge et al. 2024, arXiv 2307.06945.) A beacon
hands over keys and values of every layer instead.

Shapes: B rows, M soft tokens so far, W tokens of a window, n summary tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.loss import IGNORE, token_losses
from beacon_jax.experiments.miniature.training import RATIOS, Batch, Tree, recalled
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import Decoder, apply, place_of
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net


class SoftDecoder(Decoder):
    """The decoder, reading embeddings in front of tokens.

    Its layout is that of one window: M + W raw entries and the summary behind them.
    """

    def read(
        self, memory: Float[Array, "B M D"], tokens: Int[Array, "B W"]
    ) -> tuple[Float[Array, "B W D"], Float[Array, "B n D"]]:
        """Returns final hidden states of the tokens and of the summary."""
        c, layout = self.net.config, self.layout
        x = jnp.concatenate([memory, self.embed(tokens)], axis=1)
        rows = x.shape[0]
        if layout.beacons:
            shape = (rows, layout.beacons, c.hidden_size)
            x = layout.join(x, jnp.broadcast_to(self.embed.row, shape))
        size = (c.num_layers, rows, layout.length, c.num_kv_heads, c.head_dim)
        buffers = jnp.zeros(size), jnp.zeros(size)
        place = place_of(c, layout, jnp.zeros(rows, jnp.int32))
        numbers = jnp.arange(c.num_layers)
        (x, *_), _ = self.layers.over_layers((x, *buffers), numbers, place)
        raw, summary = layout.split(x)
        return self.final_norm(raw[:, memory.shape[1] :]), self.final_norm(summary)


def init_soft(params: Tree, config: ModelConfig) -> Tree:
    """Makes what soft tokens train: what beacons do, and the matrix [D, D].

    The matrix starts as one that gives final hidden states the size of embeddings.
    """
    size = lambda x: float(np.sqrt(np.mean(np.square(np.asarray(x)))))
    scale = size(params["embed"]["embedding"]) / size(params["final_norm"]["scale"])
    matrix = scale * jnp.eye(config.hidden_size)
    return {"beacon": init_beacon(params, config), "matrix": matrix}


def step(
    net: Net,
    trained: Tree,
    params: Tree,
    memory: Float[Array, "B M D"],
    tokens: Int[Array, "B W"],
    count: int,
) -> tuple[Float[Array, "B W D"], Float[Array, "B M2 D"]]:
    """Reads a window: its hidden states, and the memory with `count` tokens more."""
    layout = Layout(1, memory.shape[1] + tokens.shape[1], count)
    variables = {"params": params, "beacon": trained["beacon"]}
    model = SoftDecoder(net, layout)
    hidden, summary = apply(model, variables, memory, tokens, method="read")
    new = summary @ trained["matrix"]
    return hidden, jnp.concatenate([memory, new], axis=1)


def soft_loss(
    config: ModelConfig, trained: Tree, frozen: Tree, batch: Any
) -> tuple[Array, Array]:
    """Computes the loss of a batch whose windows share one ratio of `RATIOS`."""
    of_ratio = [functools.partial(_loss_at, config, ratio) for ratio in RATIOS]
    index = jnp.searchsorted(jnp.asarray(RATIOS), batch["plan"][0])
    return jax.lax.switch(index, of_ratio, trained, frozen, batch)


def _loss_at(
    config: ModelConfig, ratio: int, trained: Tree, frozen: Tree, batch: Batch
) -> tuple[Array, Array]:
    net = Net(config, attention="reference")
    windows, rows, w = batch["tokens"].shape
    memory = empty(config, rows)
    found = []
    for number in range(windows):
        count = w // ratio if number < windows - 1 else 0
        tokens = batch["tokens"][number]
        hidden, memory = step(net, trained, frozen, memory, tokens, count)
        found.append(hidden)
    hidden = jnp.concatenate(found, axis=1)
    line = lambda name: batch[name].swapaxes(0, 1).reshape(rows, -1)
    losses = token_losses(_logits(net, trained, frozen), hidden, line("labels"))
    weights = jnp.where(line("labels") == IGNORE, 0.0, line("weights"))
    loss = (losses * weights).sum() / weights.sum()
    return loss, recalled(losses, line("answers"))


def remember(
    net: Net, trained: Tree, params: Tree, past: Int[np.ndarray, "B C"], ratio: int
) -> Float[Array, "B M D"]:
    """Reads whole windows at one ratio into soft tokens."""
    assert net.config.beacon is not None
    w, memory = net.config.beacon.window, empty(net.config, len(past))
    for start in range(0, past.shape[1], w):
        tokens = jnp.asarray(past[:, start : start + w])
        memory = _step(net, trained, params, memory, tokens, w // ratio)[1]
    return memory


def greedy(
    net: Net,
    trained: Tree,
    params: Tree,
    memory: Float[Array, "B M D"],
    following: Int[np.ndarray, "B T"],
    labels: Int[np.ndarray, "B T"],
) -> Bool[np.ndarray, "B T"]:
    """Tells which labels are the most likely token behind a memory."""
    hidden, _ = _step(net, trained, params, memory, jnp.asarray(following), 0)
    return np.asarray(_logits(net, trained, params)(hidden).argmax(-1) == labels)


def empty(config: ModelConfig, rows: int) -> Float[Array, "B 0 D"]:
    """Makes a memory without soft tokens."""
    return jnp.zeros((rows, 0, config.hidden_size))


_step = jax.jit(step, static_argnames=("net", "count"))


def _logits(net: Net, trained: Tree, params: Tree) -> Any:
    """Makes the function from hidden states to logits of the frozen head."""
    head = Decoder(net, Layout(1, 1, 0))
    variables = {"params": params, "beacon": trained["beacon"]}
    return lambda hidden: apply(head, variables, hidden, method="logits")
