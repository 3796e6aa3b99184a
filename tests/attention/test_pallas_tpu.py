"""What is particular to the Mosaic kernels: many blocks, races, the schedule.

`test_prefix_attention` holds them to what every implementation promises.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from beacon_jax.attention.decode_tpu import decode_tpu
from beacon_jax.attention.device import default_target
from beacon_jax.attention.mean import mean_term
from beacon_jax.attention.pallas_tpu import pallas_tpu
from beacon_jax.attention.reference import reference
from beacon_jax.attention.tpu_blocks import (
    CHIPS,
    DEFAULT,
    TpuBlocks,
    chip_blocks,
    make_schedule,
    visited_blocks,
)

# For two heads: 128 queries, 256 keys per block, in two chunks.
MANY = TpuBlocks(512, 1024, 2**24, scores=1)


def arrays(t, n, kv, h, s, rows):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, t, n, h), *[(rows, s, kv, h)] * 2, (rows, t, n, h)]
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape) for key, shape in pairs]


def bias_of(rows, kv, s):
    return 3 * jax.random.normal(jax.random.key(7), (rows, kv, s))


@pytest.mark.parametrize("biased", [False, True])
def test_many_blocks_and_chunks_are_one_attention(biased):
    """300 slots in blocks of 256, 210 rows of queries in blocks of 128."""
    q, k, v, d_out = arrays(70, 6, 2, 16, 300, 3)
    prefix, queries = jnp.asarray([3, 230, 150]), jnp.asarray([70, 70, 33])
    schedule = make_schedule(q, k, 1.0, MANY)
    assert (schedule.queries, schedule.keys, schedule.chunk) == (128, 256, 128)
    dead = (jnp.arange(300) >= (prefix + 70)[:, None])[..., None, None]
    bias = bias_of(3, 2, 300) if biased else None

    def both(attend, *x):
        run = lambda *x: attend(*x, prefix, scale=0.25, queries=queries, bias=bias)
        out, pull = jax.vjp(run, *x)
        return out, *pull(d_out)

    attend = functools.partial(pallas_tpu, blocks=MANY, interpret=True)
    poisoned = (jnp.where(dead, jnp.nan, x) for x in (k, v))
    ours = jax.jit(functools.partial(both, attend))(q, *poisoned)
    with jax.default_matmul_precision("highest"):
        theirs = jax.jit(functools.partial(both, reference))(q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).max() <= 5e-6 * np.abs(b).max()


@pytest.mark.parametrize(
    "kernel", ["backward", "int8", "mean", "mean bias", "decode", "decode bias"]
)
def test_no_kernel_races_and_the_grid_ends_with_the_longest_row(kernel):
    """`backward` runs the forward kernel too. Memory for 1024 slots, of which 5 and 205
    are live: two blocks of 128 of eight."""
    points = []

    def record(token, point, core):
        del core
        points.append(point)
        return token

    simulate = pltpu.InterpretParams(detect_races=True, grid_point_recorder=record)
    blocks = TpuBlocks(256, 256, 2**24)
    q, k, v, d_out = arrays(5, 4, 2, 16, 1024, 2)
    prefix = jnp.asarray([0, 200])
    kernel, *biased = kernel.split()
    attend = decode_tpu if kernel == "decode" else pallas_tpu
    scales = {"bias": bias_of(2, 2, 1024)} if biased else {}
    if kernel in ("int8", "mean"):
        k, v = (jnp.round(x * 40).astype(jnp.int8) for x in (k, v))
        scales |= dict.fromkeys(("k_scale", "v_scale"), jnp.full((2, 2, 1024), 1 / 40))
    if kernel == "mean":
        frequencies = np.geomspace(1, 1e-4, 8)
        scales["mean"] = mean_term(q, jnp.ones((2, 2, 16)), frequencies)
    run = functools.partial(
        attend, scale=0.25, blocks=blocks, interpret=simulate, **scales
    )
    run = functools.partial(lambda *x, run: run(*x, prefix), run=run)
    if kernel == "backward":
        out, pull = jax.vjp(run, q, k, v)
        gradients = pull(d_out)
        assert all(np.isfinite(x).all() and x.any() for x in gradients)
    else:
        out = run(q, k, v)
    jax.block_until_ready(out)
    assert interpreter.races is not None and not interpreter.races.races_found
    assert np.isfinite(out).all()
    # Rows x blocks of heads x blocks of queries x live blocks; d_kv covers all eight.
    live = 2 * 1 * 1 * 2
    assert len(points) == (2 * live + 2 * 8 if kernel == "backward" else live)


@pytest.mark.parametrize("chip", [DEFAULT, *CHIPS.values()])
def test_a_row_costs_its_own_live_blocks_whatever_the_capacity(chip):
    t, group = 1536, 7
    prefix = np.asarray([0, 5, 1000, 16384 - t])
    counts = []
    for slots in (16384, 2**20):
        q = jax.ShapeDtypeStruct((4, t, 4 * group, 128), jnp.bfloat16)
        k = jax.ShapeDtypeStruct((4, slots, 4, 128), jnp.bfloat16)
        schedule = make_schedule(q, k, 1.0, chip)
        counts.append(visited_blocks(schedule, prefix, np.full(4, t)))
        ends = range(schedule.queries, schedule.rows + 1, schedule.queries)
        last = [(min(end, t * group) - 1) // group for end in ends]
        expected = sum((prefix + i) // schedule.keys + 1 for i in last)
        np.testing.assert_array_equal(counts[-1], expected)
    np.testing.assert_array_equal(*counts)
    assert not visited_blocks(schedule, prefix, np.zeros(4, int)).any()


def test_an_unknown_chip_gets_the_smallest_blocks():
    assert chip_blocks(default_target()) == DEFAULT == min(CHIPS.values())
