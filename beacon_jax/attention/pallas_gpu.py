"""`prefix_attention` as Pallas-Triton kernels for GPU (sm_80, sm_90).

FlashAttention-2 (arXiv 2307.08691) over [memory | open window], forward and backward.
Lengths are data: a program's loop ends with the last block of keys that one of its
queries sees, so that dead blocks are neither read nor computed. Every index goes
straight into the buffer as it lies in memory, layer included: no slice, no transposed
and no padded copy exists. Sums are float32 in a fixed order, without atomics: two runs
are bit-equal.

Pallas-Triton is the one Pallas path with a backward pass on sm_80. A Mosaic-GPU version
replaces `forward` and `backward`; nothing outside of this file knows more.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from beacon_jax.attention import blockwise
from beacon_jax.attention.device import Target, check_triton, default_target
from beacon_jax.attention.gpu_blocks import Block, GpuBlocks, chip_blocks

LOG2E = math.log2(math.e)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class GpuSchedule(NamedTuple):
    """The static numbers of one call of the kernels.

    ragged: some rows may have fewer than T valid queries.
    group: query heads per kv head.
    """

    scale: float
    group: int
    ragged: bool
    blocks: GpuBlocks
    interpret: bool


def key_blocks(prefix, valid, i, block: Block):
    """Blocks of keys that block i of queries visits in a row: (full, all).

    Every query sees all of the first `full`; the others need a mask. Of ints or arrays.
    """
    start, end = i * block.queries, jnp.minimum((i + 1) * block.queries, valid)
    most = lax.div(prefix + end + block.keys - 1, block.keys)
    most = jnp.where(start < valid, most, 0)
    return jnp.minimum(lax.div(prefix + start + 1, block.keys), most), most


def query_blocks(prefix, valid, j, block: Block):
    """Blocks of queries that see block j of keys in a row: (first, full, end).

    Those from `full` on see all of its keys. first == end where it is dead.
    """
    start, last = j * block.keys - prefix, (j + 1) * block.keys - 1 - prefix
    end = lax.div(valid + block.queries - 1, block.queries)
    first = lax.div(jnp.maximum(start, 0), block.queries)
    first = jnp.where(start < valid, first, end)
    full = lax.div(jnp.maximum(last, 0) + block.queries - 1, block.queries)
    return first, jnp.clip(full, first, end), end


def pallas_gpu(
    q,
    k,
    v,
    prefix,
    *,
    scale,
    layer=None,
    queries=None,
    target: Target | None = None,
    blocks: GpuBlocks | None = None,
    interpret: bool = False,
):
    """See `api.prefix_attention`.

    blocks: sizes other than the chip's. interpret: run the kernels in plain jax, on any
    platform. Otherwise a program that is lowered for another platform than CUDA
    computes the same blockwise.

    Raises:
      NotImplementedError: dtypes other than one of float32, bfloat16 and float16,
        scale <= 0, or a GPU that Triton does not know.
    """
    target = target or default_target()
    if not interpret:
        check_triton(target)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        dtypes = f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}"
        raise NotImplementedError(f"{dtypes}: one of {_names(DTYPES)} for all.")
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: must be greater than 0.")
    t, n, h = q.shape[1:]
    blocks = blocks or chip_blocks(target.kind, h, q.dtype)
    group = n // k.shape[-2]
    schedule = GpuSchedule(float(scale), group, queries is not None, blocks, interpret)
    valid = jnp.full(prefix.shape, t) if queries is None else jnp.minimum(queries, t)
    lengths = jnp.stack([prefix, valid], -1).astype(jnp.int32)
    if layer is None:
        k, v, layer = k[None], v[None], 0
    return _attend(schedule, q, k, v, lengths, jnp.asarray(layer, jnp.int32).reshape(1))


def _names(dtypes):
    return ", ".join(jnp.dtype(dtype).name for dtype in dtypes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(schedule, q, k, v, lengths, layer):
    return _attend_fwd(schedule, q, k, v, lengths, layer)[0]


def _attend_fwd(schedule, q, k, v, lengths, layer):
    kernel = functools.partial(forward, schedule)
    if schedule.interpret:
        out, lse = kernel(q, k, v, lengths, layer)
    else:
        out, lse = lax.platform_dependent(
            q,
            k,
            v,
            lengths,
            layer,
            cuda=kernel,
            default=functools.partial(_forward_elsewhere, schedule),
        )
    out, lse = checkpoint_name(out, blockwise.OUT), checkpoint_name(lse, blockwise.LSE)
    return out, (q, k, v, lengths, layer, out, lse)


def _attend_bwd(schedule, residuals, d_out):
    q, k, v, lengths, layer, out, lse = residuals
    kernel = functools.partial(backward, schedule)
    if schedule.interpret:
        d_q, d_k, d_v = kernel(q, k, v, lengths, layer, out, lse, d_out)
    else:
        d_q, d_k, d_v = lax.platform_dependent(
            q,
            k,
            v,
            lengths,
            layer,
            out,
            lse,
            d_out,
            cuda=kernel,
            default=functools.partial(_backward_elsewhere, schedule),
        )
    if k.shape[0] == 1:
        d_k, d_v = d_k[None], d_v[None]
    else:
        d_k, d_v = (jnp.zeros(k.shape, d.dtype).at[layer[0]].set(d) for d in (d_k, d_v))
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward_elsewhere(schedule, q, k, v, lengths, layer):
    block, prefix = blockwise.BLOCK, lengths[:, 0]
    out, lse = blockwise.forward(schedule.scale, block, q, k, v, prefix, layer[0])
    valid = jnp.arange(q.shape[1]) < lengths[:, 1:]
    out = jnp.where(valid[..., None, None], out, 0)
    return out, jnp.where(valid[:, None], lse, jnp.inf)


def _backward_elsewhere(schedule, q, k, v, lengths, layer, out, lse, d_out):
    valid = (jnp.arange(q.shape[1]) < lengths[:, 1:])[..., None, None]
    q, d_out = jnp.where(valid, q, 0), jnp.where(valid, d_out, 0)
    block, prefix = blockwise.BLOCK, lengths[:, 0]
    return blockwise.backward(
        schedule.scale, block, q, k, v, prefix, layer[0], out, lse, d_out
    )


# The kernels. A grid is (block, head, row). lengths [B, 2]: prefix and valid queries.


def forward(schedule: GpuSchedule, q, k, v, lengths, layer):
    """q [B, T, N, H], k and v [L, B, S, K, H] -> out like q and the log of the
    softmax's denominators float32 [B, N, T], inf for queries that are not valid."""
    b, t, n, h = q.shape
    block = schedule.blocks.forward
    count = pl.cdiv(t, block.queries)
    q_spec, k_spec, row_spec, length_spec = _query_specs(schedule, block, q, k, count)
    return _call(
        functools.partial(_forward_kernel, schedule, block, t, h, count),
        schedule,
        block,
        "prefix_attention_forward",
        (count, n, b),
        [q_spec, k_spec, k_spec, length_spec, _LAYER],
        [q_spec, row_spec],
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, n, t), jnp.float32),
        ],
    )(q, k, v, lengths, layer)


def backward(schedule: GpuSchedule, q, k, v, lengths, layer, out, lse, d_out):
    """Returns d_q [B, T, N, H] and d_k, d_v [B, S, K, H] of the layer.

    They are exactly 0 in dead slots."""
    b, t, n, h = q.shape
    s, heads = k.shape[2:4]
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
    inputs = (q, k, v, d_out, lse, delta, lengths, layer)
    block = schedule.blocks.d_q
    count = pl.cdiv(t, block.queries)
    q_spec, k_spec, row_spec, length_spec = _query_specs(schedule, block, q, k, count)
    d_q = _call(
        functools.partial(_d_q_kernel, schedule, block, t, h, count),
        schedule,
        block,
        "prefix_attention_d_q",
        (count, n, b),
        [q_spec, k_spec, k_spec, q_spec, row_spec, row_spec, length_spec, _LAYER],
        q_spec,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(*inputs)
    block = schedule.blocks.d_kv
    q_spec, k_spec, row_spec, length_spec, d_spec = _key_specs(schedule, block, q, k)
    rows = (b, s, heads, h)
    d_k, d_v = _call(
        functools.partial(_d_kv_kernel, schedule, block, t, s, h),
        schedule,
        block,
        "prefix_attention_d_kv",
        (pl.cdiv(s, block.keys), heads, b),
        [q_spec, k_spec, k_spec, q_spec, row_spec, row_spec, length_spec, _LAYER],
        [d_spec, d_spec],
        [jax.ShapeDtypeStruct(rows, k.dtype), jax.ShapeDtypeStruct(rows, v.dtype)],
    )(*inputs)
    return d_q, d_k, d_v


def _call(kernel, schedule, block, name, grid, in_specs, out_specs, out_shape) -> Any:
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(
            num_warps=block.warps, num_stages=block.stages
        ),
        interpret=schedule.interpret,
        name=name,
    )


_LAYER = pl.BlockSpec((1,), lambda i, n, b: (0,))


def padded(h):
    """Triton's arrays are powers of two, the operands of its products at least 16."""
    return max(16, pl.next_power_of_2(h))


def _query_specs(schedule, block, q, k, count):
    """Specs of q, k, rows [B, N, T] and lengths for programs that own queries.

    The last block comes first: it has the most keys, and ends the grid evenly."""
    h = padded(q.shape[-1])
    layers, s, group, last = k.shape[0], k.shape[2], schedule.group, count - 1
    return (
        pl.BlockSpec(
            (None, block.queries, None, h), lambda i, n, b: (b, last - i, n, 0)
        ),
        pl.BlockSpec(
            (layers, None, s, None, h), lambda i, n, b: (0, b, 0, lax.div(n, group), 0)
        ),
        pl.BlockSpec((None, None, block.queries), lambda i, n, b: (b, n, last - i)),
        pl.BlockSpec((None, 2), lambda i, n, b: (b, 0)),
    )


def _key_specs(schedule, block, q, k):
    """The same, and of d_k, for programs that own keys and their query heads."""
    t, h = q.shape[1], padded(q.shape[-1])
    layers, s = k.shape[0], k.shape[2]
    return (
        pl.BlockSpec((None, t, schedule.group, h), lambda j, n, b: (b, 0, n, 0)),
        pl.BlockSpec((layers, None, s, None, h), lambda j, n, b: (0, b, 0, n, 0)),
        pl.BlockSpec((None, schedule.group, t), lambda j, n, b: (b, n, 0)),
        pl.BlockSpec((None, 2), lambda j, n, b: (b, 0)),
        pl.BlockSpec((None, block.keys, None, h), lambda j, n, b: (b, j, n, 0)),
    )


def dot(a, b, trans_b=False):
    """Multiplies with a float32 result; float32 operands keep all their bits."""
    exact = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else None
    return plt.dot(a, b, trans_b=trans_b, precision=precision)


def load(ref, h, rows=None):
    """A block [rows, H] of ref, with 0 in padded columns and where not in `rows`, which
    are not read; rows=None: in all of them."""
    columns = jnp.arange(ref.shape[-1]) < h if ref.shape[-1] > h else None
    if rows is None and columns is None:
        return plt.load(ref)
    masks = [] if rows is None else [rows[:, None]]
    masks += [] if columns is None else [columns[None, :]]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), ref.shape)
    return plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def _load_row(ref, rows, other):
    if rows is None:
        return plt.load(ref)
    return plt.load(ref, mask=rows, other=jnp.float32(other))


def _store(ref, x, rows, h):
    mask = rows[:, None] & (jnp.arange(ref.shape[-1]) < h)[None, :]
    plt.store(ref, x.astype(ref.dtype), mask=mask)


def _visible(prefix, i, j, block):
    """[queries, keys] of blocks i and j."""
    last = prefix + i * block.queries + jnp.arange(block.queries)
    slot = j * block.keys + jnp.arange(block.keys)
    return slot[None, :] <= last[:, None]


def _forward_kernel(
    schedule,
    block,
    t,
    h,
    count,
    q_ref,
    k_ref,
    v_ref,
    length_ref,
    layer_ref,
    out_ref,
    lse_ref,
):
    i = count - 1 - pl.program_id(0)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    row = i * block.queries + jnp.arange(block.queries)
    # A query that is not valid may be anything, but its row of the result is its own.
    q = load(q_ref, h, None if t % block.queries == 0 else row < t)
    factor = schedule.scale * LOG2E

    def step(j, carry, *, masked):
        m, total, acc = carry
        start = j * block.keys
        live = start + jnp.arange(block.keys) < prefix + valid if masked else None
        at = (layer, pl.ds(start, block.keys), slice(None))
        scores = dot(q, load(k_ref.at[at], h, live), trans_b=True)
        if masked:
            scores = jnp.where(_visible(prefix, i, j, block), scores, -jnp.inf)
        top = jnp.maximum(m, scores.max(-1) * factor)
        p = jnp.exp2(scores * factor - top[:, None])
        fade = jnp.exp2(m - top)
        values = load(v_ref.at[at], h, live)
        part = dot(p.astype(values.dtype), values)
        return top, total * fade + p.sum(-1), acc * fade[:, None] + part

    start = (
        jnp.full(block.queries, -jnp.inf, jnp.float32),
        jnp.zeros(block.queries, jnp.float32),
        jnp.zeros((block.queries, q_ref.shape[-1]), jnp.float32),
    )
    full, end = key_blocks(prefix, valid, i, block)
    carry = lax.fori_loop(0, full, functools.partial(step, masked=False), start)
    # Key 0 is visible to every query, so that after block 0 no maximum is -inf.
    carry = lax.fori_loop(full, end, functools.partial(step, masked=True), carry)
    m, total, acc = carry
    keep = row < valid
    _store(out_ref, jnp.where(keep[:, None], acc / total[:, None], 0), row < t, h)
    lse = jnp.where(keep, (m + jnp.log2(total)) / LOG2E, jnp.inf)
    plt.store(lse_ref, lse, mask=row < t)


def _d_q_kernel(
    schedule,
    block,
    t,
    h,
    count,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    length_ref,
    layer_ref,
    d_q_ref,
):
    i = count - 1 - pl.program_id(0)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    row = i * block.queries + jnp.arange(block.queries)
    rows = row < valid if schedule.ragged or t % block.queries else None
    q, d_out = load(q_ref, h, rows), load(d_out_ref, h, rows)
    # Where the denominator is inf, p is 0.
    lse = _load_row(lse_ref, rows, jnp.inf) * LOG2E
    delta = _load_row(delta_ref, rows, 0)
    factor = schedule.scale * LOG2E

    def step(j, d_q, *, masked):
        start = j * block.keys
        live = start + jnp.arange(block.keys) < prefix + valid if masked else None
        at = (layer, pl.ds(start, block.keys), slice(None))
        keys = load(k_ref.at[at], h, live)
        p = jnp.exp2(dot(q, keys, trans_b=True) * factor - lse[:, None])
        if masked:
            p = jnp.where(_visible(prefix, i, j, block), p, 0)
        d_p = dot(d_out, load(v_ref.at[at], h, live), trans_b=True)
        d_s = p * (d_p - delta[:, None])
        return d_q + dot(d_s.astype(keys.dtype), keys)

    full, end = key_blocks(prefix, valid, i, block)
    d_q = jnp.zeros((block.queries, q_ref.shape[-1]), jnp.float32)
    d_q = lax.fori_loop(0, full, functools.partial(step, masked=False), d_q)
    d_q = lax.fori_loop(full, end, functools.partial(step, masked=True), d_q)
    _store(d_q_ref, d_q * schedule.scale, row < t, h)


def _d_kv_kernel(
    schedule,
    block,
    t,
    s,
    h,
    q_ref,
    k_ref,
    v_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    length_ref,
    layer_ref,
    d_k_ref,
    d_v_ref,
):
    j = pl.program_id(0)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    slot = j * block.keys + jnp.arange(block.keys)
    at = (layer, pl.ds(j * block.keys, block.keys), slice(None))
    live = slot < prefix + valid
    keys, values = load(k_ref.at[at], h, live), load(v_ref.at[at], h, live)
    factor = schedule.scale * LOG2E

    # Scores are [keys, queries] here: both products into d_k and d_v take them as is.
    def step(i, carry, *, g, masked):
        d_k, d_v = carry
        here = pl.ds(i * block.queries, block.queries)
        row = i * block.queries + jnp.arange(block.queries)
        rows = row < valid if schedule.ragged or t % block.queries else None
        q = load(q_ref.at[here, g, :], h, rows)
        lse = _load_row(lse_ref.at[g, here], rows, jnp.inf) * LOG2E
        p = jnp.exp2(dot(keys, q, trans_b=True) * factor - lse[None, :])
        if masked:
            p = jnp.where(slot[:, None] <= prefix + row[None, :], p, 0)
        d_out = load(d_out_ref.at[here, g, :], h, rows)
        d_v = d_v + dot(p.astype(d_out.dtype), d_out)
        delta = _load_row(delta_ref.at[g, here], rows, 0)
        d_s = p * (dot(values, d_out, trans_b=True) - delta[None, :])
        return d_k + dot(d_s.astype(q.dtype), q), d_v

    first, full, end = query_blocks(prefix, valid, j, block)

    def head(g, carry):
        masked = functools.partial(step, g=g, masked=True)
        carry = lax.fori_loop(first, full, masked, carry)
        return lax.fori_loop(
            full, end, functools.partial(step, g=g, masked=False), carry
        )

    zeros = jnp.zeros((block.keys, q_ref.shape[-1]), jnp.float32)
    d_k, d_v = lax.fori_loop(0, schedule.group, head, (zeros, zeros))
    _store(d_k_ref, d_k * schedule.scale, slot < s, h)
    _store(d_v_ref, d_v, slot < s, h)
