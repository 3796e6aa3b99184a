"""Decoding over a long memory as a Mosaic kernel for TPU.

A core walks a row's blocks of memory one after the other, so that nothing is gained by
splitting them: rows and blocks of heads are the parallel axes, and the grid ends with
the longest row. What costs time besides the memory itself is picking one head's keys
out of [S, K, H], a relayout per head. With few queries it is not needed: all heads'
queries meet all heads' keys in one product, [heads * R, H] x [S' * heads, H], and
scores between different heads are masked. The matrix unit takes as long to load keys
as to push up to 128 rows of queries through them: the unwanted products are free.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Num

from beacon_jax.attention import blockwise
from beacon_jax.attention import pallas_tpu as prefill
from beacon_jax.attention.decode import check_scales
from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.mean import MeanTerm
from beacon_jax.attention.shared import (
    Layer,
    Shaped,
    attend_by,
    check_dtypes,
    lowered,
    row_lengths,
    stacked,
    zero_invalid,
)
from beacon_jax.attention.tpu_blocks import (
    LANES,
    SUBLANES,
    TpuBlocks,
    TpuSchedule,
    chip_blocks,
    heads_per_block,
)
from beacon_jax.attention.tpu_calls import (
    call,
    flat,
    live_blocks,
    pack,
    specs,
    unpack,
)

# Rows of queries of all heads of a block together that pass the matrix unit while it
# loads the next keys.
MOST_ROWS = 128
# Rows of keys of all heads that one pass of the inner loop multiplies.
UNROLLED = 2048


def make_schedule(
    q: Shaped,
    k: Shaped,
    scale: float,
    blocks: TpuBlocks,
    interpret: Any = False,
    target: Target | None = None,
) -> TpuSchedule:
    """Makes a schedule whose rows R are a power of two.

    Of q [B, T, N, H] and k [*L, B, S, K, H]. A block has heads * R rows.
    """
    t, n, h = q.shape[1:]
    s, kv = k.shape[-3:-1]
    heads = heads_per_block(k)
    width = pl.cdiv(h, LANES) * q.dtype.itemsize // 2
    rows = max(pl.next_power_of_2(t * (n // kv)), pl.cdiv(SUBLANES, heads))
    keys = min(2 * blocks.keys // (heads * width), pl.cdiv(s, 128) * 128)
    chunk = min(keys, max(1, UNROLLED // (heads * width)))
    return TpuSchedule(
        scale=scale,
        heads=heads,
        group=n // kv,
        rows=rows,
        queries=rows,
        keys=keys // chunk * chunk,
        chunk=chunk,
        vmem=blocks.vmem,
        interpret=interpret,
        target=target,
    )


def decode_tpu(
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
    """Computes `api.prefix_attention` of few queries; its gradient is `pallas_tpu`'s.

    blocks, interpret: as there.

    Raises:
      NotImplementedError: more than 128 rows of queries meet a block of heads; a number
        of kv heads per block that is no power of two; k_scale (`pallas_tpu` takes it);
        a bias whose chunks are not multiples of 128 numbers (H = 384, say); dtypes as
        in `pallas_tpu`.
    """
    del mean  # which comes with k_scale only
    if k_scale is not None:
        raise NotImplementedError("k_scale: int8 memory is for `pallas_tpu`.")
    check_scales(k, v, k_scale, v_scale)
    check_dtypes(q, k, v, False, prefill.DTYPES, prefill.TAKEN)
    target = target or default_target()
    blocks = blocks or chip_blocks(target)
    schedule = make_schedule(q, k, scale, blocks, interpret, target)
    heads, rows = schedule.heads, schedule.heads * schedule.rows
    if heads & (heads - 1):
        raise NotImplementedError(f"k has {heads} heads: not a power of two.")
    if rows > MOST_ROWS:
        raise NotImplementedError(
            f"q has {q.shape[1]} queries: {rows} rows for a block of {heads} heads, "
            f"more than {MOST_ROWS}."
        )
    if bias is not None and schedule.chunk * heads % LANES:
        raise NotImplementedError(
            f"bias: {schedule.chunk} slots of {heads} heads are not whole registers."
        )
    scalars = row_lengths(prefix, queries, q.shape[1], 0)
    layer, k, v, bias = stacked(layer, k, v, bias)
    value, gradient = (functools.partial(f, schedule) for f in (_decode, _prefill))
    out: Any = attend_by(value, gradient, q, k, v, scalars, layer, bias)
    return zero_invalid(out, queries)


def _decode(schedule: TpuSchedule, *given: Any) -> Float[Array, "B T N H"]:
    """Attends, given (q, k, v, scalars, layer, bias)."""

    def elsewhere(
        q: Array, k: Array, v: Array, scalars: Array, layer: Array, bias: Array | None
    ) -> Array:
        size = schedule.scale, blockwise.BLOCK
        return blockwise.forward(*size, q, k, v, scalars[0], layer, bias)[0]

    kernel = functools.partial(forward, schedule)
    return lowered("tpu", schedule.interpret, kernel, elsewhere, *given)


def _prefill(
    schedule: TpuSchedule,
    q: Array,
    k: Array,
    v: Array,
    scalars: Array,
    layer: Array,
    bias: Array | None,
) -> Float[Array, "B T N H"]:
    """Attends by the kernels of `pallas_tpu`, which have a gradient."""
    prefix, queries = scalars
    return prefill.pallas_tpu(
        q,
        k,
        v,
        prefix,
        scale=schedule.scale,
        layer=layer,
        queries=queries,
        bias=bias,
        target=schedule.target,
        interpret=schedule.interpret,
    )


def forward(
    schedule: TpuSchedule,
    q: Float[Array, "B T N H"],
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    scalars: Int[Array, "2 B"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Runs the kernel."""
    b, t, n, h = q.shape
    heads = k.shape[-2]
    many = schedule.heads * schedule.rows
    packed = pack(schedule, heads, q).reshape(b, heads // schedule.heads, many, h)
    _, k_spec, _, slot_spec = specs(schedule, h)
    biases = [] if bias is None else [_by_column(schedule, bias, layer)]
    bias_specs = [_column_spec(schedule, slot_spec)] * len(biases)
    q_spec = pl.BlockSpec(
        (pl.squeezed, pl.squeezed, many, h), lambda b, g, i, j, *_: (b, g, 0, 0)
    )
    out = call(
        schedule,
        functools.partial(_kernel, schedule, bool(biases)),
        "prefix_attention_decode",
        (b, heads // schedule.heads, 1, live_blocks(schedule, scalars)),
        [q_spec, k_spec, k_spec, *bias_specs],
        q_spec,
        jax.ShapeDtypeStruct(packed.shape, q.dtype),
        [(many, LANES), (many, LANES), (many, h)],
    )(scalars, layer.reshape(1), packed, flat(k), flat(v), *biases)
    return unpack(out.reshape(b, heads, schedule.rows, h), t, n)


def _by_column(
    schedule: TpuSchedule, bias: Float[Array, "L B K S"], layer: Int[Array, ""]
) -> Float[Array, "B blocks 1 columns"]:
    """Copies a layer's bias in the order of the scores' columns, heads last.

    A relayout of each block in the kernel would cost more than these 4 of a slot's 4 H
    bytes of keys and values.
    """
    x = lax.dynamic_index_in_dim(bias, layer, keepdims=False)
    b, heads, s = x.shape
    x = x.reshape(b, heads // schedule.heads, schedule.heads, s).swapaxes(2, 3)
    return x.reshape(b, heads // schedule.heads, 1, s * schedule.heads)


def _column_spec(schedule: TpuSchedule, slot_spec: pl.BlockSpec) -> pl.BlockSpec:
    """Returns the spec of `_by_column`, given that of [L, B, K, S]."""
    slot_at: Any = slot_spec.index_map

    def column_at(*args: Any) -> Any:
        _, b, g, j = slot_at(*args)
        return b, g, 0, j

    columns = schedule.keys * schedule.heads
    return pl.BlockSpec((pl.squeezed, pl.squeezed, 1, columns), column_at)


class _HeadMask(NamedTuple):
    """Mask of the scores [heads * R, chunk * heads] that are of one head and visible.

    Powers of two make indices bit fields.
    """

    schedule: TpuSchedule
    start: Any  # slot of the first query, counted from the chunk's first
    queries: Any

    def _bits(
        self, shape: tuple[int, ...], axis: int, low: int
    ) -> tuple[Int[Array, "_ _"], Int[Array, "_ _"]]:
        """Splits the indices along an axis by `low`: (quotient, remainder)."""
        index = lax.broadcasted_iota(jnp.int32, shape, axis)
        return lax.shift_right_logical(index, low.bit_length() - 1), index & (low - 1)

    def same_head(self, shape: tuple[int, ...]) -> Bool[Array, "_ _"]:
        mine, _ = self._bits(shape, 0, self.schedule.rows)
        _, theirs = self._bits(shape, 1, self.schedule.heads)
        return mine == theirs

    def visible(self, shape: tuple[int, ...]) -> Bool[Array, "_ _"]:
        _, row = self._bits(shape, 0, self.schedule.rows)
        slot, _ = self._bits(shape, 1, self.schedule.heads)
        return (slot - self.start) * self.schedule.group <= row

    def live(self, x: Float[Array, "rows H"]) -> Float[Array, "rows H"]:
        """Puts 0 where no query sees, rows = chunk * heads: 0 * NaN would be NaN."""
        slot, _ = self._bits(x.shape, 0, self.schedule.heads)
        return jnp.where(slot < self.start + self.queries, x, jnp.zeros_like(x))


def _kernel(
    schedule: TpuSchedule, biased: bool, scalars: Any, layer: Any, *refs: Any
) -> None:
    del layer
    q, k, v, *more, out, top, total, acc = refs
    b, j = pl.program_id(0), pl.program_id(3)
    prefix, queries = scalars[0, b], scalars[1, b]

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def visit(at: Any, edge: Any) -> None:
        mask = _HeadMask(schedule, edge.start if edge else 0, queries)
        keys, values = (x[at].reshape(-1, x.shape[-1]) for x in (k, v))
        if edge:
            keys, values = mask.live(keys), mask.live(values)
        s = prefill.dot_t(q[...], keys) * (schedule.scale * prefill.LOG2E)
        if biased:
            first = pl.multiple_of(at.start * schedule.heads, s.shape[1])
            s += more[0][:, pl.ds(first, s.shape[1])] * prefill.LOG2E
        seen = mask.same_head(s.shape)
        if edge:
            seen &= mask.visible(s.shape)
        s = jnp.where(seen, s, -jnp.inf)
        # Slot 0 is visible to every row: after block 0 no maximum is -inf.
        old = top[...][:, :1]
        new = jnp.maximum(old, s.max(-1, keepdims=True))
        p, fade = jnp.exp2(s - new), jnp.exp2(old - new)
        total[...] = total[...] * fade + p.sum(-1, keepdims=True)
        part = prefill.dot(p.astype(values.dtype), values, ((1,), (0,)))
        acc[...] = acc[...] * fade + part
        top[...] = jnp.broadcast_to(new, top.shape)

    prefill.for_each_chunk(schedule, prefix, queries, 0, j, visit)

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        sums = jnp.where(total[...] == 0, 1, total[...])
        out[...] = (acc[...] / sums[:, :1]).astype(out.dtype)
