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
from jaxtyping import Array, Float, Int, Num

from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.mean import MeanTerm, cos_sin_table
from beacon_jax.attention.shared import (
    Layer,
    Shaped,
    Sums,
    add_block,
    check_per_slot,
    first_slot,
    no_sums,
    read_block,
    stacked,
    zero_invalid,
)

BLOCK = 512
# On a CPU a block's floats stay in the cache: at most so many bytes, but LEAST slots.
CPU_BYTES, LEAST = 2**23, 64


def check_scales(
    k: Array, v: Array, k_scale: Array | None, v_scale: Array | None
) -> None:
    """Raises ValueError if the scales do not belong to the buffers."""
    for name, buffer, scale in (("k", k, k_scale), ("v", v, v_scale)):
        if (buffer.dtype == jnp.int8) != (scale is not None):
            raise ValueError(
                f"{name} of dtype {buffer.dtype} with {name}_scale="
                f"{'None' if scale is None else scale.dtype}: int8 needs scales, "
                f"nothing else has any."
            )
        if scale is not None:
            check_per_slot(f"{name}_scale", scale, name, buffer)


def cpu_block(k: Shaped, dtype: Any, queries: int = 1) -> int:
    """Counts the slots that few queries read at once on a CPU.

    Of k [*L, B, S, K, H], as numbers of this dtype. It depends on S only where a block
    would be the whole buffer: XLA then takes that for the product as it lies, and 8
    rows of Llama-3-8B's heads on 480 of 512 slots take 18.9 ms in place of 3.3 (two
    cores, bfloat16).

    Eight rows of Llama-2-7B's heads on 4,096 slots of int8, with the keys' mean, take
    163 ms by blocks of 512 (64 MiB as floats), 74 by blocks of 64, on two AVX2 cores.
    Two queries, a token and its beacon, are as fast by blocks of 256 as of 512 on 4,000
    slots, and faster on few.
    """
    b, slots, heads, h = k.shape[-4:]
    slot = b * heads * h * jnp.dtype(dtype).itemsize
    most = BLOCK if queries == 1 else BLOCK // 2
    block = min(max(CPU_BYTES // slot, LEAST), most)
    return block if block < slots else max(slots // 4, min(LEAST, slots))


def combine(
    parts: Float[Array, "*X Z R H"], lse: Float[Array, "*X Z R"]
) -> Float[Array, "*X R H"]:
    """Combines attention over disjoint parts of the slots to that over all.

    Args:
      parts: Z of them in float32, each with its own softmax; anything where empty.
      lse: log of each softmax's denominator, -inf where empty.

    Returns:
      float32; 0 where every part is empty.
    """
    top = lse.max(-2, keepdims=True)
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - top))
    total = jnp.maximum(weight.sum(-2), jnp.finfo(jnp.float32).tiny)
    kept = jnp.where(weight[..., None] > 0, parts, 0)  # an empty part may hold NaN
    return (kept * weight[..., None]).sum(-3) / total[..., None]


def decode_xla(
    q: Float[Array, "B T N H"],
    k: Num[Array, "*L B S K H"],
    v: Num[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float,
    layer: Layer = None,
    queries: Int[Array, " B"] | None = None,
    k_scale: Float[Array, "*_L _B _K _S"] | None = None,
    v_scale: Float[Array, "*_L _B _K _S"] | None = None,
    mean: MeanTerm | None = None,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
    target: Target | None = None,
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` over int8 memory, wherever no kernel runs.

    By blocks of slots up to the longest row's last; None: BLOCK, or `cpu_block` on a
    CPU. Forward only.

    Raises:
      NotImplementedError: k_scale not given (`blockwise` is that).
    """
    if k_scale is None:
        raise NotImplementedError("k_scale=None: this is for int8 memory.")
    check_scales(k, v, k_scale, v_scale)
    layer, k, v, *numbers = stacked(layer, k, v, k_scale, v_scale, bias)
    if block is None:
        platform = (target or default_target()).platform
        block = cpu_block(k, q.dtype) if platform == "cpu" else BLOCK
    out: Any = _int8(scale, block, q, k, v, prefix, layer, *numbers, mean)
    return zero_invalid(out, queries)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _int8(
    scale: float,
    block: int,
    q: Float[Array, "B T N H"],
    k: Int[Array, "L B S K H"],
    v: Int[Array, "L B S K H"],
    prefix: Int[Array, " B"],
    layer: Int[Array, ""],
    k_scale: Float[Array, "L B K S"],
    v_scale: Float[Array, "L B K S"],
    bias: Float[Array, "L B K S"] | None,
    mean: MeanTerm | None,
) -> Float[Array, "B T N H"]:
    b, t, n, h = q.shape
    s, heads = k.shape[2:4]
    block = min(block, s)
    q = q.reshape(b, t, heads, n // heads, h)
    last = prefix[:, None] + jnp.arange(t)
    table = None if mean is None else cos_sin_table(mean.turns, jnp.arange(block))

    def mean_scores(at: Array) -> Array | float:
        if mean is None:
            return 0.0
        return jnp.einsum(
            "BTKGH,SH->BKGTS",
            mean.turned_by(at).reshape(q.shape),
            table,
            precision=lax.Precision.HIGHEST,
        )

    def step(i: Array, sums: Sums) -> Sums:
        at = first_slot(block, i, s)
        slot = at + jnp.arange(block)
        mine = slot >= i * block  # the last block ends with the buffer and may overlap
        visible = (mine & (slot <= last[:, :, None]))[:, None, None]
        rows = lambda x: read_block(x, layer, at, block).astype(q.dtype)

        def numbers(x: Array) -> Array:
            x = lax.dynamic_slice(x, (layer, 0, 0, at), (1, b, heads, block))[0]
            live = mine & (slot < (prefix + t)[:, None])
            return jnp.where(live[:, None], x, 0)[:, :, None, None]

        scores = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q, rows(k), preferred_element_type=jnp.float32
        )
        scores = (scores * numbers(k_scale) + mean_scores(at)) * scale
        if bias is not None:
            scores = scores + numbers(bias)
        scores = jnp.where(visible, scores, -jnp.inf)
        weigh = lambda p: jnp.einsum(
            "BKGTS,BSKH->BKGTH",
            (p * numbers(v_scale)).astype(q.dtype),
            rows(v),
            preferred_element_type=jnp.float32,
        )
        return add_block(sums, scores, weigh)

    blocks = (jnp.max(prefix) + t + block - 1) // block
    start = no_sums(b, heads, n // heads, t, h)
    _, total, acc = lax.fori_loop(0, blocks, step, start)
    out = jnp.moveaxis(acc / total[..., None], 3, 1)
    return out.reshape(b, t, n, h).astype(q.dtype)


@_int8.defjvp
def _(*_: Any) -> tuple[Any, Any]:
    raise NotImplementedError("k_scale: attention over int8 memory has no gradient.")
