"""Mean-pooled keys and values: the compression that neither chooses nor learns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.compressors.piece import Made, Piece, floats, write
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate


class MeanPool(Compressor):
    """Keeps means of neighbouring tokens: of un-rotated keys, and of values.

    Each window is cut into equal groups. Sinks, if the model's beacons have them, are
    the first tokens as they are, in front.
    """

    name = "mean-pool"
    splits = False

    def make(
        self,
        piece: Piece,
        seen: Any,
        scores: Float[Array, "L B K S"],
        count: Int[Array, " B"],
    ) -> MemoryState:
        start = jnp.asarray(piece.start, jnp.int32)
        groups, sinks = map(jnp.asarray, self._groups(piece))
        k, v = means(piece.net, piece.state, start, groups, sinks)
        live = jnp.asarray(np.asarray(count) < piece.lengths)
        return write(piece.net, piece.state, Made(k, v), start, count, live)

    def _groups(
        self, piece: Piece
    ) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
        """Numbers the slots that tokens of the piece go into (T: none), and the sinks.

        Sinks are the first slots, and their tokens are in the first means, too.
        """
        w, size = piece.state.window, piece.tokens.shape[1]
        found = np.full(piece.tokens.shape, size, np.int32)
        compressed = piece.wanted[:, 0] < w
        sinks = np.where((piece.start == 0) & compressed & (piece.lengths > 0), 1, 0)
        sinks *= Law.of(piece.net.config).sink
        for row, length, wanted, sink in zip(
            found, piece.lengths, piece.wanted, sinks, strict=True
        ):
            at = 0
            for i in range(int(length) // w):
                first = sink if i == 0 else 0
                groups = first + np.arange(w) * (int(wanted[i]) - first) // w
                row[i * w : (i + 1) * w] = at + groups
                at += int(wanted[i])
        return found, sinks.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("net",))
def means(
    net: Net,
    state: MemoryState,
    start: Int[Array, " B"],
    groups: Int[Array, "B T"],
    sinks: Int[Array, " B"],
) -> tuple[Float[Array, "L B T K H"], Float[Array, "L B T K H"]]:
    """Averages slots start ... start + T - 1 of each row by groups; T is in none.

    Args:
      sinks: how many of a row's first slots come out as they are.

    Returns:
      Keys, not rotated but with the magnitude of rotated ones, and values.
    """
    size = groups.shape[1]
    at = jnp.minimum(start[:, None] + jnp.arange(size), state.capacity - 1)
    cos, sin = cos_sin(net.config, -at, scaled=False)
    total = jax.vmap(
        lambda x, ids: jax.ops.segment_sum(x, ids, num_segments=size, mode="drop")
    )
    number = jnp.maximum(total(jnp.ones(groups.shape), groups), 1)[..., None, None]

    def one(layer):
        take = lambda x: jnp.take_along_axis(
            floats(net, x, layer), at[..., None, None], axis=1
        )
        front = (jnp.arange(size) < sinks[:, None])[..., None, None]
        mean = lambda x: jnp.where(front, x, total(x, groups) / number)
        return mean(rotate(take(state.k), cos, sin)), mean(take(state.v))

    return jax.lax.map(one, jnp.arange(net.config.num_layers))
