"""SnapKV (Li et al. 2024): what the last tokens attend to is kept.

Per layer and kv head: softmax attention of the queries of an observation window,
averaged over its queries and the heads of the group, mean-pooled over 5 neighbours
(zeros beyond the ends), and the highest kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.base import FORCED, Compressor
from beacon_jax.inference.compressors.piece import Piece, attention, rotated
from beacon_jax.model.net import Net

OBSERVED, KERNEL = 64, 5


class SnapKV(Compressor):
    """Keeps the end of each piece, 64 tokens, and what these attend to.

    It sees no question. Where 64 tokens are more than half of what a piece may keep,
    that half is observed: at most half of what is kept is kept unseen.
    """

    name = "snapkv"

    def observe(self, piece: Piece) -> Any:
        size = int(min(OBSERVED, piece.state.window, piece.tokens.shape[1]))
        first = np.maximum(piece.lengths - size, 0)
        found, at = piece.queries(first, size)
        return rotated(piece.net, found, at), jnp.asarray(at)

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        queries, at = seen
        own = jnp.minimum(at.shape[1], count // 2)
        stop = jnp.asarray(piece.stop, jnp.int32)
        end = stop - own
        counts = (at >= end[:, None]) & (at < stop[:, None])
        begin = jnp.asarray(piece.start, jnp.int32)
        return votes(piece.net, piece.state, queries, at, counts, begin, end)


@functools.partial(jax.jit, static_argnames="net")
def votes(
    net: Net,
    state: MemoryState,
    queries: Float[Array, "L B T N H"],
    at: Int[Array, "B T"],
    counts: Bool[Array, "B T"],
    begin: Int[Array, " B"],
    end: Int[Array, " B"],
) -> Float[Array, "L B K S"]:
    """Mean-pools the attention that slots begin ... end - 1 get from some queries.

    Slots from `end` on have `FORCED`: they are the observed ones.

    Args:
      queries: rotated, of tokens that stand at the slots `at`, which see those up to
        it.
      counts: the queries that count.
    """
    slot = jnp.arange(state.capacity)
    visible = slot <= at[..., None]
    asked = ((slot >= begin[:, None]) & (slot < end[:, None]))[:, None]

    def one(x):
        layer, q = x
        weights = attention(net, state, layer, q, visible)
        weights = jnp.where(counts[:, None, None, :, None], weights, 0.0)
        mine = jnp.where(asked, weights.sum(3).mean(2), 0.0)  # [B, K, S]
        around = jnp.pad(mine, ((0, 0), (0, 0), (KERNEL // 2, KERNEL // 2)))
        shifted = (around[..., i : i + len(slot)] for i in range(KERNEL))
        pooled = sum(shifted) / KERNEL
        return jnp.where((slot >= end[:, None])[:, None], FORCED, pooled)

    return jax.lax.map(one, (jnp.arange(len(queries)), queries))
