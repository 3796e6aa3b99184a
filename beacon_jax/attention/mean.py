"""Scores against a mean that was taken out of rotated int8 keys.

Key biases (Qwen2) put outliers in fixed channels of the un-rotated key, which would eat
the 8 bits of all others. What is stored is k - R_p mu, R_p the rotation of position p
and mu [H] a mean of un-rotated keys. Since q . R_p mu = sum_i a_i cos(p theta_i) +
b_i sin(p theta_i), with a = q1 mu1 + q2 mu2 and b = q2 mu1 - q1 mu2 of the halves of q
and mu, the scores get the missing term from the queries: neither a mean is added to
keys nor a key dequantised.

The table [S, H] of cosines and sines would be half as many bytes as an int8 memory of
four kv heads. Turning [a | b] back by a block's first position leaves one table of a
block's own positions for all blocks, rows, heads and layers.

Precision: with mu = 100 in all of 128 channels, scores up to 270 and positions up to
131,072 a bfloat16 table errs by 0.6 against float64, float32 by 2e-4, and two bfloat16
parts of each factor, three products on the matrix unit, by 2e-3. XLA and float32
queries take float32; kernels with bfloat16 queries the two parts: a float32 product
costs a TPU six passes, and a GPU has no tensor cores for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from beacon_jax.attention.shared import Layer

# Bits behind the 32 of a turn: sums of positions up to 2**22 stay exact.
MORE_BITS = 10


class MeanTerm(NamedTuple):
    """The part of the scores that comes from a mean taken out of the keys.

    Attributes:
      query: [a | b] per query head.
      turns: those of the frequencies, as the function `turns` returns them.
    """

    query: Float[Array, "B T N H"]
    turns: UInt32[Array, "2 pairs"]

    def turned_by(self, position: Int[Array, ""]) -> Float[Array, "B T N H"]:
        """Turns [a | b], for positions that are counted from this one."""
        cos, sin = first_factors(self.turns, position)
        return self.query * cos + quarter(self.query) * sin


def mean_term(
    q: Float[Array, "B T N H"],
    k_mean: Float[Array, "*L B K H"],
    frequencies: Float[np.ndarray, " pairs"],
    layer: Layer = None,
) -> MeanTerm:
    """Makes the term of rotated queries and of un-rotated keys' mean, or one layer's.

    frequencies: angle per position of each pair (i, i + H/2).

    Raises:
      ValueError: shapes that do not belong together.
    """
    if layer is not None:
        k_mean = lax.dynamic_index_in_dim(k_mean, layer, keepdims=False)
    b, _, n, h = q.shape
    heads = k_mean.shape[-2]
    if k_mean.shape != (b, heads, h) or n % heads or len(frequencies) != h // 2:
        raise ValueError(
            f"k_mean of a layer has shape {k_mean.shape}, frequencies "
            f"{np.shape(frequencies)}: q {q.shape} needs ({b}, K, {h}) and ({h // 2},)."
        )
    mean = jnp.repeat(k_mean.astype(jnp.float32), n // heads, axis=1)[:, None]
    q1, q2 = jnp.split(q.astype(jnp.float32), 2, -1)
    mu1, mu2 = jnp.split(mean, 2, -1)
    query = jnp.concatenate([q1 * mu1 + q2 * mu2, q2 * mu1 - q1 * mu2], -1)
    return MeanTerm(query, jnp.asarray(turns(frequencies)))


def quarter(query: Float[Array, "*B H"]) -> Float[Array, "*B H"]:
    """Turns [a | b] by a quarter, to [b | -a]."""
    a, b = jnp.split(query, 2, -1)
    return jnp.concatenate([b, -a], -1)


def turns(frequencies: Float[np.ndarray, " pairs"]) -> UInt32[np.ndarray, "2 pairs"]:
    """Returns the angle per position in 2**-32 turns, and the rest in 2**-42 turns."""
    each = np.asarray(frequencies, np.float64) / (2 * math.pi) % 1 * 2.0**32
    rest = np.floor((each - np.floor(each)) * 2**MORE_BITS)
    return np.stack([np.floor(each), rest]).astype(np.uint32)


def cos_sin_table(
    turns: UInt32[Array, "2 pairs"], positions: Int[Array, "*B"]
) -> Float[Array, "*B H"]:
    """Returns [cos | sin] of positions, within 5e-7 below 2**17, 6e-6 below 2**22.

    In whole turns modulo 2**32: a float32 product of position and frequency is off by
    0.004 at 131,072, and whoever takes the mean out must agree with who adds it.
    """
    p = jnp.asarray(positions).astype(jnp.uint32)[..., None]
    phase = p * turns[0] + ((p * turns[1]) >> MORE_BITS)
    signed = lax.bitcast_convert_type(phase, jnp.int32)
    angle = signed.astype(jnp.float32) * jnp.float32(2 * math.pi / 2**32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def first_factors(
    turns: UInt32[Array, "2 pairs"], positions: Int[Array, "*B"]
) -> tuple[Float[Array, "*B H"], Float[Array, "*B H"]]:
    """Returns [cos | cos] and [sin | sin] of positions.

    [a | b] * the first + [b | -a] * the second is [a | b] as seen from there.
    """
    cos, sin = jnp.split(cos_sin_table(turns, positions), 2, -1)
    twice = lambda x: jnp.concatenate([x, x], -1)
    return twice(cos), twice(sin)


def kernel_tables(
    turns: UInt32[Array, "2 pairs"], slots: int, block: int, dtype: Any
) -> tuple[Float[Array, "blocks 2 H"], Float[Array, "parts block H"]]:
    """Makes what a kernel with blocks of slots needs besides the queries.

    Returns:
      (starts [ceil(slots / block), 2, H] float32: `first_factors` of each block's first
      slot; table [parts, block, H] of a block's own slots, for `product`: one float32
      part for float32 queries, else two of bfloat16).
    """
    first = jnp.arange(-(-slots // block)) * block
    starts = jnp.stack(first_factors(turns, first), -2)
    table = cos_sin_table(turns, jnp.arange(block))
    if dtype == jnp.float32:
        return starts, table[None]
    # XLA may drop a conversion there and back, but not this.
    high = lax.reduce_precision(table, 8, 7)
    return starts, jnp.stack([high, table - high]).astype(jnp.bfloat16)


def product(
    dot: Callable[[Array, Array], Array],
    query: Float[Array, "R H"],
    table: Sequence[Float[Array, "S H"]],
) -> Float[Array, "R S"]:
    """Computes query @ table.T in float32 in a kernel.

    dot: multiplies so with a float32 result. table: its parts.
    """
    if len(table) == 1:
        return dot(query, table[0])
    high, low = table
    bits = lax.bitcast_convert_type(query, jnp.int32) & jnp.int32(-(2**16))
    upper = lax.bitcast_convert_type(bits, jnp.float32)
    lower = (query - upper).astype(jnp.bfloat16)
    upper = upper.astype(jnp.bfloat16)
    return dot(upper, high) + (dot(upper, low) + dot(lower, high))
