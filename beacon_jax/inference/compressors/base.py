"""The interface of a compressor: three functions, of which one is needed."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.piece import Piece, highest, keep

FORCED = 1e30  # a score above all that are computed, below what has to stay


class Compressor:
    """A method that compresses a text without having been trained for it.

    A text is read in pieces of whole windows, as full attention reads them behind what
    is in the memory already. After each piece the slots that hold its tokens are
    replaced by fewer: `make(piece, seen, score(piece, seen, count), count)`,
    where `seen` is `observe(piece)`.

    A method of one's own overrides `score` or, if it does not choose among tokens,
    `make`; what it wants to ask the model goes into `observe`.

    Attributes:
      name: as `compress(method=...)` and --method have it.
      piece_tokens: most tokens of a piece, at least one window. A text that fits is
        compressed as one; of a longer one the memory never has more than this
        uncompressed. Pieces are smaller where the model has no trained positions for
        what is kept of the text and a piece.
      repeats: most tokens of a piece that `observe` runs again behind it.
      evicts: whether slots of earlier pieces are candidates again. Then `score` is of
        all slots of a row, and `count` what the whole text may keep.
      splits: whether single tokens can stay uncompressed (lossless="slots").
      biased: whether slots get a bias, 4 bytes more for each kv head of a layer.
    """

    name: str = ""
    piece_tokens: int = 8192
    repeats: int = 0
    evicts: bool = False
    splits: bool = True
    biased: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.score is Compressor.score and cls.make is Compressor.make:
            raise TypeError(
                f"{cls.__name__} has neither `score` nor `make`: give it one of them, "
                "or it does not say what is kept."
            )

    def observe(self, piece: Piece) -> Any:
        """Runs the model on what the scores need, as `piece.queries`; None: nothing."""
        del piece

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        """Scores the slots of each layer, row and kv head; the highest are kept.

        Only slots `piece.inside` count. What has to stay is above all of them.

        Args:
          seen: what `observe` returned.
          count: slots that each row may keep of them.
        """
        shape = piece.state.k.shape  # L, B, S, K, H
        return jnp.zeros((shape[0], shape[1], shape[3], shape[2]))

    def make(
        self,
        piece: Piece,
        seen: Any,
        scores: Float[Array, "L B K S"],
        count: Int[Array, " B"],
    ) -> MemoryState:
        """Replaces the slots of the piece by `count` of them per row.

        Args:
          seen: what `observe` returned.
          scores: of `score`; infinite where a slot has to stay, and minus infinite for
            those that are not the piece's.

        Returns:
          The memory with those slots behind the first `piece.start` of each row.
          `piece.state` is taken over.
        """
        del seen
        total = jnp.asarray(piece.start, jnp.int32) + count
        return keep(piece.net, piece.state, highest(scores, total), total)


def of_heads(piece: Piece, values: jax.Array) -> Float[Array, "L B K S"]:
    """Gives every layer and kv head the same scores, [B, S]."""
    c = piece.net.config
    shape = (c.num_layers, values.shape[0], c.num_kv_heads, values.shape[1])
    return jnp.broadcast_to(values[None, :, None].astype(jnp.float32), shape)
