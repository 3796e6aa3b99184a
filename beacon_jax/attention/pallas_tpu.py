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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Num

from beacon_jax.attention import blockwise
from beacon_jax.attention.decode import check_scales, decode_xla
from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.mean import MeanTerm, kernel_tables, product, quarter
from beacon_jax.attention.shared import (
    Layer,
    attend,
    check_dtypes,
    lowered,
    row_lengths,
    stacked,
    zero_invalid,
)
from beacon_jax.attention.tpu_blocks import (
    LANES,
    TpuBlocks,
    TpuSchedule,
    chip_blocks,
    make_schedule,
)
from beacon_jax.attention.tpu_calls import (
    call,
    flat,
    live_blocks,
    pack,
    specs,
    table_specs,
    unpack,
)

LOG2E = math.log2(math.e)
DTYPES = (jnp.float32, jnp.bfloat16)
TAKEN = "one of float32 and bfloat16 for all, or int8 k and v with scales"

# The kernels. Grids are (row, block of heads, block of queries, block of keys), the
# last two swapped for dk and dv. Scalars in front: prefix and queries [2, B], layer.


def dot(
    a: Float[Array, "_ _"],
    b: Float[Array, "_ _"],
    contract: tuple[tuple[int], tuple[int]],
) -> Float[Array, "_ _"]:
    """Multiplies with a float32 result; float32 operands keep all their bits."""
    exact = jnp.float32 in (a.dtype, b.dtype)
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (contract, ((), ())), precision, preferred_element_type=jnp.float32
    )


def dot_t(a: Float[Array, "X H"], b: Float[Array, "Y H"]) -> Float[Array, "X Y"]:
    """Computes a @ b.T in float32."""
    return dot(a, b, ((1,), (1,)))


def _lane_to_rows(row: Float[Array, "1 R"]) -> Float[Array, "R 1"]:
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))[:, :1]


def for_each_chunk(
    schedule: TpuSchedule, prefix: Array, queries: Array, i: Any, j: Array, visit: Any
) -> None:
    """Visits the chunks of block j of keys that block i of queries sees.

    Calls visit(slice of the block, mask) for each chunk with a visible key; mask is
    None where every row sees every key.
    """
    p = schedule
    start = prefix - j * p.keys  # row 0 of the window, counted from here
    end = jnp.minimum((i + 1) * p.queries, queries * p.group)
    last = lax.div(jnp.maximum(end - 1, 0), p.group) + start
    first = lax.div(i * p.queries, p.group) + start
    chunks = p.keys // p.chunk
    count = lambda slots: jnp.clip(lax.div(slots, p.chunk), 0, chunks)
    whole = count(jnp.maximum(first + 1, 0))
    some = count(jnp.maximum(last + p.chunk, 0))
    some = jnp.where(i * p.queries < queries * p.group, some, 0)
    at = lambda c: pl.ds(pl.multiple_of(c * p.chunk, p.chunk), p.chunk)

    @pl.loop(0, jnp.minimum(whole, some))
    def _(c: Array) -> None:
        visit(at(c), None)

    @pl.loop(jnp.minimum(whole, some), some)
    def _(c: Array) -> None:
        visit(at(c), _ChunkMask(p, start - c * p.chunk, queries, i))


class _ChunkMask(NamedTuple):
    """Mask of what block i of queries sees of a chunk of keys.

    start: slot of the window's first query, counted from the chunk's first.
    """

    schedule: TpuSchedule
    start: Any
    queries: Any
    i: Any

    def visible(self, axis: int) -> Bool[Array, "_ _"]:
        """Computes slot <= start + r / G without a division.

        [queries, chunk] for axis 1, [chunk, queries] for axis 0.
        """
        p = self.schedule
        shape = (p.queries, p.chunk) if axis else (p.chunk, p.queries)
        slot = lax.broadcasted_iota(jnp.int32, shape, axis)
        row = lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
        return (slot - self.start) * p.group <= row + self.i * p.queries

    def live(self, x: Float[Array, "chunk H"]) -> Float[Array, "chunk H"]:
        """Puts 0 where no query of the row sees: 0 * NaN would be NaN."""
        slot = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(slot < self.start + self.queries, x, jnp.zeros_like(x))


def _keys_values(
    k: Any, v: Any, at: Any, h: int, mask: _ChunkMask | None, dtype: Any
) -> tuple[Float[Array, "chunk H"], Float[Array, "chunk H"]]:
    """Reads a chunk's keys and values of head h from blocks [keys, heads, H]."""
    pair = ((x[at] if len(x.shape) == 2 else x[at, h, :]).astype(dtype) for x in (k, v))
    keys, values = (mask.live(x) if mask else x for x in pair)
    return keys, values


def _mean_scores(
    schedule: TpuSchedule, h: int, at: Any, *mean: Any
) -> Float[Array, "queries chunk"]:
    """Computes the scores of a mean: of head h and the chunk at this slice."""
    query, quarters, starts, table = mean
    first = starts[lax.div(at.start, schedule.chunk)]
    here = query[h] * first[0:1] + quarters[h] * first[1:2]
    return product(dot_t, here, [table[i] for i in range(table.shape[0])])


def _forward_kernel(
    schedule: TpuSchedule, biased: bool, scalars: Any, layer: Any, *refs: Any
) -> None:
    del layer
    q, k, v, *more, out, lse, top, total, acc = refs
    bias = more.pop(0) if biased else None
    scales, mean = more[:2], more[2:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(at: Any, mask: _ChunkMask | None) -> None:
        visible: Any = mask.visible(1) if mask else None
        for h in range(schedule.heads):
            keys, values = _keys_values(k, v, at, h, mask, q.dtype)
            s = dot_t(q[h], keys) * (schedule.scale * LOG2E)
            if scales:
                s *= scales[0][h : h + 1, at]
            if mean:
                s += _mean_scores(schedule, h, at, *mean) * (schedule.scale * LOG2E)
            if bias is not None:
                s += bias[h : h + 1, at] * LOG2E
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

    for_each_chunk(schedule, scalars[0, b], scalars[1, b], i, j, visit)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        for h in range(schedule.heads):
            # Rows without a key (no valid query) have out = lse = 0.
            none = total[h] == 0
            sums = jnp.where(none, 1, total[h])
            out[h] = (acc[h] / sums[:, :1]).astype(out.dtype)
            logs = jnp.where(none, 0, top[h]) / LOG2E + jnp.log(sums)
            lse[h : h + 1] = jnp.transpose(logs)[:1]


def _d_q_kernel(schedule: TpuSchedule, scalars: Any, layer: Any, *refs: Any) -> None:
    del layer
    q, k, v, d_out, lse, delta, d_q, lse_rows, delta_rows, acc = refs
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        for h in range(schedule.heads):
            lse_rows[h] = _lane_to_rows(lse[h : h + 1] * LOG2E)
            delta_rows[h] = _lane_to_rows(delta[h : h + 1])

    def visit(at: Any, mask: _ChunkMask | None) -> None:
        visible: Any = mask.visible(1) if mask else None
        for h in range(schedule.heads):
            keys, values = _keys_values(k, v, at, h, mask, q.dtype)
            s = dot_t(q[h], keys) * (schedule.scale * LOG2E)
            p = jnp.exp2(s - lse_rows[h])
            if mask:
                p = jnp.where(visible, p, 0)
            d_s = p * (dot_t(d_out[h], values) - delta_rows[h]) * schedule.scale
            acc[h] += dot(d_s.astype(keys.dtype), keys, ((1,), (0,)))

    for_each_chunk(schedule, scalars[0, b], scalars[1, b], i, j, visit)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        d_q[...] = acc[...].astype(d_q.dtype)


def _d_kv_kernel(schedule: TpuSchedule, scalars: Any, layer: Any, *refs: Any) -> None:
    """Scores here are [keys, queries]: lse and delta lie along lanes as they come."""
    del layer
    q, k, v, d_out, lse, delta, d_k, d_v, k_acc, v_acc = refs
    b, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _() -> None:
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    def visit(at: Any, mask: _ChunkMask | None) -> None:
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

    for_each_chunk(schedule, scalars[0, b], scalars[1, b], i, j, visit)

    @pl.when(i == pl.num_programs(3) - 1)
    def _() -> None:
        for result, sums in ((d_k, k_acc), (d_v, v_acc)):
            for h in range(schedule.heads):
                at = slice(None) if len(result.shape) == 2 else (slice(None), h)
                result[at] = sums[h].astype(result.dtype)


def forward(
    schedule: TpuSchedule,
    q: Float[Array, "B K R H"],
    k: Num[Array, "L B S K H"],
    v: Num[Array, "L B S K H"],
    scalars: Int[Array, "2 B"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None = None,
    int8: tuple[Array, ...] = (),
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R"]]:
    """Returns the result and the log of softmax's denominators in float32.

    That is 0 for rows without a key.

    Args:
      q: `pack`ed.
      scalars: prefix and valid queries.
      int8: scales of k and v and, if the keys lack a mean, its query and that's quarter
        packed like q, and the tables of `mean.kernel_tables`.
    """
    b, heads, rows, h = q.shape
    q_spec, k_spec, row_spec, slot_spec = specs(schedule, h)
    biases = [] if bias is None else [bias]
    more_specs = [slot_spec] * len((*biases, *int8[:2]))
    if len(int8) > 2:
        more_specs += [q_spec, q_spec, *table_specs(schedule, h, int8[-1])]
    block = (schedule.heads, schedule.queries)
    return call(
        schedule,
        functools.partial(_forward_kernel, schedule, bool(biases)),
        "prefix_attention_forward",
        (
            b,
            heads // schedule.heads,
            rows // schedule.queries,
            live_blocks(schedule, scalars),
        ),
        [q_spec, k_spec, k_spec, *more_specs],
        [q_spec, row_spec],
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        [(*block, LANES), (*block, LANES), (*block, h)],
    )(scalars, layer.reshape(1), q, flat(k), flat(v), *biases, *int8)


def backward(
    schedule: TpuSchedule,
    q: Float[Array, "B K R H"],
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    scalars: Int[Array, "2 B"],
    layer: Int[Array, ""],
    d_out: Float[Array, "B K R H"],
    lse: Float[Array, "B K R"],
    delta: Float[Array, "B K R"],
) -> tuple[Float[Array, "B K R H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns d_q, packed as q is, and, of the layer, d_k and d_v."""
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
    d_k, d_v = (d.reshape(b, s, heads, h) for d in (d_k, d_v))
    return d_q, d_k, d_v


def pallas_tpu(
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
    blocks: TpuBlocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` by Mosaic kernels.

    blocks: sizes other than the chip's. interpret: simulate the kernels, on any
    platform. Otherwise a program that is lowered for another platform than TPU computes
    the same in XLA. So does the backward pass with a bias, anywhere.

    Raises:
      NotImplementedError: dtypes other than float32 or bfloat16 for all, int8 for k and
        v apart.
    """
    check_scales(k, v, k_scale, v_scale)
    check_dtypes(q, k, v, k_scale is not None, DTYPES, TAKEN)
    target = target or default_target()
    blocks = blocks or chip_blocks(target)
    schedule = make_schedule(q, k, scale, blocks, interpret, target)
    scalars = row_lengths(prefix, queries, q.shape[1], 0)
    layer, k, v, bias, *scales = stacked(layer, k, v, bias, k_scale, v_scale)
    q = zero_invalid(q, queries)  # they meet keys and values in the backward pass
    if k_scale is None:
        # The backward kernels know no bias.
        passes = _forward, _backward if bias is None else _backward_xla
        there, back = (functools.partial(f, schedule) for f in passes)
        out: Any = attend(there, back, q, k, v, scalars, layer, bias)
    else:
        out = _attend_int8(schedule, q, k, v, scalars, layer, bias, *scales, mean)
    return zero_invalid(out, queries)


def _attend_int8(schedule: TpuSchedule, *given: Any) -> Float[Array, "B T N H"]:
    """Attends, given (q, k, v, scalars, layer, bias, k_scale, v_scale, mean)."""

    def kernel(
        q: Array, k: Array, v: Array, scalars: Array, layer: Array, *more: Any
    ) -> Array:
        bias, *int8, mean = more
        packed = functools.partial(pack, schedule, k.shape[-2])
        if mean is not None:
            tables = kernel_tables(mean.turns, k.shape[-3], schedule.chunk, q.dtype)
            int8 += [packed(mean.query), packed(quarter(mean.query)), *tables]
        args = (packed(q), k, v, scalars, layer, bias, tuple(int8))
        out, _ = forward(schedule, *args)
        return unpack(out, *q.shape[1:3])

    def elsewhere(
        q: Array, k: Array, v: Array, scalars: Array, layer: Array, *more: Any
    ) -> Array:
        options: dict[str, Any] = dict(
            zip(("bias", "k_scale", "v_scale", "mean"), more, strict=True)
        )
        options |= {"scale": schedule.scale, "target": schedule.target}
        return decode_xla(q, k, v, scalars[0], layer=layer, **options)

    return lowered("tpu", schedule.interpret, kernel, elsewhere, *given)


def _blockwise(schedule: TpuSchedule, of: Callable) -> Callable:
    """Makes `blockwise`'s pass a function of (q, k, v, scalars, *more)."""
    size = schedule.scale, blockwise.BLOCK
    return lambda q, k, v, scalars, *more: of(*size, q, k, v, scalars[0], *more)


def _forward(schedule: TpuSchedule, *given: Any) -> tuple[Array, Array]:
    """Returns the result and lse, given (q, k, v, scalars, layer, bias)."""

    def kernel(
        q: Array, k: Array, v: Array, scalars: Array, layer: Array, bias: Array | None
    ) -> tuple[Array, Array]:
        packed = pack(schedule, k.shape[-2], q)
        out, lse = forward(schedule, packed, k, v, scalars, layer, bias)
        lse = unpack(lse[..., None], *q.shape[1:3])[..., 0]
        return unpack(out, *q.shape[1:3]), jnp.swapaxes(lse, 1, 2)

    elsewhere = _blockwise(schedule, blockwise.forward)
    return lowered("tpu", schedule.interpret, kernel, elsewhere, *given)


def _backward(schedule: TpuSchedule, *given: Any) -> tuple[Array, Array, Array]:
    """Returns the gradients, given what `_forward` is, out, lse and d_out."""

    def kernel(
        q: Array, k: Array, v: Array, scalars: Array, layer: Array, *more: Any
    ) -> tuple[Array, Array, Array]:
        _, out, lse, d_out = more
        packed = functools.partial(pack, schedule, k.shape[-2])
        delta = jnp.einsum(
            "BTNH,BTNH->BTN", d_out, out, preferred_element_type=jnp.float32
        )
        rows = (packed(x[..., None])[..., 0] for x in (jnp.swapaxes(lse, 1, 2), delta))
        args = (packed(q), k, v, scalars, layer, packed(d_out))
        d_q, d_k, d_v = backward(schedule, *args, *rows)
        return unpack(d_q, *q.shape[1:3]), d_k, d_v

    elsewhere = _blockwise(schedule, blockwise.backward)
    return lowered("tpu", schedule.interpret, kernel, elsewhere, *given)


def _backward_xla(
    schedule: TpuSchedule, q: Array, k: Array, v: Array, scalars: Array, *more: Any
) -> tuple[Array, Array, Array]:
    """Returns what `_backward` does, also with a bias."""
    layer, bias, out, lse, d_out = more
    prefix, queries = scalars
    # What the kernel leaves for queries that are not valid may be anything.
    some = jnp.arange(q.shape[1]) < queries[:, None]
    lse = jnp.where(some[:, None], lse, jnp.inf)
    size = schedule.scale, blockwise.BLOCK
    return blockwise.backward(*size, q, k, v, prefix, layer, bias, out, lse, d_out)
