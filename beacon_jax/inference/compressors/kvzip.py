"""KVzip (Kim et al. 2025): what repeating the text attends to is kept.

After a piece the model is asked to repeat it, in chunks of 2,048 tokens, with the words
in front of it. A slot is worth the most attention, over the heads of its group, that a
token of the repetition pays to it; the first 4 slots of a text, and those of the chunk
and of the repetition so far share the attention. No question is seen.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState, buffer_size
from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.compressors.piece import (
    Piece,
    attention,
    rotated,
    run,
)
from beacon_jax.model.net import Net
from beacon_jax.tokenise import encode

SINKS, CHUNK, POSTFIX = 4, 2048, 8
WHOLE = "\n\nRepeat the previous context exactly.\n"
PART = "\n\nRepeat the part of the previous context exactly, starting with"


class KVzip(Compressor):
    """Keeps what a repetition of the text needs: query-agnostic, and good at recall.

    Each piece is run once more, behind itself, and needs room for 2,048 tokens more
    while it is compressed. All heads keep as many slots; in the paper they share a
    budget.
    """

    name = "kvzip"
    repeats = CHUNK

    def observe(self, piece: Piece) -> Any:
        longest = int(piece.lengths.max(initial=0))
        found = None
        for begin in range(0, longest, CHUNK):
            found = self._chunk(piece, begin, min(begin + CHUNK, longest), found)
        return found

    def _chunk(self, piece: Piece, begin: int, end: int, found: Any) -> Any:
        """Repeats tokens begin ... end - 1 of the piece; updates the scores."""
        w = piece.state.window
        front = _prompt(piece.tokenizer, PART if begin else WHOLE)
        front = np.broadcast_to(front, (len(piece.stop), len(front)))
        if begin:
            last = piece.tokens[:, begin - POSTFIX : begin]
            front = np.concatenate([front, last], axis=1)
        asked = np.concatenate([front, piece.tokens[:, begin:end]], axis=1)
        room = -(-asked.shape[1] // w) * w
        state = piece.state.resized(buffer_size(int(piece.stop.max()) + room, w))
        place = [np.minimum(piece.start + x, piece.stop) for x in (begin, end)]
        chunk = [jnp.asarray(x, jnp.int32) for x in place]
        stop = jnp.asarray(piece.stop, jnp.int32)
        for at in range(0, room, w):
            ids = asked[:, at : at + w]
            real = np.zeros((len(ids), w), bool)
            # Rows whose piece ended before repeat nothing.
            repeats = begin + at + np.arange(ids.shape[1]) - front.shape[1]
            real[:, : ids.shape[1]] = repeats < piece.lengths[:, None]
            ids = jnp.asarray(np.pad(ids, ((0, 0), (0, w - ids.shape[1]))))
            queries, state = run(piece.net, piece.variables, state, ids, stop + at)
            slots = stop[:, None] + at + jnp.arange(w)
            queries = rotated(piece.net, queries, slots)
            seen = queries, slots, jnp.asarray(real)
            most = _most(piece.net, state, *seen, *chunk, stop)
            most = most[..., : piece.state.capacity]
            found = most if found is None else jnp.maximum(found, most)
        return found

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        return jnp.where(jnp.arange(seen.shape[-1]) < SINKS, 1.0, seen)


def _prompt(tokenizer: Any, text: str) -> Int[np.ndarray, " n"]:
    """Returns the ids of a prompt; none without a tokenizer."""
    if tokenizer is None:
        return np.zeros(0, np.int32)
    return np.asarray(encode(tokenizer, text, "bare"), np.int32)


@functools.partial(jax.jit, static_argnames="net")
def _most(
    net: Net,
    state: MemoryState,
    queries: Float[Array, "L B T N H"],
    at: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    begin: Int[Array, " B"],
    end: Int[Array, " B"],
    stop: Int[Array, " B"],
) -> Float[Array, "L B K S"]:
    """Finds the most attention that slots begin ... end - 1 get from any query.

    Args:
      at: slots of the queries; `stop`: where the repetition begins.
    """
    slot = jnp.arange(state.capacity)
    mine = (slot >= begin[:, None]) & (slot < end[:, None])
    first = (slot < SINKS) & (slot < begin[:, None])
    repeated = (slot >= stop[:, None])[:, None] & (slot <= at[..., None])
    visible = (mine | first)[:, None] | repeated
    visible &= real[..., None]

    def one(x):
        layer, q = x
        weights = attention(net, state, layer, q, visible)
        return jnp.where(mine[:, None], weights.max((2, 3)), 0.0)

    return jax.lax.map(one, (jnp.arange(len(queries)), queries))
