"""Decoding over a long memory as a Pallas-Triton kernel: Flash-Decoding.

(https://pytorch.org/blog/flash-decoding, 2023.) A few queries give too few programs to
fill a GPU: each row's live slots are split evenly over `splits` programs, whose results
`decode.combine` puts together. A split is a share of the row's own length: short rows
of a ragged batch cost what they are long and still use every program. Queries of a kv
head's group share a program, as rows r = t * G + g.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int, Num

from beacon_jax.attention.decode import check_scales, combine, decode_xla
from beacon_jax.attention.device import Target, check_triton, default_target
from beacon_jax.attention.gpu_passes import (
    LOG2E,
    check_few,
    check_scale,
    enough_splits,
    in_xla,
)
from beacon_jax.attention.gpu_ranges import key_range
from beacon_jax.attention.mean import MeanTerm, kernel_tables, product, quarter
from beacon_jax.attention.pallas_gpu import (
    DTYPES,
    dot,
    load,
    load_row,
    padded,
    pallas_gpu,
)
from beacon_jax.attention.shared import (
    Count,
    Layer,
    Shaped,
    Sums,
    attend_by,
    check_dtypes,
    lowered,
    masked_loops,
    no_sums,
    row_lengths,
    stacked,
    zero_invalid,
)


class DecodeSchedule(NamedTuple):
    """The numbers that one call of the kernel is compiled for.

    Attributes:
      scale: of the scores.
      group: query heads per kv head, G.
      rows: of queries per program, a power of two >= 16.
      keys: slots per step.
      splits: programs that share one row's slots.
      interpret: run the kernel in plain jax.
      target: what the gradient is for.
    """

    scale: float
    group: int
    rows: int
    keys: int
    splits: int
    interpret: bool = False
    target: Target | None = None


def make_schedule(
    q: Shaped,
    k: Shaped,
    scale: float,
    *,
    splits: int | None = None,
    keys: int | None = None,
    mean: bool = False,
    **fields: Any,
) -> DecodeSchedule:
    """Makes the schedule of q [B, T, N, H] and k [*L, B, S, K, H].

    mean: the keys lack one. fields: interpret and target.
    """
    b, t, n, h = q.shape
    s, heads = k.shape[-3:-1]
    group = n // heads
    rows = min(64, max(16, pl.next_power_of_2(t * group)))
    # 64 of H = 128 in three stages take 70 KiB of an A100's 164: two programs each.
    wide = padded(h) * (2 if q.dtype == jnp.float32 else 1)
    # With the table of a mean 64 would take 91 KiB, 32 take 51.
    keys = keys or max(32, (32 if mean else 64) * 128 // max(wide, 128))
    programs = b * heads * pl.cdiv(t * group, rows)
    splits = splits or enough_splits(programs, pl.cdiv(s, keys))
    return DecodeSchedule(float(scale), group, rows, keys, splits, **fields)


def split_range(
    schedule: DecodeSchedule, prefix: Count, valid: Count, i: Count, z: Count
) -> tuple[Count, Count, Count]:
    """Returns `key_range` of split z of block i of queries."""
    split = z, schedule.splits
    sizes = i * schedule.rows, schedule.rows, schedule.keys
    return key_range(prefix, valid, *sizes, group=schedule.group, split=split)


def visited_blocks(
    schedule: DecodeSchedule, prefix: Count, valid: Count, t: int
) -> Count:
    """Counts the blocks of keys read per row and kv head, int [B], for T queries."""
    count = 0
    for i in range(pl.cdiv(t * schedule.group, schedule.rows)):
        for z in range(schedule.splits):
            first, _, end = split_range(schedule, prefix, valid, i, z)
            count += end - first
    return count


def decode_gpu(
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
    splits: int | None = None,
    keys: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` of few queries; its gradient is `pallas_gpu`'s.

    splits, keys: programs per row and slots per step, other than the measured ones.
    interpret: run the kernel in plain jax, on any platform. Otherwise a program that is
    lowered for another platform than CUDA computes the same in XLA.

    Raises:
      NotImplementedError: q has more than 128 queries; dtypes other than one of
        float32, bfloat16 and float16 for all, int8 k and v apart; scale <= 0; a GPU
        that Triton does not know.
    """
    target = target or default_target()
    if not interpret:
        check_triton(target)
    check_scales(k, v, k_scale, v_scale)
    t = q.shape[1]
    check_few(t)
    taken = "one floating dtype of at most 32 bits for all, or int8 k and v with scales"
    check_dtypes(q, k, v, k_scale is not None, DTYPES, taken)
    check_scale(scale)
    sizes = {"splits": splits, "keys": keys, "mean": mean is not None}
    schedule = make_schedule(q, k, scale, **sizes, interpret=interpret, target=target)
    lengths = row_lengths(prefix, queries, t, -1)
    at, *buffers = stacked(layer, k, v, bias, k_scale, v_scale)
    if k.dtype == jnp.int8 and 2**31 < k.size <= 2**32 and len(buffers[0]) > 1:
        # Pallas counts offsets in 32 bits up to 4 GiB, which Triton takes for signed:
        # beyond 2 GiB they point in front of the buffer. (Offsets of two-byte numbers
        # stay below 2**31 there, larger buffers are counted in 64 bits.)
        one = functools.partial(lax.dynamic_slice_in_dim, slice_size=1)
        buffers = jax.tree.map(lambda x: one(x, at), buffers)
        at = jnp.zeros_like(at)
    scales = () if k_scale is None else (*buffers[3:], mean)
    value, gradient = (functools.partial(f, schedule) for f in (_decode, _prefill))
    given = (q, *buffers[:2], lengths, at, buffers[2], *scales)
    out: Any = attend_by(value, gradient, *given)
    return zero_invalid(out, queries)


def _decode(schedule: DecodeSchedule, *given: Any) -> Float[Array, "B T N H"]:
    """Attends: (q, k, v, lengths, layer, bias), (k_scale, v_scale, mean) if int8."""

    def elsewhere(
        q: Array, k: Array, v: Array, lengths: Array, layer: Array, *more: Any
    ) -> Array:
        bias, *scales = more
        if not scales:
            return in_xla(schedule.scale, q, k, v, lengths, layer, bias)[0]
        options: dict[str, Any] = dict(
            zip(("k_scale", "v_scale", "mean"), scales, strict=True)
        )
        options |= {"scale": schedule.scale, "target": schedule.target, "bias": bias}
        return decode_xla(q, k, v, lengths[:, 0], layer=layer, **options)

    kernel = functools.partial(forward, schedule)
    return lowered("cuda", schedule.interpret, kernel, elsewhere, *given)


def _prefill(
    schedule: DecodeSchedule,
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    layer: Array,
    bias: Array | None,
    *scales: Any,
) -> Float[Array, "B T N H"]:
    """Attends by the kernels of `pallas_gpu`, which have a gradient."""
    if scales:
        raise NotImplementedError(
            "k_scale: attention over int8 memory has no gradient."
        )
    prefix, queries = lengths[:, 0], lengths[:, 1]
    return pallas_gpu(
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
    schedule: DecodeSchedule,
    q: Float[Array, "B T N H"],
    k: Num[Array, "L B S K H"],
    v: Num[Array, "L B S K H"],
    lengths: Int[Array, "B 2"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None = None,
    k_scale: Float[Array, "L B K S"] | None = None,
    v_scale: Float[Array, "L B K S"] | None = None,
    mean: MeanTerm | None = None,
) -> Float[Array, "B T N H"]:
    """Runs the kernel and combines what the splits of a row found."""
    b, t, n, h = q.shape
    layers, _, s, heads, _ = k.shape
    group, count = schedule.group, pl.cdiv(t * schedule.group, schedule.rows)

    def by_head(x: Float[Array, "B T N H"]) -> Float[Array, "B K R H"]:
        x = jnp.moveaxis(x.reshape(b, t, heads, group, h), 1, 2)
        return x.reshape(b, heads, t * group, h)

    numbers = [x for x in (bias, k_scale, v_scale) if x is not None]
    width = padded(h)
    at = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda z, i, n, b: (b, n, i, 0)
    )
    k_spec = pl.BlockSpec(
        (layers, None, s, None, width), lambda z, i, n, b: (0, b, 0, n, 0)
    )
    number_spec = pl.BlockSpec((layers, None, None, s), lambda z, i, n, b: (0, b, n, 0))
    means, mean_specs = [], []
    if mean is not None:
        starts, table = kernel_tables(mean.turns, s, schedule.keys, q.dtype)
        means = [by_head(mean.query), by_head(quarter(mean.query)), starts, table]
        whole = lambda x: pl.BlockSpec((*x.shape[:-1], width), lambda *_: (0, 0, 0))
        mean_specs = [at(schedule.rows, width)] * 2 + [whole(starts), whole(table)]
    more = bias is not None, k_scale is not None, mean is not None
    parts, lse = pl.pallas_call(
        functools.partial(_kernel, schedule, t * group, h, more),
        grid=(schedule.splits, count, heads, b),
        in_specs=[
            at(schedule.rows, width),
            k_spec,
            k_spec,
            *[number_spec] * len(numbers),
            *mean_specs,
            pl.BlockSpec((None, 2), lambda z, i, n, b: (b, 0)),
            pl.BlockSpec((1,), lambda z, i, n, b: (0,)),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, schedule.rows, width),
                lambda z, i, n, b: (b, n, z, i, 0),
            ),
            pl.BlockSpec(
                (None, None, None, schedule.rows), lambda z, i, n, b: (b, n, z, i)
            ),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(
                (b, heads, schedule.splits, t * group, h), jnp.float32
            ),
            jax.ShapeDtypeStruct((b, heads, schedule.splits, t * group), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=3),
        interpret=schedule.interpret,
        name="prefix_attention_decode",
    )(by_head(q), k, v, *numbers, *means, lengths, layer.reshape(1))
    out = combine(parts, lse).reshape(b, heads, t, group, h)
    return jnp.moveaxis(out, 2, 1).reshape(b, t, n, h).astype(q.dtype)


def _mean_scores(
    schedule: DecodeSchedule, row: Array, r: int, h: int, *mean_refs: Any
) -> Callable[[Array], Array]:
    """Returns the scores of the mean as a function of block j, float32 [rows, keys]."""
    query_ref, quarter_ref, starts_ref, table_ref = mean_refs
    some = None if r % schedule.rows == 0 else row < r
    query, quarter = (load(x, h, some) for x in (query_ref, quarter_ref))
    parts = map(jnp.int32, range(table_ref.shape[0]))
    table = [load(table_ref.at[i], h) for i in parts]

    def scores(j: Array) -> Float[Array, "rows keys"]:
        cos, sin = (load(starts_ref.at[j, pl.ds(i, 1)], h) for i in (0, 1))
        here = query * cos + quarter * sin
        return product(functools.partial(dot, trans_b=True), here, table)

    return scores


def _kernel(
    schedule: DecodeSchedule,
    r: int,
    h: int,
    given: tuple[bool, bool, bool],
    *refs: Any,
) -> None:
    """Attends to a split; given: a bias, scales, a mean, whose refs follow v's."""
    q_ref, k_ref, v_ref, *more, length_ref, layer_ref, out_ref, lse_ref = refs
    biased, scaled, with_mean = given
    bias_ref = more.pop(0) if biased else None
    k_scale, v_scale, *mean_refs = more if scaled else (None, None)
    z, i = pl.program_id(0), pl.program_id(1)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    row = i * schedule.rows + jnp.arange(schedule.rows)
    q = load(q_ref, h, None if r % schedule.rows == 0 else row < r)
    factor = schedule.scale * LOG2E
    mean = _mean_scores(schedule, row, r, h, *mean_refs) if with_mean else None

    def step(j: Array, sums: Sums, *, masked: bool) -> Sums:
        top, total, acc = sums
        slot = j * schedule.keys + jnp.arange(schedule.keys)
        live = slot < prefix + valid if masked else None
        here = pl.ds(j * schedule.keys, schedule.keys)

        numbers = lambda ref: load_row(ref.at[layer, here], live, 0.0)[None, :]
        at = (layer, here, slice(None))
        keys, values = (load(x.at[at], h, live).astype(q.dtype) for x in (k_ref, v_ref))
        scores = dot(q, keys, trans_b=True) * factor
        if scaled:
            scores = scores * numbers(k_scale)
        if mean is not None:
            scores = scores + mean(j) * factor
        if biased:
            scores = scores + numbers(bias_ref) * LOG2E
        if masked:
            # slot <= prefix + r // G without a division
            behind = (slot - prefix) * schedule.group
            scores = jnp.where(behind[None, :] <= row[:, None], scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1))
        # A split may hold nothing that an early query sees: no -inf - -inf.
        base = jnp.where(new == -jnp.inf, 0.0, new)
        p, fade = jnp.exp2(scores - base[:, None]), jnp.exp2(top - base)
        total = total * fade + p.sum(-1)
        if scaled:
            p = p * numbers(v_scale)
        return new, total, acc * fade[:, None] + dot(p.astype(values.dtype), values)

    start = no_sums(schedule.rows, q_ref.shape[-1])
    bounds = split_range(schedule, prefix, valid, i, z)
    top, total, acc = masked_loops(step, start, bounds, (False, True))
    some = total > 0
    out = acc / jnp.where(some, total, 1.0)[:, None]
    columns = jnp.arange(q_ref.shape[-1]) < h
    plt.store(out_ref, out, mask=(row < r)[:, None] & columns[None, :])
    lse = jnp.where(some, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
    plt.store(lse_ref, lse, mask=row < r)
