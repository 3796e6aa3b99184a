"""`prefix_attention` in XLA by blocks of keys: memory does not grow with S.

The online softmax of FlashAttention (arXiv 2205.14135) in plain jax, forward and
backward. Blocks behind the longest row's last key are neither read nor computed: the
loop's trip count is data. For GPU and TPU wherever no kernel takes the arguments; a
CPU has `blockwise_cpu`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from beacon_jax.attention.device import Target

BLOCK = 512
# Names of the residuals, for checkpoint policies that keep them.
OUT, LSE = "attention_out", "attention_lse"


def blockwise(
    q,
    k,
    v,
    prefix,
    *,
    scale,
    layer=None,
    queries=None,
    target: Target | None = None,
    block=BLOCK,
):
    """See `api.prefix_attention`."""
    del target  # the same for all
    out: Any = _attend(scale, block, q, k, v, prefix, layer)
    if queries is not None:
        valid = jnp.arange(q.shape[1]) < queries[:, None]
        out = jnp.where(valid[..., None, None], out, 0)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, block, q, k, v, prefix, layer):
    return forward(scale, block, q, k, v, prefix, layer)[0]


def _grouped(x, heads):
    """[B, T, N, H] -> [B, T, K, G, H]"""
    b, t, _, h = x.shape
    return x.reshape(b, t, heads, -1, h)


def forward(scale, block, q, k, v, prefix, layer):
    """Returns out [B, T, N, H] and the log of softmax's denominators [B, N, T]."""
    b, t, n, h = q.shape
    heads, block = k.shape[-2], min(block, k.shape[-3])
    q = _grouped(q, heads)

    def step(i, carry):
        m, total, acc = carry
        keys, values, scores = _block(scale, block, i, q, k, v, prefix, layer)
        del keys
        top = jnp.maximum(m, scores.max(-1))
        p = jnp.exp(scores - top[..., None])
        fade = jnp.exp(m - top)
        part = jnp.einsum(
            "BKGTS,BSKH->BKGTH",
            p.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return top, total * fade + p.sum(-1), acc * fade[..., None] + part

    shape = (b, heads, n // heads, t)
    start = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, h), jnp.float32),
    )
    blocks = _blocks(block, t, prefix)
    # Key 0 is visible to every query, so that after block 0 no maximum is -inf.
    m, total, acc = lax.fori_loop(0, blocks, step, start)
    out = jnp.moveaxis(acc / total[..., None], 3, 1).reshape(b, t, n, h)
    return out.astype(q.dtype), (m + jnp.log(total)).reshape(b, n, t)


def _attend_fwd(scale, block, q, k, v, prefix, layer):
    out, lse = forward(scale, block, q, k, v, prefix, layer)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return out, (q, k, v, prefix, layer, out, lse)


def pull(scale, block, residuals, d_out, gradients=None):
    """Returns cotangents of (q, k, v, prefix, layer); residuals: those and out, lse.
    gradients: `backward` or what does the same."""
    _, k, _, _, layer, *_ = residuals
    find: Any = gradients or backward
    d_q, d_k, d_v = find(scale, block, *residuals, d_out)
    if layer is not None:
        d_k, d_v = (jnp.zeros(k.shape, d.dtype).at[layer].set(d) for d in (d_k, d_v))
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_fwd, pull)


def backward(scale, block, q, k, v, prefix, layer, out, lse, d_out):
    """Returns d_q [B, T, N, H] and, of the layer, d_k and d_v [B, S, K, H]."""
    b, t, n, h = q.shape
    heads, block = k.shape[-2], min(block, k.shape[-3])
    q, out, d_out = (_grouped(x, heads) for x in (q, out, d_out))
    lse = lse.reshape(b, heads, n // heads, t)
    delta = jnp.einsum(
        "BTKGH,BTKGH->BKGT", d_out, out, preferred_element_type=jnp.float32
    )

    def add(buffer, at, part):
        """Overlapping ends of two blocks: the second block's part is 0 there."""
        old = lax.dynamic_slice_in_dim(buffer, at, block, axis=1)
        new = old + _pin(part.astype(buffer.dtype))
        return lax.dynamic_update_slice_in_dim(buffer, new, at, axis=1)

    def step(i, carry):
        d_q, d_k, d_v = carry
        keys, values, scores = _block(scale, block, i, q, k, v, prefix, layer)
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
        at = first_slot(block, i, k)
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


def _blocks(block, t, prefix):
    """Blocks that hold a key which some row sees."""
    return (jnp.max(prefix) + t + block - 1) // block


def _pin(block):
    """The products want other layouts than [B, S', K, H]. Without this XLA gives them
    to the whole buffer, of which it then holds several copies (11 GiB at 7B, 20K)."""
    return with_layout_constraint(block, Layout((0, 1, 2, 3)))


def first_slot(block, i, k):
    """The first slot that block i reads: the last block ends with the buffer."""
    return jnp.minimum(i * block, k.shape[-3] - block)


def _block(scale, block, i, q, k, v, prefix, layer):
    """Keys and values [B, S', K, H] of block i, 0 where dead, and scores
    [B, K, G, T, S'], -inf where not visible or part of the block before."""
    at = first_slot(block, i, k)

    def rows(buffer):
        if layer is None:
            part = lax.dynamic_slice_in_dim(buffer, at, block, axis=1)
        else:
            sizes = (1, buffer.shape[1], block, *buffer.shape[3:])
            part = lax.dynamic_slice(buffer, (layer, 0, at, 0, 0), sizes)[0]
        return _pin(part)

    t = q.shape[1]
    slot = at + jnp.arange(block)
    mine = slot >= i * block
    # Nothing dead is read: 0 * NaN would be NaN.
    live = (mine & (slot < (prefix + t)[:, None]))[..., None, None]
    keys, values = jnp.where(live, rows(k), 0), jnp.where(live, rows(v), 0)
    last = prefix[:, None] + jnp.arange(t)
    visible = mine & (slot <= last[:, :, None])  # [B, T, S']
    scores = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q, keys, preferred_element_type=jnp.float32
    )
    return keys, values, jnp.where(visible[:, None, None], scores, -jnp.inf)
