"""Attention matching (Zweiger et al. 2026): few slots that attend as all of them did.

Per layer and kv head, in closed form, for queries of the text itself that are placed
behind it:

    keys    of the tokens that get the most attention (root mean square over queries)
    biases  log w: the kept slots, counted w >= 0 times each, have the sum of
            exponentials that all tokens have (non-negative least squares)
    values  such that attention over the kept slots gives what attention over all gave
            (least squares, drawn to the tokens' own values)

Keys move to their new slots first, and queries then stand behind these: what the
shorter distances change is matched, too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState, buffer_size
from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.compressors.piece import (
    Made,
    Piece,
    floats,
    highest,
    keep,
    rotated,
    write,
)
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate

# Reference queries of a text, per head, and steps of the non-negative least squares.
QUERIES, STEPS = 1024, 64
# How much a value is drawn to its token's own, and how often a slot counts. 0.1 and 1
# are as good (.859 and .858 of the gap of eight texts at x8), 0.01 is worse (.851).
DRAWN, LEAST, MOST = 1.0, 1e-3, 1e3


class Seen(NamedTuple):
    """Reference queries of a piece, and what they get from all of its tokens.

    R tokens are asked, so M = G R queries per kv head, the tokens of a query head
    behind each other.

    Attributes:
      queries: not rotated.
      real: tokens that count.
      votes: root mean square of the attention that each slot gets, times a constant.
      total: log of a query's sum of exponentials.
      out: a query's result.
    """

    queries: Float[Array, "L B R N H"]
    real: Bool[Array, "B R"]
    votes: Float[Array, "L B K S"]
    total: Float[Array, "L B K M"]
    out: Float[Array, "L B K M H"]


class Kept(NamedTuple):
    """Which tokens of a piece stay.

    Attributes:
      index: slots that stay in each row, rising; those from `start` on are the piece's.
      start: the piece's first slot.
      count: of the piece, how many stay.
      exact: slots that stay as they are, whatever is made of the others.
    """

    index: Int[Array, "L B S K"]
    start: Int[Array, " B"]
    count: Int[Array, " B"]
    exact: Bool[Array, "L B K S"]


class AttentionMatching(Compressor):
    """Makes slots with biases whose attention is that of all tokens.

    Each piece is run once more, for its queries. No question is seen.
    """

    name = "attention-matching"
    piece_tokens = 4096
    biased = True

    def observe(self, piece: Piece) -> Any:
        size = piece.state.window
        windows = -(-int(piece.lengths.max(initial=0)) // size)
        step = max(-(-windows * size // QUERIES), 1)
        found = [(q[:, :, ::step], real[:, ::step]) for q, _, real in piece.windows()]
        queries, real = zip(*found, strict=True)
        queries, real = jnp.concatenate(queries, 2), np.concatenate(real, 1)
        stop = jnp.asarray(piece.stop, jnp.int32)
        return asked(piece.net, piece.state, queries, real, stop, piece.inside)

    def score(
        self, piece: Piece, seen: Seen, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        return seen.votes

    def make(
        self,
        piece: Piece,
        seen: Seen,
        scores: Float[Array, "L B K S"],
        count: Int[Array, " B"],
    ) -> MemoryState:
        start = jnp.asarray(piece.start, jnp.int32)
        size = buffer_size(int(np.max(count)), 1)  # few programs
        index = highest(scores, start + count)
        kept = Kept(index, start, count, jnp.isinf(scores))
        made = self.made(piece, seen, kept, size)
        live = jnp.asarray(np.asarray(count) < piece.lengths)
        state = keep(piece.net, piece.state, index, start + count)
        return write(piece.net, state, made, start, count, live)

    def made(self, piece: Piece, seen: Seen, kept: Kept, size: int) -> Made:
        """Computes what the slots that stay hold; `size` as in `matched`."""
        return matched(piece.net, piece.state, seen, kept, size)


def placed(
    net: Net, window: int, queries: Float[Array, "B R N H"], at: Int[Array, " B"]
) -> Float[Array, "B K M H"]:
    """Rotates queries as if they stood in the window from slot at[row] on."""
    place = at[:, None] + jnp.arange(queries.shape[1]) % window
    turned = rotated(net, queries, place).astype(jnp.float32)
    shape = len(at), net.config.num_kv_heads, -1, queries.shape[-1]
    return jnp.moveaxis(turned, 2, 1).reshape(shape)


@functools.partial(jax.jit, static_argnames="net")
def asked(
    net: Net,
    state: MemoryState,
    queries: Float[Array, "L B R N H"],
    real: Bool[Array, "B R"],
    stop: Int[Array, " B"],
    inside: Bool[Array, "B S"],
) -> Seen:
    """Attends to the slots `inside` from behind `stop`; every query sees all of them.

    Args:
      queries: not rotated.
      real: tokens that count.
    """

    def row(x):
        keys, values, q, real, inside = x
        scores = jnp.einsum("KMH,SKH->KMS", q, keys) * q.shape[-1] ** -0.5
        scores = jnp.where(inside, scores, -jnp.inf)
        total = jax.nn.logsumexp(scores, axis=-1)
        counts = jnp.tile(real, q.shape[1] // len(real))[:, None]
        weights = jnp.where(counts, jnp.exp(scores - total[..., None]), 0.0)
        live = jnp.where(inside[:, None, None], values, 0.0)
        out = jnp.einsum("KMS,SKH->KMH", weights, live)
        return jnp.sqrt((weights**2).sum(1)), total, out

    def one(x):
        layer, q = x
        keys, values = (floats(net, x, layer) for x in (state.k, state.v))
        q = placed(net, state.window, q, stop)
        return jax.lax.map(row, (keys, values, q, real, inside))

    found = jax.lax.map(one, (jnp.arange(len(queries)), queries))
    return Seen(queries, real, *found)


@functools.partial(jax.jit, static_argnames=("net", "size"))
def matched(net: Net, state: MemoryState, seen: Seen, kept: Kept, size: int) -> Made:
    """Computes values and biases of the kept slots of a piece; keys stay as they are.

    Args:
      size: n, at least `kept.count`; what stands beyond that has no meaning.
    """
    nth = jnp.arange(size)
    live = nth < kept.count[:, None]
    where = jnp.minimum(kept.start[:, None] + nth, kept.index.shape[2] - 1)
    stop = kept.start + kept.count

    def one(x):
        layer, q, total, out = x
        index = jnp.take_along_axis(kept.index[layer], where[..., None], axis=1)
        cos, sin = cos_sin(net.config, where[..., None] - index, scaled=False)
        keys, values = (
            jnp.take_along_axis(floats(net, x, layer), index[..., None], axis=1)
            for x in (state.k, state.v)
        )
        keys = rotate(keys, cos[..., 0, :], sin[..., 0, :])
        by_head = lambda x: jnp.moveaxis(x, 2, 1)  # [B, n, K, ...] -> [B, K, n, ...]
        exact = jnp.take_along_axis(kept.exact[layer], by_head(index), axis=2)
        few = Tokens(by_head(keys), by_head(values), placed(net, state.window, q, stop))
        heads = jax.vmap(match, (0, 0, 0, 0, None, None))
        return jax.lax.map(
            lambda x: heads(*x), (few, total, out, exact, live, seen.real)
        )

    layers = jnp.arange(len(seen.queries))
    values, bias = jax.lax.map(one, (layers, seen.queries, seen.total, seen.out))
    return Made(None, jnp.moveaxis(values, 2, 3), bias)


class Tokens(NamedTuple):
    """Keys and values of one head, and its queries, each rotated where it stands."""

    k: Float[Array, "*X n H"]
    v: Float[Array, "*X n H"]
    q: Float[Array, "*X M H"]


def match(
    few: Tokens,
    total: Float[Array, " M"],
    wanted: Float[Array, "M H"],
    exact: Bool[Array, " n"],
    live: Bool[Array, " n"],
    real: Bool[Array, " R"],
) -> tuple[Float[Array, "n H"], Float[Array, " n"]]:
    """Computes values and biases of one head's kept slots.

    Args:
      few: the kept tokens; `live` are those that are in use.
      total, wanted: of each query, from all tokens (`Seen`).
      exact: kept ones that stay as they are.
      real: tokens whose queries count.
    """
    counts = jnp.tile(real, len(few.q) // len(real))[:, None]
    # Of each query, the share of all exponentials that a kept slot has alone.
    scores = few.k.shape[-1] ** -0.5 * few.q @ few.k.T - total[:, None]
    scores = jnp.where(live, scores, -jnp.inf)
    share = jnp.where(counts, jnp.exp(jnp.minimum(scores, jnp.log(MOST))), 0.0)
    bias = jnp.log(jnp.where(exact, 1.0, counted(share, exact)))
    weights = jnp.where(counts, jax.nn.softmax(scores + bias, axis=-1), 0.0)
    gram = weights.T @ weights
    own = jnp.where(live[:, None], few.v, 0.0)
    drawn = DRAWN * jnp.diag(gram) + 1e-6
    drawn = jnp.where(exact | ~live, 1e9, drawn)
    missing = weights.T @ (wanted - weights @ own)
    factor = jax.scipy.linalg.cho_factor(gram + jnp.diag(drawn))
    change = jax.scipy.linalg.cho_solve(factor, missing)
    return own + jnp.where((exact | ~live)[:, None], 0.0, change), bias


def counted(share: Float[Array, "M n"], exact: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Computes how often slots have to count for their shares to add up to 1.

    These are non-negative least squares, by multiplicative updates (Lee and Seung
    2001), which never leave the non-negative numbers and never make the error larger.
    """
    target, gram = share.sum(0), share.T @ share

    def step(_, w):
        w = w * target / jnp.maximum(gram @ w, 1e-12)
        return jnp.where(exact, 1.0, jnp.clip(w, LEAST, MOST))

    return jax.lax.fori_loop(0, STEPS, step, jnp.ones(target.shape))
