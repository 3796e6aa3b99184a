"""`prefix_attention` as Pallas-Triton kernels for GPU (sm_80, sm_90).

FlashAttention-2 (arXiv 2307.08691) over [memory | open window], forward and backward.
Lengths are data: a program's loop ends with the last block of keys that one of its
queries sees, so that dead blocks are neither read nor computed. Every index goes
straight into the buffer as it lies in memory, layer included: no slice, no transposed
and no padded copy exists. Sums are float32 in a fixed order, without atomics: two runs
are bit-equal.

`mosaic_gpu` has the same passes as Mosaic kernels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int, Num

from beacon_jax.attention.device import Target, check_triton, default_target
from beacon_jax.attention.gpu_blocks import Block, GpuBlocks, chip_blocks
from beacon_jax.attention.gpu_passes import LOG2E, attend_on_gpu, check_scale
from beacon_jax.attention.gpu_ranges import key_range, query_range
from beacon_jax.attention.shared import (
    Layer,
    Sums,
    check_dtypes,
    masked_loops,
    no_sums,
    row_lengths,
    stacked,
)

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class GpuSchedule(NamedTuple):
    """The numbers that one call of the kernels is compiled for.

    Attributes:
      scale: of the scores.
      group: query heads per kv head, G.
      ragged: some rows may have fewer than T valid queries.
      blocks: sizes for the three kernels.
      interpret: run them in plain jax.
    """

    scale: float
    group: int
    ragged: bool
    blocks: GpuBlocks
    interpret: bool


def pallas_gpu(
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
    blocks: GpuBlocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` by Triton kernels.

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
    names = ", ".join(jnp.dtype(dtype).name for dtype in DTYPES)
    check_dtypes(q, k, v, False, DTYPES, f"one of {names} for all")
    check_scale(scale)
    t, n, h = q.shape[1:]
    blocks = blocks or chip_blocks(target.kind, h, q.dtype)
    group = n // k.shape[-2]
    schedule = GpuSchedule(float(scale), group, queries is not None, blocks, interpret)
    lengths = row_lengths(prefix, queries, t, -1)
    layer, k, v, bias = stacked(layer, k, v, bias)
    return attend_on_gpu(forward, backward, schedule, q, k, v, lengths, layer, bias)


# The kernels. A grid is (block, head, row). lengths [B, 2]: prefix and valid queries.


def forward(
    schedule: GpuSchedule,
    q: Float[Array, "B T N H"],
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    lengths: Int[Array, "B 2"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the result and the log of softmax's denominators in float32.

    That is inf for queries that are not valid.
    """
    b, t, n, h = q.shape
    block = schedule.blocks.forward
    count = pl.cdiv(t, block.queries)
    q_spec, k_spec, row_spec, length_spec = _query_specs(schedule, block, q, k, count)
    biases = [] if bias is None else [bias]
    bias_spec = _bias_spec(k, schedule.group)
    return _call(
        functools.partial(_forward_kernel, schedule, block, t, h, count),
        schedule,
        block,
        "prefix_attention_forward",
        (count, n, b),
        [q_spec, k_spec, k_spec, *[bias_spec] * len(biases), length_spec, _LAYER],
        [q_spec, row_spec],
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, n, t), jnp.float32),
        ],
    )(q, k, v, *biases, lengths, layer.reshape(1))


def backward(
    schedule: GpuSchedule,
    q: Float[Array, "B T N H"],
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    lengths: Int[Array, "B 2"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns d_q and, of the layer, d_k and d_v, exactly 0 in dead slots."""
    b, t, n, h = q.shape
    s, heads = k.shape[2:4]
    delta = jnp.einsum("BTNH,BTNH->BNT", d_out, out, preferred_element_type=jnp.float32)
    biases = [] if bias is None else [bias]
    inputs = (q, k, v, d_out, *biases, lse, delta, lengths, layer.reshape(1))
    of_queries, of_keys = (
        [_bias_spec(k, group)] * len(biases) for group in (schedule.group, 1)
    )
    block = schedule.blocks.d_q
    count = pl.cdiv(t, block.queries)
    q_spec, k_spec, row_spec, length_spec = _query_specs(schedule, block, q, k, count)
    d_q = _call(
        functools.partial(_d_q_kernel, schedule, block, t, h, count),
        schedule,
        block,
        "prefix_attention_d_q",
        (count, n, b),
        [
            *(q_spec, k_spec, k_spec, q_spec, *of_queries),
            *(row_spec, row_spec, length_spec, _LAYER),
        ],
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
        [
            *(q_spec, k_spec, k_spec, q_spec, *of_keys),
            *(row_spec, row_spec, length_spec, _LAYER),
        ],
        [d_spec, d_spec],
        [jax.ShapeDtypeStruct(rows, k.dtype), jax.ShapeDtypeStruct(rows, v.dtype)],
    )(*inputs)
    return d_q, d_k, d_v


def _call(
    kernel: Any,
    schedule: GpuSchedule,
    block: Block,
    name: str,
    grid: tuple[int, ...],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
) -> Any:
    """Makes a function of the arrays that runs the kernel on the grid."""
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


def padded(h: int) -> int:
    """Pads to a power of two, as Triton's arrays are, and to 16 for its products."""
    return max(16, pl.next_power_of_2(h))


def _query_specs(
    schedule: GpuSchedule, block: Block, q: Array, k: Array, count: int
) -> tuple[pl.BlockSpec, ...]:
    """Returns the specs of q, k, rows [B, N, T] and lengths for owners of queries.

    The last block comes first: it has the most keys, and ends the grid evenly.
    """
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


def _key_specs(
    schedule: GpuSchedule, block: Block, q: Array, k: Array
) -> tuple[pl.BlockSpec, ...]:
    """Returns the same, and that of d_k, for owners of keys and their query heads."""
    t, h = q.shape[1], padded(q.shape[-1])
    layers, s = k.shape[0], k.shape[2]
    return (
        pl.BlockSpec((None, t, schedule.group, h), lambda j, n, b: (b, 0, n, 0)),
        pl.BlockSpec((layers, None, s, None, h), lambda j, n, b: (0, b, 0, n, 0)),
        pl.BlockSpec((None, schedule.group, t), lambda j, n, b: (b, n, 0)),
        pl.BlockSpec((None, 2), lambda j, n, b: (b, 0)),
        pl.BlockSpec((None, block.keys, None, h), lambda j, n, b: (b, j, n, 0)),
    )


def _bias_spec(k: Array, group: int) -> pl.BlockSpec:
    """Returns the spec of a bias for owners of a head of a `group` of them."""
    return pl.BlockSpec(
        (k.shape[0], None, None, k.shape[2]),
        lambda i, n, b: (0, b, lax.div(n, group), 0),
    )


def dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], trans_b: bool = False
) -> Float[Array, "_ _"]:
    """Multiplies with a float32 result; float32 operands keep all their bits."""
    exact = a.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else None
    return plt.dot(a, b, trans_b=trans_b, precision=precision)


def load(
    ref: Any, h: int, rows: Bool[Array, " R"] | None = None
) -> Num[Array, "R width"]:
    """Loads a block of ref, with 0 in the columns behind h and where not in `rows`.

    Those are not read; rows=None: all are.
    """
    columns = jnp.arange(ref.shape[-1]) < h if ref.shape[-1] > h else None
    if rows is None and columns is None:
        return plt.load(ref)
    masks = [] if rows is None else [rows[:, None]]
    masks += [] if columns is None else [columns[None, :]]
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), ref.shape)
    return plt.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))


def load_row(
    ref: Any, rows: Bool[Array, " R"] | None, other: float
) -> Float[Array, " R"]:
    """Loads a number per row, `other` where not in `rows`; rows=None: all are."""
    if rows is None:
        return plt.load(ref)
    return plt.load(ref, mask=rows, other=jnp.float32(other))


def _store(
    ref: Any, x: Float[Array, "R width"], rows: Bool[Array, " R"], h: int
) -> None:
    """Stores these rows and the first h columns of x."""
    mask = rows[:, None] & (jnp.arange(ref.shape[-1]) < h)[None, :]
    plt.store(ref, x.astype(ref.dtype), mask=mask)


def _visible(
    prefix: Array, i: Array, j: Array, block: Block
) -> Bool[Array, "queries keys"]:
    """Says which queries of block i see which keys of block j."""
    last = prefix + i * block.queries + jnp.arange(block.queries)
    slot = j * block.keys + jnp.arange(block.keys)
    return slot[None, :] <= last[:, None]


def _key_block(
    block: Block, j: Array, lengths: tuple[Array, Array], layer: Array, masked: bool
) -> tuple[Any, Bool[Array, " keys"] | None]:
    """Returns where block j of keys lies, and which are live; None: all."""
    start, (prefix, valid) = j * block.keys, lengths
    live = start + jnp.arange(block.keys) < prefix + valid if masked else None
    return (layer, pl.ds(start, block.keys), slice(None)), live


def _forward_kernel(
    schedule: GpuSchedule, block: Block, t: int, h: int, count: int, *refs: Any
) -> None:
    q_ref, k_ref, v_ref, *bias_ref, length_ref, layer_ref, out_ref, lse_ref = refs
    i = count - 1 - pl.program_id(0)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    row = i * block.queries + jnp.arange(block.queries)
    # A query that is not valid may be anything, but its row of the result is its own.
    q = load(q_ref, h, None if t % block.queries == 0 else row < t)
    factor = schedule.scale * LOG2E

    def step(j: Array, sums: Sums, *, masked: bool) -> Sums:
        top, total, acc = sums
        at, live = _key_block(block, j, (prefix, valid), layer, masked)
        scores = dot(q, load(k_ref.at[at], h, live), trans_b=True)
        if bias_ref:
            # Over the scale, which all are multiplied by below.
            bias = load_row(bias_ref[0].at[at[:2]], live, 0.0)
            scores = scores + (bias / schedule.scale)[None, :]
        if masked:
            scores = jnp.where(_visible(prefix, i, j, block), scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1) * factor)
        p = jnp.exp2(scores * factor - new[:, None])
        fade = jnp.exp2(top - new)
        values = load(v_ref.at[at], h, live)
        part = dot(p.astype(values.dtype), values)
        return new, total * fade + p.sum(-1), acc * fade[:, None] + part

    start = no_sums(block.queries, q_ref.shape[-1])
    # Key 0 is visible to every query, so that after block 0 no maximum is -inf.
    bounds = key_range(prefix, valid, i * block.queries, block.queries, block.keys)
    top, total, acc = masked_loops(step, start, bounds, (False, True))
    keep = row < valid
    _store(out_ref, jnp.where(keep[:, None], acc / total[:, None], 0), row < t, h)
    lse = jnp.where(keep, (top + jnp.log2(total)) / LOG2E, jnp.inf)
    plt.store(lse_ref, lse, mask=row < t)


def _d_q_kernel(
    schedule: GpuSchedule, block: Block, t: int, h: int, count: int, *refs: Any
) -> None:
    q_ref, k_ref, v_ref, d_out_ref, *bias_ref, lse_ref, delta_ref = refs[:-3]
    length_ref, layer_ref, d_q_ref = refs[-3:]
    i = count - 1 - pl.program_id(0)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    row = i * block.queries + jnp.arange(block.queries)
    rows = row < valid if schedule.ragged or t % block.queries else None
    q, d_out = load(q_ref, h, rows), load(d_out_ref, h, rows)
    # Where the denominator is inf, p is 0.
    lse = load_row(lse_ref, rows, jnp.inf) * LOG2E
    delta = load_row(delta_ref, rows, 0.0)
    factor = schedule.scale * LOG2E

    def step(j: Array, d_q: Array, *, masked: bool) -> Array:
        at, live = _key_block(block, j, (prefix, valid), layer, masked)
        keys = load(k_ref.at[at], h, live)
        scores = dot(q, keys, trans_b=True) * factor
        if bias_ref:
            scores += load_row(bias_ref[0].at[at[:2]], live, 0.0)[None, :] * LOG2E
        p = jnp.exp2(scores - lse[:, None])
        if masked:
            p = jnp.where(_visible(prefix, i, j, block), p, 0)
        d_p = dot(d_out, load(v_ref.at[at], h, live), trans_b=True)
        d_s = p * (d_p - delta[:, None])
        return d_q + dot(d_s.astype(keys.dtype), keys)

    d_q = jnp.zeros((block.queries, q_ref.shape[-1]), jnp.float32)
    bounds = key_range(prefix, valid, i * block.queries, block.queries, block.keys)
    d_q = masked_loops(step, d_q, bounds, (False, True))
    _store(d_q_ref, d_q * schedule.scale, row < t, h)


def _d_kv_kernel(
    schedule: GpuSchedule, block: Block, t: int, s: int, h: int, *refs: Any
) -> None:
    q_ref, k_ref, v_ref, d_out_ref, *bias_ref, lse_ref, delta_ref = refs[:-4]
    length_ref, layer_ref, d_k_ref, d_v_ref = refs[-4:]
    j = pl.program_id(0)
    prefix, valid, layer = length_ref[0], length_ref[1], layer_ref[0]
    slot = j * block.keys + jnp.arange(block.keys)
    at = (layer, pl.ds(j * block.keys, block.keys), slice(None))
    live = slot < prefix + valid
    keys, values = load(k_ref.at[at], h, live), load(v_ref.at[at], h, live)
    factor = schedule.scale * LOG2E
    bias = load_row(bias_ref[0].at[at[:2]], live, 0.0) * LOG2E if bias_ref else None

    # Scores are [keys, queries] here: both products into d_k and d_v take them as is.
    def step(
        i: Array, carry: tuple[Array, Array], *, g: Array, masked: bool
    ) -> tuple[Array, Array]:
        d_k, d_v = carry
        here = pl.ds(i * block.queries, block.queries)
        row = i * block.queries + jnp.arange(block.queries)
        rows = row < valid if schedule.ragged or t % block.queries else None
        q = load(q_ref.at[here, g, :], h, rows)
        lse = load_row(lse_ref.at[g, here], rows, jnp.inf) * LOG2E
        scores = dot(keys, q, trans_b=True) * factor
        if bias is not None:
            scores += bias[:, None]
        p = jnp.exp2(scores - lse[None, :])
        if masked:
            p = jnp.where(slot[:, None] <= prefix + row[None, :], p, 0)
        d_out = load(d_out_ref.at[here, g, :], h, rows)
        d_v = d_v + dot(p.astype(d_out.dtype), d_out)
        delta = load_row(delta_ref.at[g, here], rows, 0.0)
        d_s = p * (dot(values, d_out, trans_b=True) - delta[None, :])
        return d_k + dot(d_s.astype(q.dtype), q), d_v

    start = j * block.keys
    bounds = query_range(prefix, valid, start, block.keys, block.queries)

    def head(g: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        one = functools.partial(step, g=g)
        return masked_loops(one, carry, bounds, (True, False))

    zeros = jnp.zeros((block.keys, q_ref.shape[-1]), jnp.float32)
    d_k, d_v = lax.fori_loop(0, schedule.group, head, (zeros, zeros))
    _store(d_k_ref, d_k * schedule.scale, slot < s, h)
    _store(d_v_ref, d_v, slot < s, h)
