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

from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.compressors.piece import (
    Kept,
    Made,
    Piece,
    attention,
    floats,
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


class Matched(NamedTuple):
    """What `matched` makes of kept tokens.

    Attributes:
      v: values.
      bias: of the slots.
    """

    v: Float[Array, "L B n K H"]
    bias: Float[Array, "L B K n"]


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
        return jnp.concatenate(queries, 2), jnp.asarray(np.concatenate(real, 1))

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        stop = jnp.asarray(piece.stop, jnp.int32)
        return attended(piece.net, piece.state, *seen, stop, jnp.asarray(piece.inside))

    def make(
        self,
        piece: Piece,
        seen: Any,
        scores: Float[Array, "L B K S"],
        count: Int[Array, " B"],
    ) -> MemoryState:
        w = piece.state.window
        size = -(-int(np.max(count)) // w) * w  # whole windows: few programs
        kept = Kept.of(piece, scores, count)
        found = matched(piece.net, piece.state, *seen, kept, size)
        made = Made(None, found.v, found.bias)  # keys stay as they are
        live = jnp.asarray(np.asarray(count) < piece.lengths)
        state = keep(piece.net, piece.state, kept.index, kept.start + count)
        return write(piece.net, state, made, kept.start, count, live)


def places(
    queries: Float[Array, "L B R N H"], at: Int[Array, " B"], window: int
) -> Int[Array, "B R"]:
    """Spreads reference queries over the window from slot at[row] on."""
    return at[:, None] + jnp.arange(queries.shape[2]) % window


@functools.partial(jax.jit, static_argnames="net")
def attended(
    net: Net,
    state: MemoryState,
    queries: Float[Array, "L B R N H"],
    real: Bool[Array, "B R"],
    stop: Int[Array, " B"],
    inside: Bool[Array, "B S"],
) -> Float[Array, "L B K S"]:
    """Computes the root mean square of the attention that slots `inside` get.

    Args:
      queries: not rotated; they see all of these slots, from behind `stop`.
      real: queries that count.
    """
    at = places(queries, stop, state.window)
    visible = inside[:, None] & real[..., None]

    def one(x):
        layer, q = x
        weights = attention(net, state, layer, rotated(net, q, at), visible)
        return jnp.sqrt((weights**2).sum((2, 3)))

    return jax.lax.map(one, (jnp.arange(len(queries)), queries))


@functools.partial(jax.jit, static_argnames=("net", "size"))
def matched(
    net: Net,
    state: MemoryState,
    queries: Float[Array, "L B R N H"],
    real: Bool[Array, "B R"],
    kept: Kept,
    size: int,
) -> Matched:
    """Computes values and biases of the kept slots of a piece.

    Args:
      queries, real: as those of `attended`.
      size: n, at least `kept.count`; what stands beyond that has no meaning.
    """
    heads, inside, where = net.config.num_kv_heads, kept.inside(), kept.places(size)
    live = jnp.arange(size) < kept.count[:, None]
    old = places(queries, kept.stop, state.window)
    new = places(queries, kept.start + kept.count, state.window)
    by_head = lambda x: jnp.moveaxis(x, 2, 1)  # [B, n, K, ...] -> [B, K, n, ...]

    def grouped(q, at):  # [B, R, N, H] -> [B, K, G R, H]
        q = jnp.moveaxis(rotated(net, q, at).astype(jnp.float32), 2, 1)
        return q.reshape(q.shape[0], heads, -1, q.shape[-1])

    def one(x):
        layer, q = x
        keys, values = floats(net, state.k, layer), floats(net, state.v, layer)
        index = jnp.take_along_axis(kept.index[layer], where[..., None], axis=1)
        take = lambda x: by_head(jnp.take_along_axis(x, index[..., None], axis=1))
        cos, sin = cos_sin(net.config, where[..., None] - index, scaled=False)
        cos, sin = by_head(cos[..., 0, :]), by_head(sin[..., 0, :])
        at = by_head(index[..., None])[..., 0]  # [B, K, n]
        tokens = Tokens(by_head(keys), by_head(values), grouped(q, old))
        exact = jnp.take_along_axis(kept.exact[layer], at, axis=2)
        few = Tokens(rotate(take(keys), cos, sin), take(values), grouped(q, new))
        return jax.lax.map(
            lambda x: jax.vmap(match, (0, 0, 0, None, None, None))(*x),
            (tokens, few, exact, inside, live, real),
        )

    values, bias = jax.lax.map(one, (jnp.arange(len(queries)), queries))
    return Matched(jnp.moveaxis(values, 2, 3), bias)


class Tokens(NamedTuple):
    """Keys and values of one head, and its queries, each rotated where it stands."""

    k: Float[Array, "*X n H"]
    v: Float[Array, "*X n H"]
    q: Float[Array, "*X M H"]


def match(
    tokens: Tokens,
    few: Tokens,
    exact: Bool[Array, " n"],
    inside: Bool[Array, " S"],
    live: Bool[Array, " n"],
    real: Bool[Array, " R"],
) -> tuple[Float[Array, "n H"], Float[Array, " n"]]:
    """Computes values and biases of one head's kept slots.

    Args:
      tokens: all of them; `inside` are those that are matched.
      few: the kept ones; `live` are those that are in use.
      exact: kept ones that stay as they are.
      real: queries of a head that count.
    """
    scale = few.k.shape[-1] ** -0.5
    counts = jnp.tile(real, len(few.q) // len(real))[:, None]
    scores = jnp.where(inside, scale * tokens.q @ tokens.k.T, -jnp.inf)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    wanted = jnp.exp(scores - total) @ jnp.where(inside[:, None], tokens.v, 0.0)
    # Of each query, the share of all exponentials that a kept slot has alone.
    scores = jnp.where(live, scale * few.q @ few.k.T - total, -jnp.inf)
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
