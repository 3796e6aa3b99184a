"""Expected attention (Devoto et al. 2025): what queries to come would attend to.

Per head the queries of a piece are taken as normally distributed. Turned by the mean of
the rotations of the next 512 positions, their mean and covariance say what attention a
key may expect: softmax of k.mu / sqrt(H) + k.Sigma.k / 2H. It is averaged over the
heads of a group and multiplied by the norm of the value.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.compressors.base import FORCED, Compressor
from beacon_jax.inference.compressors.piece import Piece, floats
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin

SINKS, AHEAD = 4, 512


class ExpectedAttention(Compressor):
    """Keeps the first 4 tokens of a text, and what queries to come may attend to.

    The piece is run once more, for its queries.
    """

    name = "expected-attention"

    def observe(self, piece: Piece) -> Any:
        total = None
        for queries, at, real in piece.windows():
            real = jnp.asarray(real & (at >= SINKS))
            total = _moments(queries, real, total)
        return total

    def score(
        self, piece: Piece, seen: Any, count: Int[Array, " B"]
    ) -> Float[Array, "L B K S"]:
        at = jnp.asarray(piece.stop, jnp.int32)
        inside = jnp.asarray(piece.inside)
        return _scores(piece.net, piece.state, seen, at, inside)


@jax.jit
def _moments(
    queries: Float[Array, "L B T N H"], real: Bool[Array, "B T"], total: Any
) -> tuple[Array, Array, Array]:
    """Adds a window's queries to their number, sum and sum of squares."""
    q = jnp.where(real[..., None, None], queries, 0).astype(jnp.float32)
    found = (
        real.sum(1).astype(jnp.float32),
        q.sum(2),
        jnp.einsum("LBTNH,LBTNJ->LBNHJ", q, q),
    )
    return found if total is None else jax.tree.map(jnp.add, total, found)


@functools.partial(jax.jit, static_argnames="net")
def _scores(
    net: Net,
    state: MemoryState,
    moments: tuple[Array, Array, Array],
    at: Int[Array, " B"],
    inside: Bool[Array, "B S"],
) -> Float[Array, "L B K S"]:
    number, sums, squares = moments
    number = jnp.maximum(number, 1.0)[:, None, None]
    h = sums.shape[-1]
    # The mean of the rotations to come: R x = c x + s (-x2, x1), per row.
    cos, sin = cos_sin(net.config, at[:, None] + jnp.arange(AHEAD))
    cos, sin = cos[:, :, 0].mean(1), sin[:, :, 0].mean(1)  # [B, H/2]
    eye = jnp.eye(h // 2)
    upper = jnp.concatenate([cos[..., None] * eye, -sin[..., None] * eye], -1)
    lower = jnp.concatenate([sin[..., None] * eye, cos[..., None] * eye], -1)
    turn = jnp.concatenate([upper, lower], -2)  # [B, H, H]
    first = jnp.arange(state.capacity) < SINKS

    def one(x):
        layer, total, square = x
        mean = total / number  # [B, N, H]
        spread = square / number[..., None] - mean[..., :, None] * mean[..., None, :]
        mean = jnp.einsum("BIJ,BNJ->BNI", turn, mean)
        spread = jnp.einsum("BIJ,BNJK,BLK->BNIL", turn, spread, turn)
        keys, values = (floats(net, x, layer) for x in (state.k, state.v))
        heads = keys.shape[2]
        group = lambda x: x.reshape(x.shape[0], heads, -1, *x.shape[2:])
        scores = jnp.einsum("BKGH,BSKH->BKGS", group(mean), keys) / h**0.5
        quadratic = jnp.einsum("BKGHJ,BSKJ->BKGSH", group(spread), keys)
        scores += jnp.einsum("BKGSH,BSKH->BKGS", quadratic, keys) / (2 * h)
        seen = (inside & ~first)[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1).mean(2)
        norms = jnp.moveaxis(jnp.linalg.norm(values, axis=-1), 2, 1)
        return jnp.where(first, FORCED, weights * norms)

    return jax.lax.map(one, (jnp.arange(len(sums)), sums, squares))
