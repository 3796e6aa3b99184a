"""How the TPU kernels are called: layouts of their operands, block specs, the grid."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from beacon_jax.attention.tpu_blocks import TpuSchedule


def pack(
    schedule: TpuSchedule, heads: int, x: Float[Array, "B T N H"]
) -> Float[Array, "B K R H"]:
    """Packs the queries of each kv head, with zeros behind R = T * G."""
    b, t, n, h = x.shape
    x = jnp.moveaxis(x.reshape(b, t, heads, n // heads, h), 1, 2)
    x = x.reshape(b, heads, -1, h)
    return jnp.pad(x, ((0, 0), (0, 0), (0, schedule.rows - x.shape[2]), (0, 0)))


def unpack(x: Float[Array, "B K R H"], t: int, n: int) -> Float[Array, "B T N H"]:
    """Unpacks what `pack` packed."""
    b, heads, _, h = x.shape
    x = x[:, :, : t * (n // heads)].reshape(b, heads, t, n // heads, h)
    return jnp.moveaxis(x, 2, 1).reshape(b, t, n, h)


def specs(
    schedule: TpuSchedule, h: int, swapped: bool = False
) -> tuple[pl.BlockSpec, ...]:
    """Returns the block specs of q (and its like), k and v, rows and slots of numbers.

    swapped: the last two axes of the grid are.
    """
    heads, none = schedule.heads, pl.squeezed

    def where(args: Any) -> Any:
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

    def q_at(*args: Any) -> Any:
        b, g, i, _, _ = where(args)
        return b, g, i, 0

    def k_at(*args: Any) -> Any:
        b, g, _, j, layer = where(args)
        return (layer, b, j, g, 0) if heads > 1 else (layer, b, j, 0)

    def row_at(*args: Any) -> Any:
        b, g, i, _, _ = where(args)
        return b, g, i

    def scale_at(*args: Any) -> Any:
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


def table_specs(
    schedule: TpuSchedule, h: int, table: Array
) -> tuple[pl.BlockSpec, ...]:
    """Returns the specs of `mean.kernel_tables`: a block's starts, the whole table."""

    def starts_at(b: Any, g: Any, i: Any, j: Any, scalars: Any, layer: Any) -> Any:
        del g, layer
        last = jnp.maximum(schedule.visited(scalars[0, b], scalars[1, b], i) - 1, 0)
        return jnp.minimum(j, last), 0, 0

    return (
        pl.BlockSpec((schedule.keys // schedule.chunk, 2, h), starts_at),
        pl.BlockSpec(table.shape, lambda *_: (0, 0, 0)),
    )


def flat(x: Num[Array, "L B S K H"]) -> Num[Array, "L B S *heads H"]:
    """Drops the axis of one head, K = 1, which would be padded to a tile."""
    return x.reshape(*x.shape[:-2], x.shape[-1]) if x.shape[-2] == 1 else x


def live_blocks(schedule: TpuSchedule, scalars: Int[Array, "2 B"]) -> Int[Array, ""]:
    """Counts the longest row's blocks of keys: the grid's end, known when it runs."""
    prefix, queries = scalars
    length = jnp.max(jnp.where(queries > 0, prefix + queries, 1))
    return lax.div(length + schedule.keys - 1, schedule.keys)


def call(
    schedule: TpuSchedule,
    kernel: Callable,
    name: str,
    grid: tuple[Any, ...],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    scratch: list[tuple[int, ...]],
) -> Any:
    """Makes a function of (scalars, layer, *arrays) that runs the kernel.

    scratch: shapes of float32 arrays that a core keeps.
    """
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
