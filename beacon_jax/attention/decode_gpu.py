"""Decoding over a long memory as a Pallas-Triton kernel: Flash-Decoding.

(https://pytorch.org/blog/flash-decoding, 2023.) A few queries give too few programs to
fill a GPU: each row's live slots are split evenly over `splits` programs, whose results
`decode.combine` puts together. A split is a share of the row's own length: short rows
of a ragged batch cost what they are long and still use every program. Queries of a kv
head's group share a program, as rows r = t * G + g.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from beacon_jax.attention import blockwise
from beacon_jax.attention.decode import (
    check_scales,
    combine,
    decode_xla,
    zero_invalid,
)
from beacon_jax.attention.device import Target, check_triton, default_target
from beacon_jax.attention.mean import MeanTerm, kernel_tables, product, quarter
from beacon_jax.attention.pallas_gpu import (
    DTYPES,
    LOG2E,
    dot,
    load,
    padded,
    pallas_gpu,
)

MOST_QUERIES = 128
# Programs a launch should have: four for each of the 108 to 132 processors of an A100
# or H100, so that ragged rows even out. More splits only lengthen the combining pass.
PROGRAMS = 512


class DecodeSchedule(NamedTuple):
    """The static numbers of one call of the kernel.

    rows: of queries per program, a power of two >= 16.  keys: slots per step.
    splits: programs that share one row's slots.  target: what the gradient is for.
    """

    scale: float
    group: int
    rows: int
    keys: int
    splits: int
    interpret: bool = False
    target: Target | None = None


def make_schedule(
    q, k, scale, *, splits=None, keys=None, mean=False, **fields: Any
) -> DecodeSchedule:
    b, t, n, h = q.shape
    s, heads = k.shape[-3:-1]
    group = n // heads
    rows = min(64, max(16, pl.next_power_of_2(t * group)))
    # 64 of H = 128 in three stages take 70 KiB of an A100's 164: two programs each.
    wide = padded(h) * (2 if q.dtype == jnp.float32 else 1)
    # With the table of a mean 64 would take 91 KiB, 32 take 51.
    keys = keys or max(32, (32 if mean else 64) * 128 // max(wide, 128))
    programs = b * heads * pl.cdiv(t * group, rows)
    splits = splits or min(pl.cdiv(PROGRAMS, programs), pl.cdiv(s, keys))
    return DecodeSchedule(float(scale), group, rows, keys, splits, **fields)


def split_blocks(schedule: DecodeSchedule, prefix, valid, i, z):
    """Blocks of keys that split z of block i of queries visits in a row:
    (first, full, end). Every query sees all of those before `full`. Ints or arrays.
    """
    start, valid_rows = i * schedule.rows, valid * schedule.group
    last = jnp.minimum(start + schedule.rows, valid_rows) - 1
    most = (
        lax.div(prefix + lax.div(jnp.maximum(last, 0), schedule.group), schedule.keys)
        + 1
    )
    most = jnp.where(start < valid_rows, most, 0)
    share = lax.div(most + schedule.splits - 1, schedule.splits)
    first, end = (jnp.minimum(x * share, most) for x in (z, z + 1))
    full = lax.div(prefix + lax.div(start, schedule.group) + 1, schedule.keys)
    return first, jnp.clip(full, first, end), end


def visited_blocks(schedule: DecodeSchedule, prefix, valid, t):
    """Blocks of keys read per row and kv head, int [B]: the kernel's own schedule."""
    count = 0
    for i in range(pl.cdiv(t * schedule.group, schedule.rows)):
        for z in range(schedule.splits):
            first, _, end = split_blocks(schedule, prefix, valid, i, z)
            count += end - first
    return count


def decode_gpu(
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
    splits: int | None = None,
    keys: int | None = None,
    interpret: bool = False,
):
    """See `api.prefix_attention`. Its gradient is `pallas_gpu`'s.

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
    if t > MOST_QUERIES:
        raise NotImplementedError(f"q has {t} queries: at most {MOST_QUERIES}.")
    kept = {q.dtype} if k_scale is not None else {q.dtype, k.dtype, v.dtype}
    if len(kept) > 1 or q.dtype not in DTYPES:
        raise NotImplementedError(
            f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}: one floating dtype of "
            f"at most 32 bits for all, or int8 k and v with scales."
        )
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: must be greater than 0.")
    sizes = {"splits": splits, "keys": keys, "mean": mean is not None}
    schedule = make_schedule(q, k, scale, **sizes, interpret=interpret, target=target)
    valid = jnp.full(prefix.shape, t) if queries is None else jnp.minimum(queries, t)
    lengths = jnp.stack([prefix, valid], -1).astype(jnp.int32)
    if layer is None:
        k, v, k_scale, v_scale = jax.tree.map(
            lambda x: x[None], (k, v, k_scale, v_scale)
        )
    layer = jnp.asarray(0 if layer is None else layer, jnp.int32).reshape(1)
    if k.dtype == jnp.int8 and 2**31 < k.size <= 2**32 and k.shape[0] > 1:
        # Pallas counts offsets in 32 bits up to 4 GiB, which Triton takes for signed:
        # beyond 2 GiB they point in front of the buffer. (Offsets of two-byte numbers
        # stay below 2**31 there, larger buffers are counted in 64 bits.)
        one = functools.partial(lax.dynamic_slice_in_dim, slice_size=1)
        k, v, k_scale, v_scale = (one(x, layer[0]) for x in (k, v, k_scale, v_scale))
        layer = jnp.zeros_like(layer)
    out: Any = _decode(schedule, q, k, v, lengths, layer, k_scale, v_scale, mean)
    return zero_invalid(out, queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(schedule, q, k, v, lengths, layer, k_scale, v_scale, mean):
    scales = () if k_scale is None else (k_scale, v_scale, mean)
    kernel = functools.partial(forward, schedule)
    args = (q, k, v, lengths, layer, *scales)
    if schedule.interpret:
        return kernel(*args)

    def elsewhere(q, k, v, lengths, layer, *scales):
        prefix, block = lengths[:, 0], blockwise.BLOCK
        if not scales:
            return blockwise.forward(schedule.scale, block, q, k, v, prefix, layer[0])[
                0
            ]
        options = dict(zip(("k_scale", "v_scale", "mean"), scales, strict=True))
        options |= {
            "scale": schedule.scale,
            "layer": layer[0],
            "target": schedule.target,
        }
        return decode_xla(q, k, v, prefix, **options)

    return lax.platform_dependent(*args, cuda=kernel, default=elsewhere)


def _decode_fwd(schedule, q, k, v, lengths, layer, k_scale, v_scale, mean):
    del mean
    if k_scale is not None:
        raise NotImplementedError(
            "k_scale: attention over int8 memory has no gradient."
        )
    prefix, queries = lengths[:, 0], lengths[:, 1]
    options = {
        "scale": schedule.scale,
        "layer": layer[0],
        "interpret": schedule.interpret,
    }
    options |= {"queries": queries, "target": schedule.target}
    attend = lambda q, k, v: pallas_gpu(q, k, v, prefix, **options)
    return jax.vjp(attend, q, k, v)


def _decode_bwd(schedule, pull, d_out):
    del schedule
    return (*pull(d_out), None, None, None, None, None)


_decode.defvjp(_decode_fwd, _decode_bwd)


def forward(
    schedule: DecodeSchedule,
    q,
    k,
    v,
    lengths,
    layer,
    k_scale=None,
    v_scale=None,
    mean=None,
):
    """Runs the kernel: q [B, T, N, H], k, v [L, B, S, K, H] -> out like q."""
    b, t, n, h = q.shape
    layers, _, s, heads, _ = k.shape
    group, count = schedule.group, pl.cdiv(t * schedule.group, schedule.rows)

    def by_head(x):
        x = jnp.moveaxis(x.reshape(b, t, heads, group, h), 1, 2)
        return x.reshape(b, heads, t * group, h)

    scales = [] if k_scale is None else [k_scale, v_scale]
    width = padded(h)
    at = lambda *shape: pl.BlockSpec(
        (None, None, *shape), lambda z, i, n, b: (b, n, i, 0)
    )
    k_spec = pl.BlockSpec(
        (layers, None, s, None, width), lambda z, i, n, b: (0, b, 0, n, 0)
    )
    scale_spec = pl.BlockSpec((layers, None, None, s), lambda z, i, n, b: (0, b, n, 0))
    means, mean_specs = [], []
    if mean is not None:
        starts, table = kernel_tables(mean.turns, s, schedule.keys, q.dtype)
        means = [by_head(mean.query), by_head(quarter(mean.query)), starts, table]
        whole = lambda x: pl.BlockSpec((*x.shape[:-1], width), lambda *_: (0, 0, 0))
        mean_specs = [at(schedule.rows, width)] * 2 + [whole(starts), whole(table)]
    parts, lse = pl.pallas_call(
        functools.partial(_kernel, schedule, t * group, h, bool(scales), bool(means)),
        grid=(schedule.splits, count, heads, b),
        in_specs=[
            at(schedule.rows, width),
            k_spec,
            k_spec,
            *[scale_spec] * len(scales),
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
    )(by_head(q), k, v, *scales, *means, lengths, layer)
    out = combine(parts, lse).reshape(b, heads, t, group, h)
    return jnp.moveaxis(out, 2, 1).reshape(b, t, n, h).astype(q.dtype)


def _mean_scores(schedule, row, r, h, query_ref, quarter_ref, starts_ref, table_ref):
    """Function of block j: float32 [rows, keys]."""
    some = None if r % schedule.rows == 0 else row < r
    query, quarter = (load(x, h, some) for x in (query_ref, quarter_ref))
    parts = map(jnp.int32, range(table_ref.shape[0]))
    table = [load(table_ref.at[i], h) for i in parts]

    def scores(j):
        cos, sin = (load(starts_ref.at[j, pl.ds(i, 1)], h) for i in (0, 1))
        here = query * cos + quarter * sin
        return product(functools.partial(dot, trans_b=True), here, table)

    return scores


def _kernel(schedule, r, h, scaled, with_mean, q_ref, k_ref, v_ref, *refs):
    k_scale, v_scale, *refs = refs if scaled else (None, None, *refs)
    mean_refs, refs = (refs[:4], refs[4:]) if with_mean else ((), refs)
    length_ref, layer_ref, out_ref, lse_ref = refs
    z, i = pl.program_id(0), pl.program_id(1)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    row = i * schedule.rows + jnp.arange(schedule.rows)
    q = load(q_ref, h, None if r % schedule.rows == 0 else row < r)
    factor = schedule.scale * LOG2E
    mean = _mean_scores(schedule, row, r, h, *mean_refs) if with_mean else None

    def step(j, carry, *, masked):
        top, total, acc = carry
        slot = j * schedule.keys + jnp.arange(schedule.keys)
        live = slot < prefix + valid if masked else None
        here = pl.ds(j * schedule.keys, schedule.keys)

        def scales(ref):
            ref = ref.at[layer, here]
            if live is None:
                return plt.load(ref)
            return plt.load(ref, mask=live, other=jnp.float32(0))

        at = (layer, here, slice(None))
        keys, values = (load(x.at[at], h, live).astype(q.dtype) for x in (k_ref, v_ref))
        scores = dot(q, keys, trans_b=True) * factor
        if scaled:
            scores = scores * scales(k_scale)[None, :]
        if mean is not None:
            scores = scores + mean(j) * factor
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
            p = p * scales(v_scale)[None, :]
        return new, total, acc * fade[:, None] + dot(p.astype(values.dtype), values)

    start = (
        jnp.full(schedule.rows, -jnp.inf, jnp.float32),
        jnp.zeros(schedule.rows, jnp.float32),
        jnp.zeros((schedule.rows, q_ref.shape[-1]), jnp.float32),
    )
    first, full, end = split_blocks(schedule, prefix, valid, i, z)
    carry = lax.fori_loop(first, full, functools.partial(step, masked=False), start)
    carry = lax.fori_loop(full, end, functools.partial(step, masked=True), carry)
    top, total, acc = carry
    some = total > 0
    out = acc / jnp.where(some, total, 1.0)[:, None]
    columns = jnp.arange(q_ref.shape[-1]) < h
    plt.store(out_ref, out, mask=(row < r)[:, None] & columns[None, :])
    lse = jnp.where(some, (top + jnp.log2(total)) / LOG2E, -jnp.inf)
    plt.store(lse_ref, lse, mask=row < r)
