"""`prefix_attention` in XLA by blocks of keys: memory does not grow with S.

The online softmax of FlashAttention (arXiv 2205.14135) in plain jax, forward and
backward. Blocks behind the longest row's last key are neither read nor computed: the
loop's trip count is data. For GPU and TPU wherever no kernel takes the arguments; a
CPU has `blockwise_cpu`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from beacon_jax.attention.device import Target
from beacon_jax.attention.shared import (
    Layer,
    Sums,
    add_block,
    attend,
    first_slot,
    live_bias,
    no_sums,
    read_block,
    zero_invalid,
)

BLOCK = 512


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float,
    layer: Layer = None,
    queries: Int[Array, " B"] | None = None,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
    target: Target | None = None,
    block: int = BLOCK,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` with so many keys per block."""
    del target  # the same for all
    passes = (functools.partial(f, scale, block) for f in (forward, backward))
    out: Any = attend(*passes, q, k, v, prefix, layer, bias)
    return zero_invalid(out, queries)


def _grouped(x: Float[Array, "B T N H"], heads: int) -> Float[Array, "B T K G H"]:
    b, t, _, h = x.shape
    return x.reshape(b, t, heads, -1, h)


def forward(
    scale: float,
    block: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the result and the log of softmax's denominators."""
    b, t, n, h = q.shape
    heads, block = k.shape[-2], min(block, k.shape[-3])
    q, bias = _grouped(q, heads), live_bias(bias, prefix, t, layer)

    def step(i: Array, sums: Sums) -> Sums:
        at, _, values, scores = _block(scale, block, i, q, k, v, prefix, layer)
        scores = _add_bias(scores, bias, at)
        weigh = lambda p: jnp.einsum(
            "BKGTS,BSKH->BKGTH",
            p.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return add_block(sums, scores, weigh)

    blocks = _blocks(block, t, prefix)
    # Key 0 is visible to every query, so that after block 0 no maximum is -inf.
    start = no_sums(b, heads, n // heads, t, h)
    top, total, acc = lax.fori_loop(0, blocks, step, start)
    out = jnp.moveaxis(acc / total[..., None], 3, 1).reshape(b, t, n, h)
    return out.astype(q.dtype), (top + jnp.log(total)).reshape(b, n, t)


def backward(
    scale: float,
    block: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "*_L _B _K _S"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns d_q and, of the layer, d_k and d_v."""
    b, t, n, h = q.shape
    heads, block = k.shape[-2], min(block, k.shape[-3])
    q, out, d_out = (_grouped(x, heads) for x in (q, out, d_out))
    lse = lse.reshape(b, heads, n // heads, t)
    bias = live_bias(bias, prefix, t, layer)
    delta = jnp.einsum(
        "BTKGH,BTKGH->BKGT", d_out, out, preferred_element_type=jnp.float32
    )

    def add(buffer: Array, at: Array, part: Array) -> Array:
        """Adds the part of a block, which is 0 where it overlaps the block before."""
        old = lax.dynamic_slice_in_dim(buffer, at, block, axis=1)
        new = old + _pin(part.astype(buffer.dtype))
        return lax.dynamic_update_slice_in_dim(buffer, new, at, axis=1)

    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_q, d_k, d_v = carry
        at, keys, values, scores = _block(scale, block, i, q, k, v, prefix, layer)
        scores = _add_bias(scores, bias, at)
        p = jnp.exp(scores - lse[..., None])
        d_p = jnp.einsum(
            "BTKGH,BSKH->BKGTS", d_out, values, preferred_element_type=jnp.float32
        )
        d_s = (p * (d_p - delta[..., None]) * scale).astype(q.dtype)
        d_q = d_q + jnp.einsum(
            "BKGTS,BSKH->BTKGH", d_s, keys, preferred_element_type=jnp.float32
        )
        sums = functools.partial(
            jnp.einsum, "BKGTS,BTKGH->BSKH", preferred_element_type=jnp.float32
        )
        d_k = add(d_k, at, sums(d_s, q))
        return d_q, d_k, add(d_v, at, sums(p.astype(d_out.dtype), d_out))

    rows = k.shape if layer is None else k.shape[1:]
    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.zeros(rows, k.dtype),
        jnp.zeros(rows, v.dtype),
    )
    d_q, d_k, d_v = lax.fori_loop(0, _blocks(block, t, prefix), step, start)
    return d_q.astype(q.dtype).reshape(b, t, n, h), d_k, d_v


def _blocks(block: int, t: int, prefix: Int[Array, " B"]) -> Int[Array, ""]:
    """Counts the blocks with a key that some row sees."""
    return (jnp.max(prefix) + t + block - 1) // block


def _add_bias(
    scores: Float[Array, "B K G T block"],
    bias: Float[Array, "B K S"] | None,
    at: Int[Array, ""],
) -> Float[Array, "B K G T block"]:
    """Adds what `live_bias` gave of the slots from `at` on."""
    if bias is None:
        return scores
    part = lax.dynamic_slice_in_dim(bias, at, scores.shape[-1], axis=2)
    return scores + part[:, :, None, None]


def _pin(block: Array) -> Array:
    """Keeps the layout of [B, S', K, H], of which the products want others.

    Without this XLA gives them to the whole buffer, of which it then holds several
    copies (11 GiB at 7B, 20K).
    """
    return with_layout_constraint(block, Layout((0, 1, 2, 3)))


def _block(
    scale: float,
    block: int,
    i: Int[Array, ""],
    q: Float[Array, "B T K G H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
) -> tuple[
    Int[Array, ""],
    Float[Array, "B block K H"],
    Float[Array, "B block K H"],
    Float[Array, "B K G T block"],
]:
    """Returns block i's first slot, its keys and values, 0 where dead, and scores.

    These are -inf where not visible or part of the block before.
    """
    at = first_slot(block, i, k.shape[-3])
    t = q.shape[1]
    slot = at + jnp.arange(block)
    mine = slot >= i * block
    # Nothing dead is read: 0 * NaN would be NaN.
    live = (mine & (slot < (prefix + t)[:, None]))[..., None, None]
    keys, values = (
        jnp.where(live, _pin(read_block(x, layer, at, block)), 0) for x in (k, v)
    )
    last = prefix[:, None] + jnp.arange(t)
    visible = mine & (slot <= last[:, :, None])  # [B, T, S']
    scores = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q, keys, preferred_element_type=jnp.float32
    )
    return at, keys, values, jnp.where(visible[:, None, None], scores, -jnp.inf)
