"""Decoding over a long memory as a Mosaic kernel for GPU: Flash-Decoding.

The forward kernel of `mosaic_gpu`, with two changes: the query heads of a kv head are
rows of one program, r = t * G + g, so that each key is read once; and each row's live
slots are split evenly over `splits` programs, whose results `decode.combine` puts
together (https://pytorch.org/blog/flash-decoding, 2023). A program multiplies 64 rows
however few are there: with 64 FLOPs for each byte it reads, memory stays what it waits
for.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from beacon_jax.attention.decode import combine
from beacon_jax.attention.device import Target
from beacon_jax.attention.gpu_passes import (
    check_few,
    check_scale,
    enough_splits,
    in_xla,
)
from beacon_jax.attention.mosaic_gpu import (
    MosaicSchedule,
    attend_splits,
    choose,
    mosaic_gpu,
    whole_blocks,
)
from beacon_jax.attention.shared import (
    Layer,
    attend_by,
    lowered,
    row_lengths,
    stacked,
    zero_invalid,
)


def decode_mosaic_gpu(
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
    splits: int | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` for at most 128 queries by a Mosaic kernel.

    A program that is lowered for another platform than CUDA computes the same
    blockwise. The gradient is that of `mosaic_gpu`.

    Args:
      splits: programs that share one row's slots; None: enough to fill a GPU.
      options: blocks, chip and interpret, as `mosaic_gpu` takes them.

    Raises:
      NotImplementedError: more queries, or what `mosaic_gpu` raises.
    """
    b, t, n, _ = q.shape
    check_few(t)
    given = options.get("chip"), options.get("blocks")
    chip, blocks = choose(q, k, v, target, bias, *given)
    check_scale(scale)
    s, heads = k.shape[-3:-1]
    block = blocks.decode or blocks.forward
    programs = b * heads * pl.cdiv(t * (n // heads), block.queries)
    schedule = MosaicSchedule(
        float(scale),
        heads=1,
        ragged=queries is not None,
        blocks=blocks._replace(forward=block),
        chip=chip,
        interpret=options.get("interpret", False),
        group=n // heads,
        splits=splits or enough_splits(programs, pl.cdiv(s, block.keys)),
    )
    lengths = row_lengths(prefix, queries, t, -1)
    layer, k, v, bias = stacked(layer, k, v, bias)
    value = functools.partial(_decode, schedule)
    gradient = functools.partial(_prefill, float(scale), target, options)
    out: Any = attend_by(value, gradient, q, k, v, lengths, layer, bias)
    return zero_invalid(out, queries)


def _decode(schedule: MosaicSchedule, *given: Any) -> Float[Array, "B T N H"]:
    """Attends: (q, k, v, lengths, layer, bias)."""
    kernel = functools.partial(forward, schedule)
    elsewhere = lambda *given: in_xla(schedule.scale, *given)[0]
    return lowered("cuda", schedule.interpret, kernel, elsewhere, *given)


def _prefill(
    scale: float,
    target: Target | None,
    options: dict[str, Any],
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    layer: Array,
    bias: Array | None,
) -> Float[Array, "B T N H"]:
    """Attends by the kernels of `mosaic_gpu`, which have a gradient."""
    size: dict[str, Any] = {"scale": scale, "target": target, "layer": layer}
    size |= {"queries": lengths[:, 1], "bias": bias}
    return mosaic_gpu(q, k, v, lengths[:, 0], **size, **options)


def forward(
    schedule: MosaicSchedule,
    q: Float[Array, "B T N H"],
    k: Float[Array, "L B S K H"],
    v: Float[Array, "L B S K H"],
    lengths: Int[Array, "B 2"],
    layer: Int[Array, ""],
    bias: Float[Array, "L B K S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Runs the kernel and combines what the splits of a row found."""
    b, t, n, h = q.shape
    heads, group = k.shape[3], schedule.group
    rows = jnp.moveaxis(q.reshape(b, t, heads, group, h), 2, 3)
    rows = rows.reshape(b, t * group, heads, h)
    rows = whole_blocks(rows, schedule.blocks.forward.queries)
    out, lse = attend_splits(schedule, rows, k, v, lengths, layer, bias)
    if schedule.splits == 1:
        out = out[:, 0]
    else:
        out = jnp.moveaxis(combine(jnp.moveaxis(out, 3, 1), lse), 1, 2)
    out = out[:, : t * group].reshape(b, t, group, heads, h)
    return jnp.moveaxis(out, 3, 2).reshape(b, t, n, h).astype(q.dtype)
