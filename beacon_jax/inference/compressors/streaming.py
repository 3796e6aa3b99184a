"""StreamingLLM (Xiao et al. 2024): the first tokens and the last ones."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from beacon_jax.inference.compressors.base import Compressor, of_heads
from beacon_jax.inference.compressors.piece import Piece

SINKS = 4


class Streaming(Compressor):
    """Keeps 4 sinks and the last tokens, k in all, in one cache for the whole text.

    The real thing, not its last state: windows are read one after the other, and what
    was evicted after one is not there for the next. The cache has its size from the
    first window on. Of k below 8 the sinks take half (rounded down). A key stands at
    its place in the cache, as published.
    """

    name = "streaming"
    piece_tokens = 1  # a window
    evicts = True
    splits = False

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        slot = jnp.arange(piece.state.capacity)
        first = slot < jnp.minimum(SINKS, count // 2)[:, None]
        return of_heads(piece, jnp.where(first, len(slot), slot))
