"""`prefix_attention` as Mosaic kernels for GPU: sm_80 by mma, sm_90 by wgmma.

FlashAttention-2 (arXiv 2307.08691) over [memory | open window], forward and backward,
as in `pallas_gpu`, on the path that JAX keeps: Pallas-Triton is deprecated since jax
0.11. Blocks of keys are fetched ahead into shared memory while the ones before are
multiplied. Lengths are data: a loop ends with the last block that is seen. Queries are
padded to whole blocks; a block of keys that would end behind the buffer ends with it,
and masks what the block before it has: a copy never leaves its array. Sums are float32
in a fixed order, and no two programs write one number differently: two runs are
bit-equal.

The kernels are written once, in the words of `mosaic_chip`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.gpu_blocks import Block, GpuBlocks, mosaic_blocks
from beacon_jax.attention.gpu_passes import LOG2E, attend_on_gpu, check_scale
from beacon_jax.attention.gpu_ranges import key_range, query_range
from beacon_jax.attention.mosaic_chip import (
    Ampere,
    Hopper,
    Plain,
    Ring,
    per_column,
    per_row,
)
from beacon_jax.attention.mosaic_grid import Program, Shape, find_program
from beacon_jax.attention.shared import (
    Layer,
    check_dtypes,
    masked_loops,
    row_lengths,
    stacked,
)

HALVES = (jnp.bfloat16, jnp.float16)
MOST_HEADS = 65535  # of all rows: they are the last dimension of CUDA's grid
CHIPS = {"sm_80": Ampere, "sm_90": Hopper}


class MosaicSchedule(NamedTuple):
    """The numbers that one call of the kernels is compiled for.

    Attributes:
      scale: of the scores.
      heads: query heads per kv head.
      ragged: some rows may have fewer than T valid queries.
      blocks: sizes for the three kernels.
      chip: that they are for.
      interpret: run them on the CPU, as `plgpu.InterpretGPUParams` does.
      group: rows per query, for rows that are the query heads of a kv head.
      splits: programs that share one row's slots; each result is float32.
    """

    scale: float
    heads: int
    ragged: bool
    blocks: GpuBlocks
    chip: Plain
    interpret: bool = False
    group: int = 1
    splits: int = 1


def mosaic_gpu(
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
    chip: type[Plain] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` by Mosaic kernels.

    A program that is lowered for another platform than CUDA computes the same
    blockwise. blocks, chip: other than the target's. interpret: run the kernels on the
    CPU, on any platform; in float32 and other H by `chip=Plain`.

    Raises:
      NotImplementedError: the target is not of compute capability 8.0 or 9.0; dtypes
        other than one of bfloat16 and float16; H other than 64 and 128; S
        smaller than a block of keys or, on sm_90, not a multiple of 8, or odd with a
        bias; more than 65535 heads of all rows; scale <= 0.
    """
    its, blocks = choose(q, k, v, target, bias, chip, blocks)
    check_scale(scale)
    t = q.shape[1]
    heads = q.shape[2] // k.shape[-2]
    ragged = queries is not None
    schedule = MosaicSchedule(float(scale), heads, ragged, blocks, its, interpret)
    lengths = row_lengths(prefix, queries, t, -1)
    layer, k, v, bias = stacked(layer, k, v, bias)
    return attend_on_gpu(forward, backward, schedule, q, k, v, lengths, layer, bias)


def choose(
    q: Array,
    k: Array,
    v: Array,
    target: Target | None,
    bias: Array | None,
    chip: type[Plain] | None,
    blocks: GpuBlocks | None,
) -> tuple[Plain, GpuBlocks]:
    """Returns the chip and its blocks; raises what `mosaic_gpu` says it does."""
    b, _, n, h = q.shape
    s = k.shape[-3]
    check_dtypes(q, k, v, False, (jnp.float32, *HALVES), "one dtype for all")
    if chip is None or blocks is None:
        name, found = mosaic_blocks((target or default_target()).kind, h)
        chip, blocks = chip or CHIPS[name], blocks or found
    if not chip.exact:
        check_dtypes(q, k, v, False, HALVES, "bfloat16 or float16 for all")
    least = max(block.keys for block in blocks if block is not None)
    # Numbers of a bias are read in pairs.
    rows = max(chip.rows, 1 if bias is None or chip.exact else 2)
    if s < least or s % rows:
        raise NotImplementedError(
            f"S={s} of k: a multiple of {rows} from {least} on, a block of keys."
        )
    if b * n > MOST_HEADS:
        raise NotImplementedError(f"{b} rows of {n} heads in q: at most {MOST_HEADS}.")
    return chip(jnp.dtype(q.dtype)), blocks


# The kernels. Arrays are [L * B, S, K * H] and [B, T, N * H]: a head is columns.


def forward(
    schedule: MosaicSchedule,
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
    t = q.shape[1]
    q = whole_blocks(q, schedule.blocks.forward.queries)
    out, lse = attend_splits(schedule, q, k, v, lengths, layer, bias)
    return out[:, 0, :t], lse[:, :, 0, :t]


def attend_splits(
    schedule: MosaicSchedule,
    q: Float[Array, "B T N H"],
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    lengths: Int[Array, "B 2"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None = None,
) -> tuple[Float[Array, "B Z T N H"], Float[Array, "B N Z T"]]:
    """Runs the forward kernel; a result per split of the slots.

    With several splits the results are float32, and lse is -inf where one is empty.
    """
    b, t, n, h = q.shape
    block, splits = schedule.blocks.forward, schedule.splits
    shape = Shape(b, t, k.shape[2], h)
    dtype = q.dtype if splits == 1 else jnp.float32
    out, lse = _call(
        functools.partial(_forward_kernel, schedule, shape, bias is not None),
        schedule,
        "prefix_attention_forward",
        {"row": b, "head": n, "split": splits, "block": t // block.queries},
        [
            jax.ShapeDtypeStruct((b, splits, t, n * h), dtype),
            jax.ShapeDtypeStruct((b, n, splits, t), jnp.float32),
        ],
        own=[(block.queries, h)],
        ring=[(block.keys, h)] * 2,
        stages=block.stages,
    )(*_flat(q, k, v, bias), lengths, layer.reshape(1))
    return out.reshape(b, splits, t, n, h), lse


def backward(
    schedule: MosaicSchedule,
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
    # Powers of two: whole blocks of one are whole blocks of both.
    most = max(schedule.blocks.d_q.queries, schedule.blocks.d_kv.queries)
    q, d_out = whole_blocks(q, most), whole_blocks(d_out, most)
    more = [(0, 0), (0, 0), (0, q.shape[1] - t)]
    lse, delta = jnp.pad(lse, more, constant_values=jnp.inf), jnp.pad(delta, more)
    shape = Shape(b, q.shape[1], s, h)
    q, k, v, *biases = _flat(q, k, v, bias)
    inputs = (q, k, v, *biases, d_out.reshape(q.shape), lse, delta, lengths)
    inputs = (*inputs, layer.reshape(1))
    block = schedule.blocks.d_q
    d_q = _call(
        functools.partial(_d_q_kernel, schedule, shape, bias is not None),
        schedule,
        "prefix_attention_d_q",
        {"row": b, "head": n, "split": 1, "block": shape.t // block.queries},
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        own=[(block.queries, h)] * 2,
        ring=[(block.keys, h)] * 2,
        stages=block.stages,
    )(*inputs)[0]
    block = schedule.blocks.d_kv
    d_k, d_v = _call(
        functools.partial(_d_kv_kernel, schedule, shape, bias is not None),
        schedule,
        "prefix_attention_d_kv",
        {"row": b, "head": heads, "split": 1, "block": pl.cdiv(s, block.keys)},
        [jax.ShapeDtypeStruct((b, s, heads * h), x.dtype) for x in (k, v)],
        own=[(block.keys, h)] * 2,
        ring=[(block.queries, h)] * 2,
        stages=block.stages,
    )(*inputs)
    d_q = d_q.reshape(b, shape.t, n, h)[:, :t]
    return d_q, *(x.reshape(b, s, heads, h) for x in (d_k, d_v))


def _call(
    kernel: Any,
    schedule: MosaicSchedule,
    name: str,
    grid: dict[str, int],
    out_type: list[jax.ShapeDtypeStruct],
    *,
    own: list[tuple[int, int]],
    ring: list[tuple[int, int]],
    stages: int,
) -> Any:
    """Makes a function of the arrays that runs a kernel on the grid.

    own: tiles that a program reads once. ring: those it fetches in `stages` turns.
    """
    chip = schedule.chip
    tiles = [chip.tile(1, *shape) for shape in own]
    turns = [chip.tile(stages, *shape) for shape in ring]
    scratch = {
        "own": tiles,
        "ring": turns,
        "own_barriers": [chip.barriers(1) for _ in own],
        "ring_barriers": [chip.barriers(stages) for _ in ring],
    }
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # rows are summed within a warp
        ),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if schedule.interpret else None,
    )


def whole_blocks(x: Float[Array, "B T N H"], queries: int) -> Float[Array, "B _ N H"]:
    """Pads T with 0 to whole blocks of queries.

    Two blocks must not share rows: their programs see keys in other blocks or splits.
    """
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % queries), (0, 0), (0, 0)])


def _flat(q: Array, k: Array, v: Array, bias: Array | None) -> list[Array]:
    """Merges layers with rows, heads with numbers: no copies are made."""
    layers, b, s, heads, h = k.shape
    flat = [q.reshape(*q.shape[:2], -1)]
    flat += [x.reshape(layers * b, s, heads * h) for x in (k, v)]
    return flat if bias is None else [*flat, bias.reshape(layers * b, heads, s)]


def _visible(
    chip: Plain, place: Program, block: Block, j: Any, key: Any, group: int
) -> Bool[Array, "queries keys"]:
    """Says which rows see which keys of block j, which begins at `key`."""
    size = block.queries, block.keys
    row, slot = place.start + chip.iota(size, 0), key + chip.iota(size, 1)
    # slot <= prefix + row // group without a division; not those of the block before.
    seen = (slot - place.prefix) * group <= row
    return seen & (slot >= j * block.keys)


def _keys(
    schedule: MosaicSchedule, shape: Shape, place: Program, block: Block, refs: Any
) -> tuple[Any, Any]:
    """Returns where block j of keys begins, and its part of an array [.., S, K H]."""
    head = lax.div(place.n, schedule.heads)
    first = lambda j: jnp.minimum(j * block.keys, shape.s - block.keys)
    columns = pl.ds(head * shape.h, shape.h)
    part = lambda ref: lambda j: ref.at[place.at, pl.ds(first(j), block.keys), columns]
    return first, [part(ref) for ref in refs]


def _forward_kernel(
    schedule: MosaicSchedule,
    shape: Shape,
    biased: bool,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    own: Any,
    ring: Any,
    own_barriers: Any,
    ring_barriers: Any,
) -> None:
    *bias_ref, length_ref, layer_ref, out_ref, lse_ref = refs
    chip, block, h = schedule.chip, schedule.blocks.forward, shape.h
    place = find_program(shape, block.queries, True, length_ref, layer_ref)
    rows = pl.ds(place.start, block.queries)
    columns = pl.ds(place.n * h, h)
    mine = Ring(
        chip, 1, [lambda _: q_ref.at[place.b, rows, columns]], own, own_barriers
    )
    mine.ahead(0, 1)
    first_key, sources = _keys(schedule, shape, place, block, (k_ref, v_ref))
    keys = Ring(chip, block.stages, sources, ring, ring_barriers)
    live = place.prefix + place.valid
    factor = schedule.scale * LOG2E
    size = block.queries, block.keys
    head = lax.div(place.n, schedule.heads)

    def step(j: Any, sums: Any, *, masked: bool) -> Any:
        top, total, acc = sums
        keys.ahead(j, end)
        key = first_key(j)
        if masked:
            # Before the scores take the registers that this needs.
            values, some_dead = keys.get(j, 1), key + block.keys > live
            pl.when(some_dead)(
                lambda: chip.keep_rows(values, lambda row: key + row < live)
            )
        scores = chip.product(q, keys.get(j, 0), trans_b=True) * factor
        if biased:
            here = bias_ref[0].at[place.at, head, pl.ds(key, block.keys)]
            scores += per_column(chip.load(here, 0) * LOG2E, size)
        if masked:
            seen = _visible(chip, place, block, j, key, schedule.group)
            scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(axis=1))
        # A split may hold nothing that an early query sees: no -inf - -inf.
        base = jnp.where(new == -jnp.inf, jnp.zeros_like(new), new)
        p, fade = jnp.exp2(scores - per_row(base, size)), jnp.exp2(top - base)
        values = values if masked else keys.get(j, 1)
        acc *= per_row(fade, (block.queries, h))
        acc = chip.product(p.astype(v_ref.dtype), values, acc)
        return new, total * fade + p.sum(axis=1), acc

    first, full, end = key_range(
        place.prefix,
        place.valid,
        place.start,
        block.queries,
        block.keys,
        group=schedule.group,
        split=(place.z, schedule.splits),
    )
    q = mine.get(0, 0, keys.start(first, end))
    sums = (
        chip.full((block.queries,), -jnp.inf, 1),
        chip.full((block.queries,), 0.0, 1),
        chip.full((block.queries, h), 0.0),
    )
    top, total, acc = masked_loops(step, sums, (first, full, end), (False, True))
    some = total > 0
    out = acc / per_row(jnp.where(some, total, jnp.ones_like(total)), acc.shape)
    lse = (top + jnp.log2(total)) / LOG2E
    if schedule.splits == 1:
        row = place.start + chip.iota(acc.shape, 0)
        valid = place.valid * schedule.group
        out = jnp.where(row < valid, out, jnp.zeros_like(out))
        row = place.start + chip.iota((block.queries,), 0)
        lse = jnp.where(row < valid, lse, jnp.full_like(lse, jnp.inf))
    else:
        lse = jnp.where(some, lse, jnp.full_like(lse, -jnp.inf))
    chip.store(out, out_ref.at[place.b, place.z, rows, columns], q)
    lse_ref[place.b, place.n, place.z, rows] = lse


def _d_q_kernel(
    schedule: MosaicSchedule,
    shape: Shape,
    biased: bool,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    own: Any,
    ring: Any,
    own_barriers: Any,
    ring_barriers: Any,
) -> None:
    *bias_ref, d_out_ref, lse_ref, delta_ref, length_ref, layer_ref, d_q_ref = refs
    chip, block, h = schedule.chip, schedule.blocks.d_q, shape.h
    place = find_program(shape, block.queries, True, length_ref, layer_ref)
    rows = pl.ds(place.start, block.queries)
    at = place.b, rows, pl.ds(place.n * h, h)
    mine = Ring(
        chip, 1, [lambda _: q_ref.at[at], lambda _: d_out_ref.at[at]], own, own_barriers
    )
    mine.ahead(0, 1)
    first_key, sources = _keys(schedule, shape, place, block, (k_ref, v_ref))
    ahead = Ring(chip, block.stages, sources, ring, ring_barriers)
    live = place.prefix + place.valid
    factor = schedule.scale * LOG2E
    size = block.queries, block.keys
    head = lax.div(place.n, schedule.heads)
    # Where the denominator is inf, p is 0.
    lse = chip.load(lse_ref.at[place.b, place.n, rows], 1) * LOG2E
    delta = chip.load(delta_ref.at[place.b, place.n, rows], 1)

    def step(j: Any, d_q: Array, *, masked: bool) -> Array:
        ahead.ahead(j, end)
        keys, key = ahead.get(j, 0), first_key(j)
        if masked:
            some_dead = key + block.keys > live
            pl.when(some_dead)(
                lambda: chip.keep_rows(keys, lambda row: key + row < live)
            )
        scores = chip.product(q, keys, trans_b=True) * factor
        if biased:
            here = bias_ref[0].at[place.at, head, pl.ds(key, block.keys)]
            scores += per_column(chip.load(here, 0) * LOG2E, size)
        p = jnp.exp2(scores - per_row(lse, size))
        d_p = chip.product(d_out, ahead.get(j, 1), trans_b=True)
        d_s = p * (d_p - per_row(delta, size))
        if masked:
            seen = _visible(chip, place, block, j, key, 1)
            d_s = jnp.where(seen, d_s, jnp.zeros_like(d_s))
        return chip.product(d_s.astype(k_ref.dtype), keys, d_q)

    sizes = place.start, block.queries, block.keys
    first, full, end = key_range(place.prefix, place.valid, *sizes)
    copies = ahead.start(first, end)
    q, d_out = (mine.get(0, which, copies) for which in range(2))
    d_q = chip.full((block.queries, h), 0.0)
    d_q = masked_loops(step, d_q, (first, full, end), (False, True))
    d_q *= schedule.scale
    if schedule.ragged:
        row = place.start + chip.iota(d_q.shape, 0)
        d_q = jnp.where(row < place.valid, d_q, jnp.zeros_like(d_q))
    chip.store(d_q, d_q_ref.at[at], q)


def _d_kv_kernel(
    schedule: MosaicSchedule,
    shape: Shape,
    biased: bool,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    own: Any,
    ring: Any,
    own_barriers: Any,
    ring_barriers: Any,
) -> None:
    *bias_ref, d_out_ref, lse_ref, delta_ref, length_ref, layer_ref = refs[:-2]
    d_k_ref, d_v_ref = refs[-2:]
    chip, block, h = schedule.chip, schedule.blocks.d_kv, shape.h
    place = find_program(shape, block.keys, False, length_ref, layer_ref)
    prefix, valid = place.prefix, place.valid
    slots, columns = pl.ds(place.start, block.keys), pl.ds(place.n * h, h)
    sources = [lambda _, x=x: x.at[place.at, slots, columns] for x in (k_ref, v_ref)]
    mine = Ring(chip, 1, sources, own, own_barriers)
    mine.ahead(0, 1)
    sizes = place.start, block.keys, block.queries
    first, _, end = query_range(prefix, valid, *sizes)
    count, factor = end - first, schedule.scale * LOG2E
    size = block.keys, block.queries  # so both products into d_k and d_v take them

    def where(i: Any) -> tuple[Any, Any]:
        """Returns the head and the first query of step i, of any i."""
        i = jnp.maximum(jnp.minimum(i, schedule.heads * count - 1), 0)
        each = jnp.maximum(count, 1)
        head = place.n * schedule.heads + lax.div(i, each)
        start = (first + lax.rem(i, each)) * block.queries
        return head, jnp.minimum(start, shape.t - block.queries)

    def source(ref: Any) -> Any:
        def part(i: Any) -> Any:
            head, start = where(i)
            return ref.at[place.b, pl.ds(start, block.queries), pl.ds(head * h, h)]

        return part

    ahead = Ring(
        chip, block.stages, [source(q_ref), source(d_out_ref)], ring, ring_barriers
    )
    total = schedule.heads * count
    copies = ahead.start(0, total)
    keys, values = (mine.get(0, which, copies) for which in range(2))
    if biased:
        here = bias_ref[0].at[place.at, place.n, slots]
        bias = per_row(chip.load(here, 1) * LOG2E, size)

    def step(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        d_k, d_v = carry
        head, start = where(i)
        ahead.ahead(i, total)
        q, d_out = (ahead.get(i, which) for which in range(2))
        if schedule.ragged:
            invalid = start + block.queries > valid
            for tile in (q, d_out):
                pl.when(invalid)(
                    lambda tile=tile: chip.keep_rows(
                        tile, lambda row: start + row < valid
                    )
                )
        scores = chip.product(keys, q, trans_b=True) * factor
        if biased:
            scores += bias
        rows = pl.ds(start, block.queries)
        lse = chip.load(lse_ref.at[place.b, head, rows], 0) * LOG2E
        delta = chip.load(delta_ref.at[place.b, head, rows], 0)
        slot, row = place.start + chip.iota(size, 0), start + chip.iota(size, 1)
        seen = (slot <= prefix + row) & (row < valid)
        p = jnp.exp2(scores - per_column(lse, size))
        p = jnp.where(seen, p, jnp.zeros_like(p))
        d_v = chip.product(p.astype(v_ref.dtype), d_out, d_v)
        d_p = chip.product(values, d_out, trans_b=True)
        d_s = p * (d_p - per_column(delta, size))
        d_s = jnp.where(seen, d_s, jnp.zeros_like(d_s))
        return chip.product(d_s.astype(q_ref.dtype), q, d_k), d_v

    zeros = chip.full((block.keys, h), 0.0)
    d_k, d_v = lax.fori_loop(0, total, step, (zeros, zeros))
    at = place.b, slots, columns
    chip.store(d_k * schedule.scale, d_k_ref.at[at], keys)
    chip.store(d_v, d_v_ref.at[at], values)
