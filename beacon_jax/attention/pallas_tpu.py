"""`prefix_attention` as Mosaic kernels for TPU, forward and backward.

FlashAttention-2 (arXiv 2307.08691) over [memory | open window] with lengths as scalar
prefetch. A block of keys is [keys, heads, H] of the buffer as it lies in memory, layer
and row chosen by the index map: neither a layer's slice nor a transposed buffer exists.
The grid ends with the longest row's last block, and shorter rows clamp their block
index there: dead blocks are neither fetched nor computed (`visited_blocks` of
`tpu_blocks` counts).

Queries of a kv head's group lie next to each other: row r = t * G + g of [B, K, R, H].
They share every block of keys, and r / G is the query's place in the window.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from beacon_jax.attention import blockwise
from beacon_jax.attention.decode import check_scales, decode_xla, zero_invalid
from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.mean import MeanTerm, kernel_tables, product, quarter
from beacon_jax.attention.tpu_blocks import (
    LANES,
    TpuBlocks,
    TpuSchedule,
    chip_blocks,
    make_schedule,
)

LOG2E = math.log2(math.e)

# The kernels. Grids are (row, block of heads, block of queries, block of keys), the
# last two swapped for dk and dv. Scalars in front: prefix and queries [2, B], layer.


def dot(a, b, contract):
    """Multiplies with a float32 result; float32 operands keep all their bits."""
    exact = jnp.float32 in (a.dtype, b.dtype)
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (contract, ((), ())), precision, preferred_element_type=jnp.float32
    )


def dot_t(a, b):
    """Computes a @ b.T in float32."""
    return dot(a, b, ((1,), (1,)))


def _lane_to_rows(row):
    """[1, R] -> [R, 1]"""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


class Chunks:
    """The chunks of block j of keys that block i of queries sees."""

    def __init__(self, schedule: TpuSchedule, prefix, queries, i, j):
        self.schedule, self.prefix, self.queries, self.i, self.j = (
            schedule,
            prefix,
            queries,
            i,
            j,
        )

    def for_each(self, visit):
        """visit(slice of the block, mask) for each chunk with a visible key; mask is
        None where every row sees every key."""
        p = self.schedule
        start = self.prefix - self.j * p.keys  # row 0 of the window, counted from here
        end = jnp.minimum((self.i + 1) * p.queries, self.queries * p.group)
        last = lax.div(jnp.maximum(end - 1, 0), p.group) + start
        first = lax.div(self.i * p.queries, p.group) + start
        chunks = p.keys // p.chunk
        count = lambda slots: jnp.clip(lax.div(slots, p.chunk), 0, chunks)
        whole = count(jnp.maximum(first + 1, 0))
        some = count(jnp.maximum(last + p.chunk, 0))
        some = jnp.where(self.i * p.queries < self.queries * p.group, some, 0)
        at = lambda c: pl.ds(pl.multiple_of(c * p.chunk, p.chunk), p.chunk)

        @pl.loop(0, jnp.minimum(whole, some))
        def _(c):
            visit(at(c), None)

        @pl.loop(jnp.minimum(whole, some), some)
        def _(c):
            visit(at(c), _ChunkMask(p, start - c * p.chunk, self.queries, self.i))


class _ChunkMask(NamedTuple):
    """start: slot of the window's first query, counted from the chunk's first."""

    schedule: TpuSchedule
    start: Any
    queries: Any
    i: Any

    def visible(self, axis):
        """[queries, chunk] for axis 1, [chunk, queries] for axis 0: slot <= start +
        r / G without a division."""
        p = self.schedule
        shape = (p.queries, p.chunk) if axis else (p.chunk, p.queries)
        slot = lax.broadcasted_iota(jnp.int32, shape, axis)
        row = lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
        return (slot - self.start) * p.group <= row + self.i * p.queries

    def live(self, x):
        """x [chunk, H] with 0 where no query of the row sees: 0 * NaN would be NaN."""
        slot = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(slot < self.start + self.queries, x, jnp.zeros_like(x))


def _keys_values(k, v, at, h, mask, dtype):
    """Keys and values [chunk, H] of head h of a block [keys, heads, H]."""
    pair = ((x[at] if len(x.shape) == 2 else x[at, h, :]).astype(dtype) for x in (k, v))
    return tuple(mask.live(x) if mask else x for x in pair)


def _mean_scores(schedule: TpuSchedule, h, at, query, turned, starts, table):
    """Of head h and the chunk at this slice of the block: float32 [queries, chunk]."""
    first = starts[lax.div(at.start, schedule.chunk)]
    here = query[h] * first[0:1] + turned[h] * first[1:2]
    return product(dot_t, here, [table[i] for i in range(table.shape[0])])


def _forward_kernel(schedule: TpuSchedule, scalars, layer, *refs: Any):
    del layer
    q, k, v, *more, out, lse, top, total, acc = refs
    scales, mean = more[:2], more[2:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    chunks = Chunks(schedule, scalars[0, b], scalars[1, b], i, j)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(at, mask):
        visible: Any = mask.visible(1) if mask else None
        for h in range(schedule.heads):
            keys, values = _keys_values(k, v, at, h, mask, q.dtype)
            s = dot_t(q[h], keys) * (schedule.scale * LOG2E)
            if scales:
                s *= scales[0][h : h + 1, at]
            if mean:
                s += _mean_scores(schedule, h, at, *mean) * (schedule.scale * LOG2E)
            if mask:
                s = jnp.where(visible, s, -jnp.inf)
            # Slot 0 is visible to every row: after block 0 no maximum is -inf.
            old = top[h][:, :1]
            new = jnp.maximum(old, s.max(-1, keepdims=True))
            p, fade = jnp.exp2(s - new), jnp.exp2(old - new)
            total[h] = total[h] * fade + p.sum(-1, keepdims=True)
            if scales:
                row = scales[1][h : h + 1, at]
                p *= jnp.where(visible, row, 0) if mask else row
            acc[h] = acc[h] * fade + dot(p.astype(values.dtype), values, ((1,), (0,)))
            top[h] = jnp.broadcast_to(new, top.shape[1:])

    chunks.for_each(visit)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        for h in range(schedule.heads):
            # Rows without a key (no valid query) have out = lse = 0.
            none = total[h] == 0
            sums = jnp.where(none, 1, total[h])
            out[h] = (acc[h] / sums[:, :1]).astype(out.dtype)
            logs = jnp.where(none, 0, top[h]) / LOG2E + jnp.log(sums)
            lse[h : h + 1] = jnp.transpose(logs)[:1]


def _d_q_kernel(schedule: TpuSchedule, scalars, layer, *refs):
    del layer
    q, k, v, d_out, lse, delta, d_q, lse_rows, delta_rows, acc = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    chunks = Chunks(schedule, scalars[0, b], scalars[1, b], i, j)

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        for h in range(schedule.heads):
            lse_rows[h] = _lane_to_rows(lse[h : h + 1] * LOG2E)
            delta_rows[h] = _lane_to_rows(delta[h : h + 1])

    def visit(at, mask):
        visible: Any = mask.visible(1) if mask else None
        for h in range(schedule.heads):
            keys, values = _keys_values(k, v, at, h, mask, q.dtype)
            s = dot_t(q[h], keys) * (schedule.scale * LOG2E)
            p = jnp.exp2(s - lse_rows[h])
            if mask:
                p = jnp.where(visible, p, 0)
            d_s = p * (dot_t(d_out[h], values) - delta_rows[h]) * schedule.scale
            acc[h] += dot(d_s.astype(keys.dtype), keys, ((1,), (0,)))

    chunks.for_each(visit)

    @pl.when(j == pl.num_programs(3) - 1)
    def _():
        d_q[...] = acc[...].astype(d_q.dtype)


def _d_kv_kernel(schedule: TpuSchedule, scalars, layer, *refs):
    """Scores here are [keys, queries]: lse and delta lie along lanes as they come."""
    del layer
    q, k, v, d_out, lse, delta, d_k, d_v, k_acc, v_acc = refs
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    chunks = Chunks(schedule, scalars[0, b], scalars[1, b], i, j)

    @pl.when(i == 0)
    def _():
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def visit(at, mask):
        visible: Any = mask.visible(0) if mask else None
        for h in range(schedule.heads):
            keys, values = _keys_values(k, v, at, h, mask, q.dtype)
            s = dot_t(keys, q[h]) * (schedule.scale * LOG2E)
            p = jnp.exp2(s - lse[h : h + 1] * LOG2E)
            if mask:
                p = jnp.where(visible, p, 0)
            v_acc[h, at] += dot(p.astype(d_out.dtype), d_out[h], ((1,), (0,)))
            d_s = p * (dot_t(values, d_out[h]) - delta[h : h + 1]) * schedule.scale
            k_acc[h, at] += dot(d_s.astype(q.dtype), q[h], ((1,), (0,)))

    chunks.for_each(visit)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        for result, sums in ((d_k, k_acc), (d_v, v_acc)):
            for h in range(schedule.heads):
                at = slice(None) if len(result.shape) == 2 else (slice(None), h)
                result[at] = sums[h].astype(result.dtype)


# How the kernels are called.


def pack(schedule: TpuSchedule, heads, x):
    """Packs [B, T, N, H] to [B, K, R, H], with zeros behind T * G."""
    b, t, n, h = x.shape
    x = jnp.moveaxis(x.reshape(b, t, heads, n // heads, h), 1, 2)
    x = x.reshape(b, heads, -1, h)
    return jnp.pad(x, ((0, 0), (0, 0), (0, schedule.rows - x.shape[2]), (0, 0)))


def unpack(x, t, n):
    """Unpacks [B, K, R, H] to [B, T, N, H]."""
    b, heads, _, h = x.shape
    x = x[:, :, : t * (n // heads)].reshape(b, heads, t, n // heads, h)
    return jnp.moveaxis(x, 2, 1).reshape(b, t, n, h)


def specs(schedule: TpuSchedule, h, swapped=False):
    """Block specs of q (and what has its shape), k and v, and rows of numbers."""
    heads, none = schedule.heads, pl.squeezed

    def where(args):
        b, g, i, j, scalars, layer = args
        prefix, queries = scalars[0, b], scalars[1, b]
        if swapped:
            i, j = j, i
            i = jnp.minimum(
                jnp.maximum(i, schedule.first(prefix, j)),
                schedule.rows // schedule.queries - 1,
            )
        last = jnp.maximum(schedule.visited(prefix, queries, i) - 1, 0)
        return b, g, i, jnp.minimum(j, last), layer[0]

    def q_at(*args):
        b, g, i, _, _ = where(args)
        return b, g, i, 0

    def k_at(*args):
        b, g, _, j, layer = where(args)
        return (layer, b, j, g, 0) if heads > 1 else (layer, b, j, 0)

    def row_at(*args):
        b, g, i, _, _ = where(args)
        return b, g, i

    def scale_at(*args):
        b, g, _, j, layer = where(args)
        return layer, b, g, j

    # One head needs no axis: see `flat`.
    k_block = (none, none, schedule.keys, *([heads] if heads > 1 else []), h)
    return (
        pl.BlockSpec((none, heads, schedule.queries, h), q_at),
        pl.BlockSpec(k_block, k_at),
        pl.BlockSpec((none, heads, schedule.queries), row_at),
        pl.BlockSpec((none, none, heads, schedule.keys), scale_at),
    )


def _table_specs(schedule: TpuSchedule, h, starts, table):
    """Of `mean.kernel_tables`: a block's starts, and the whole table once."""
    del starts

    def starts_at(b, g, i, j, scalars, layer):
        del g, layer
        last = jnp.maximum(schedule.visited(scalars[0, b], scalars[1, b], i) - 1, 0)
        return jnp.minimum(j, last), 0, 0

    return (
        pl.BlockSpec((schedule.keys // schedule.chunk, 2, h), starts_at),
        pl.BlockSpec(table.shape, lambda *_: (0, 0, 0)),
    )


def flat(x):
    """[.., S, 1, H] -> [.., S, H]: an axis of one head would be padded to a tile."""
    return x.reshape(*x.shape[:-2], x.shape[-1]) if x.shape[-2] == 1 else x


def live_blocks(schedule: TpuSchedule, scalars):
    """Blocks of keys of the longest row: where the grid ends, known when it runs."""
    prefix, queries = scalars
    length = jnp.max(jnp.where(queries > 0, prefix + queries, 1))
    return lax.div(length + schedule.keys - 1, schedule.keys)


def call(
    schedule: TpuSchedule, kernel, name, grid, in_specs, out_specs, out_shape, scratch
):
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=schedule.vmem,
        ),
        interpret=schedule.interpret,
        name=name,
    )


def forward(
    schedule: TpuSchedule, q, k, v, scalars, layer, k_scale=None, v_scale=None, mean=()
):
    """q packed [B, K, R, H], k and v [L, B, S, K, H] -> out like q and the log of the
    softmax's denominators float32 [B, K, R], 0 for rows without a key.

    scalars [2, B]: prefix and valid queries.  mean: query and its quarter packed like q
    and the tables of `mean.kernel_tables`.
    """
    b, heads, rows, h = q.shape
    q_spec, k_spec, row_spec, scale_spec = specs(schedule, h)
    mean_specs = [q_spec, q_spec, *_table_specs(schedule, h, *mean[2:])] if mean else []
    scales = [] if k_scale is None else [k_scale, v_scale]
    block = (schedule.heads, schedule.queries)
    return call(
        schedule,
        functools.partial(_forward_kernel, schedule),
        "prefix_attention_forward",
        (
            b,
            heads // schedule.heads,
            rows // schedule.queries,
            live_blocks(schedule, scalars),
        ),
        [q_spec, k_spec, k_spec, *[scale_spec] * len(scales), *mean_specs],
        [q_spec, row_spec],
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        [(*block, LANES), (*block, LANES), (*block, h)],
    )(scalars, layer.reshape(1), q, flat(k), flat(v), *scales, *mean)


def backward(schedule: TpuSchedule, q, k, v, scalars, layer, d_out, lse, delta):
    """Returns d_q (packed) and d_k, d_v [B, S, K, H]."""
    b, heads, rows, h = q.shape
    s, q_blocks = k.shape[-3], rows // schedule.queries
    inputs = (scalars, layer.reshape(1), q, flat(k), flat(v), d_out, lse, delta)
    q_spec, k_spec, row_spec, _ = specs(schedule, h)
    block = (schedule.heads, schedule.queries)
    d_q = call(
        schedule,
        functools.partial(_d_q_kernel, schedule),
        "prefix_attention_d_q",
        (b, heads // schedule.heads, q_blocks, live_blocks(schedule, scalars)),
        [q_spec, k_spec, k_spec, q_spec, row_spec, row_spec],
        q_spec,
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        [(*block, 1), (*block, 1), (*block, h)],
    )(*inputs)
    # The grid covers the capacity: dead blocks get zeros, and that is all they cost.
    q_spec, k_spec, row_spec, _ = specs(schedule, h, swapped=True)
    # One head needs no axis here either.
    one = schedule.heads == 1
    d_spec = pl.BlockSpec(
        (pl.squeezed, schedule.keys, *([] if one else [schedule.heads]), h),
        lambda b, g, j, i, *_: (b, j, 0) if one else (b, j, g, 0),
    )
    shape = (b, s, *([] if one else [heads]), h)
    block = (schedule.heads, schedule.keys)
    d_k, d_v = call(
        schedule,
        functools.partial(_d_kv_kernel, schedule),
        "prefix_attention_d_kv",
        (b, heads // schedule.heads, pl.cdiv(s, schedule.keys), q_blocks),
        [q_spec, k_spec, k_spec, q_spec, row_spec, row_spec],
        [d_spec, d_spec],
        [jax.ShapeDtypeStruct(shape, x.dtype) for x in (k, v)],
        [(*block, h), (*block, h)],
    )(*inputs)
    return d_q, *(d.reshape(b, s, heads, h) for d in (d_k, d_v))


def pallas_tpu(
    q,
    k,
    v,
    prefix,
    *,
    scale,
    layer=None,
    queries=None,
    k_scale=None,
    v_scale=None,
    mean: MeanTerm | None = None,
    target: Target | None = None,
    blocks: TpuBlocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
):
    """See `api.prefix_attention`.

    blocks: sizes other than the chip's. interpret: simulate the kernels, on any
    platform. Otherwise a program that is lowered for another platform than TPU computes
    the same in XLA.

    Raises:
      NotImplementedError: dtypes other than float32 or bfloat16 for all, int8 for k and
        v apart.
    """
    check_dtypes(q, k, v, k_scale, v_scale)
    target = target or default_target()
    schedule = make_schedule(
        q, k, scale, blocks or chip_blocks(target), interpret, target
    )
    t = q.shape[1]
    valid = jnp.full_like(prefix, t) if queries is None else jnp.minimum(queries, t)
    scalars = jnp.stack([prefix, valid]).astype(jnp.int32)
    if layer is None:
        k, v, k_scale, v_scale = jax.tree.map(
            lambda x: x[None], (k, v, k_scale, v_scale)
        )
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32)
    q = zero_invalid(q, queries)  # they meet keys and values in the backward pass
    if k_scale is None:
        out: Any = _attend(schedule, q, k, v, scalars, layer)
    else:
        out = _attend_int8(schedule, q, k, v, scalars, layer, k_scale, v_scale, mean)
    return zero_invalid(out, queries)


def check_dtypes(q, k, v, k_scale, v_scale):
    """Raises NotImplementedError for what Mosaic kernels do not take."""
    check_scales(k, v, k_scale, v_scale)
    kept = {q.dtype} if k_scale is not None else {q.dtype, k.dtype, v.dtype}
    if len(kept) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}: one of float32 and "
            f"bfloat16 for all, or int8 k and v with scales."
        )


def on_tpu(interpret, kernel, elsewhere, *args):
    """kernel(*args) where the program is lowered for TPU (or interpreted)."""
    if interpret:
        return kernel(*args)
    return lax.platform_dependent(*args, tpu=kernel, default=elsewhere)


def _attend_int8(schedule, q, k, v, scalars, layer, k_scale, v_scale, mean):
    def kernel(q, k, v, scalars, layer, k_scale, v_scale, mean):
        packed = functools.partial(pack, schedule, k.shape[-2])
        means = ()
        if mean is not None:
            tables = kernel_tables(mean.turns, k.shape[-3], schedule.chunk, q.dtype)
            means = (packed(mean.query), packed(quarter(mean.query)), *tables)
        scales = (k_scale, v_scale)
        out, _ = forward(schedule, packed(q), k, v, scalars, layer, *scales, means)
        return unpack(out, *q.shape[1:3])

    def elsewhere(q, k, v, scalars, layer, k_scale, v_scale, mean):
        options = {"k_scale": k_scale, "v_scale": v_scale, "mean": mean}
        options |= {"scale": schedule.scale, "layer": layer, "target": schedule.target}
        return decode_xla(q, k, v, scalars[0], **options)

    args = (q, k, v, scalars, layer, k_scale, v_scale, mean)
    return on_tpu(schedule.interpret, kernel, elsewhere, *args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(schedule, q, k, v, scalars, layer):
    return _attend_fwd(schedule, q, k, v, scalars, layer)[0]


def _attend_fwd(schedule, q, k, v, scalars, layer):
    def kernel(q, k, v, scalars, layer):
        packed = pack(schedule, k.shape[-2], q)
        out, lse = forward(schedule, packed, k, v, scalars, layer)
        lse = unpack(lse[..., None], *q.shape[1:3])[..., 0]
        return unpack(out, *q.shape[1:3]), jnp.swapaxes(lse, 1, 2)

    def elsewhere(q, k, v, scalars, layer):
        block = blockwise.BLOCK
        return blockwise.forward(schedule.scale, block, q, k, v, scalars[0], layer)

    args = (q, k, v, scalars, layer)
    out, lse = on_tpu(schedule.interpret, kernel, elsewhere, *args)
    out, lse = checkpoint_name(out, blockwise.OUT), checkpoint_name(lse, blockwise.LSE)
    return out, (*args, out, lse)


def _attend_bwd(schedule, residuals, d_out):
    def kernel(q, k, v, scalars, layer, out, lse, d_out):
        packed = functools.partial(pack, schedule, k.shape[-2])
        delta = jnp.einsum(
            "BTNH,BTNH->BTN", d_out, out, preferred_element_type=jnp.float32
        )
        rows = (packed(x[..., None])[..., 0] for x in (jnp.swapaxes(lse, 1, 2), delta))
        d_q, d_k, d_v = backward(
            schedule, packed(q), k, v, scalars, layer, packed(d_out), *rows
        )
        return unpack(d_q, *q.shape[1:3]), d_k, d_v

    def elsewhere(q, k, v, scalars, layer, out, lse, d_out):
        block, prefix = blockwise.BLOCK, scalars[0]
        return blockwise.backward(
            schedule.scale, block, q, k, v, prefix, layer, out, lse, d_out
        )

    d_q, d_k, d_v = on_tpu(schedule.interpret, kernel, elsewhere, *residuals, d_out)
    layers, layer = residuals[1].shape[0], residuals[4]
    if layers == 1:
        d_k, d_v = d_k[None], d_v[None]
    else:
        put = lambda d: jnp.zeros((layers, *d.shape), d.dtype).at[layer].set(d)
        d_k, d_v = put(d_k), put(d_v)
    return d_q, d_k, d_v, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
