"""Decoding over a long memory: what its kernels share, and the XLA version.

An int8 memory has one float32 scale per slot and kv head, [B, K, S] (stacked over
layers if k and v are): an entry is k[b, s, n] * k_scale[b, n, s]. Slots come last: a
block of one head's scales lies along the lanes of a TPU's registers and of a GPU's
loads; a TPU would pad [B, S, K] to 128 lanes, half of the memory's own bytes with 8
heads of 128. Scales multiply scores and weights instead of keys and values: int8 is
exact in bfloat16, no dequantised block exists. Keys may lack a mean, which `mean` puts
back into the scores.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.mean import MeanTerm, cos_sin_table

BLOCK = 512
# On a CPU a block's floats stay in the cache: at most so many bytes, but LEAST slots.
CPU_BYTES, LEAST = 2**23, 64


def check_scales(k, v, k_scale, v_scale):
    """Raises ValueError if the scales do not belong to the buffers."""
    for name, buffer, scale in (("k", k, k_scale), ("v", v, v_scale)):
        if (buffer.dtype == jnp.int8) != (scale is not None):
            raise ValueError(
                f"{name} of dtype {buffer.dtype} with {name}_scale="
                f"{'None' if scale is None else scale.dtype}: int8 needs scales, "
                f"nothing else has any."
            )
        if scale is None:
            continue
        *front, s, heads, _ = buffer.shape
        if scale.shape != (*front, heads, s):
            raise ValueError(
                f"{name}_scale has shape {scale.shape}: {name} {buffer.shape} needs "
                f"{(*front, heads, s)}."
            )


def cpu_block(k, dtype) -> int:
    """Slots that few queries read at once on a CPU, of k [.., B, S, K, H] as dtype.

    Eight rows of Llama-2-7B's heads on 4,096 slots of int8, with the keys' mean, take
    163 ms by blocks of 512 (64 MiB as floats), 74 by blocks of 64, on two AVX2 cores.
    """
    b, _, heads, h = k.shape[-4:]
    slot = b * heads * h * jnp.dtype(dtype).itemsize
    return min(max(CPU_BYTES // slot, LEAST), BLOCK)


def zero_invalid(out, queries):
    """Returns out [B, T, N, H] with 0 behind each row's valid queries."""
    if queries is None:
        return out
    valid = jnp.arange(out.shape[1]) < queries[:, None]
    return jnp.where(valid[..., None, None], out, 0)


def combine(parts, lse):
    """Combines attention over disjoint parts of the slots to that over all.

    Args:
      parts: float32 [..., Z, R, H], each with its own softmax; anything where empty.
      lse: [..., Z, R] log of each softmax's denominator, -inf where empty.

    Returns:
      [..., R, H]; 0 where every part is empty.
    """
    top = lse.max(-2, keepdims=True)
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - top))
    total = jnp.maximum(weight.sum(-2), jnp.finfo(jnp.float32).tiny)
    kept = jnp.where(weight[..., None] > 0, parts, 0)  # an empty part may hold NaN
    return (kept * weight[..., None]).sum(-3) / total[..., None]


def decode_xla(
    q,
    k,
    v,
    prefix,
    *,
    scale,
    layer=None,
    queries=None,
    k_scale: Any = None,
    v_scale: Any = None,
    mean: MeanTerm | None = None,
    target: Target | None = None,
    block=None,
):
    """See `api.prefix_attention`: over int8 memory, wherever no kernel runs.

    By blocks of slots up to the longest row's last; None: BLOCK, or `cpu_block` on a
    CPU. Forward only.

    Raises:
      NotImplementedError: k_scale not given (`blockwise` is that).
    """
    if k_scale is None:
        raise NotImplementedError("k_scale=None: this is for int8 memory.")
    check_scales(k, v, k_scale, v_scale)
    if layer is None:
        k, v, k_scale, v_scale = (x[None] for x in (k, v, k_scale, v_scale))
        layer = 0
    if block is None:
        platform = (target or default_target()).platform
        block = cpu_block(k, q.dtype) if platform == "cpu" else BLOCK
    out: Any = _int8(scale, block, q, k, v, prefix, layer, k_scale, v_scale, mean)
    return zero_invalid(out, queries)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _int8(scale, block, q, k, v, prefix, layer, k_scale, v_scale, mean):
    b, t, n, h = q.shape
    s, heads = k.shape[2:4]
    block = min(block, s)
    q = q.reshape(b, t, heads, n // heads, h)
    last = prefix[:, None] + jnp.arange(t)
    table = None if mean is None else cos_sin_table(mean.turns, jnp.arange(block))

    def mean_scores(at):
        if mean is None:
            return 0.0
        return jnp.einsum(
            "BTKGH,SH->BKGTS",
            mean.turned_by(at).reshape(q.shape),
            table,
            precision=lax.Precision.HIGHEST,
        )

    def step(i, carry):
        top, total, acc = carry
        at = jnp.minimum(i * block, s - block)
        slot = at + jnp.arange(block)
        mine = slot >= i * block  # the last block ends with the buffer and may overlap
        visible = (mine & (slot <= last[:, :, None]))[:, None, None]

        def rows(x):
            x = lax.dynamic_slice(x, (layer, 0, at, 0, 0), (1, b, block, heads, h))[0]
            return x.astype(q.dtype)

        def scales(x):
            x = lax.dynamic_slice(x, (layer, 0, 0, at), (1, b, heads, block))[0]
            live = mine & (slot < (prefix + t)[:, None])
            return jnp.where(live[:, None], x, 0)[:, :, None, None]

        scores = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q, rows(k), preferred_element_type=jnp.float32
        )
        scores = scores * scales(k_scale) + mean_scores(at)
        scores = jnp.where(visible, scores * scale, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1))
        p, fade = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        part = jnp.einsum(
            "BKGTS,BSKH->BKGTH",
            (p * scales(v_scale)).astype(q.dtype),
            rows(v),
            preferred_element_type=jnp.float32,
        )
        return new, total * fade + p.sum(-1), acc * fade[..., None] + part

    shape = (b, heads, n // heads, t)
    start = (
        jnp.full(shape, -jnp.inf),
        jnp.zeros(shape),
        jnp.zeros((*shape, h), jnp.float32),
    )
    blocks = (jnp.max(prefix) + t + block - 1) // block
    _, total, acc = lax.fori_loop(0, blocks, step, start)
    out = jnp.moveaxis(acc / total[..., None], 3, 1)
    return out.reshape(b, t, n, h).astype(q.dtype)


@_int8.defjvp
def _(*_):
    raise NotImplementedError("k_scale: attention over int8 memory has no gradient.")
