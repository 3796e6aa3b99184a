"""What programs send between devices, counted in their HLO."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from beacon_jax.bench.hlo import sent
from beacon_jax.model.partition import make_partition

MESH = make_partition("tensor:4").mesh


def compiled(f, *shapes):
    run = jax.shard_map(f, mesh=MESH, in_specs=P(), out_specs=P(), check_vma=False)
    given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return jax.jit(run).lower(*given).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def f(x):
        step = lambda x, _: (lax.psum(x * 0.5, "tensor"), None)
        return lax.scan(lambda x, _: lax.scan(step, x, None, 5), x, None, 3)[0]

    found = sent(compiled(f, (8, 2)))
    assert found.counts == {"all-reduce": 15} and found.loops
    assert found.bytes == {"all-reduce": 15 * 8 * 2 * 4}


def test_of_a_conditional_the_largest_branch_counts():
    def f(x):
        one = lambda x: lax.psum(x, "tensor")
        three = lambda x: one(one(one(x) * 2) * 2)
        return lax.switch(x[0, 0].astype(int), [lambda x: x, three, one], x)

    assert sent(compiled(f, (4, 4))).counts == {"all-reduce": 3}


def test_other_kinds_are_told_apart():
    def f(x):
        ring = [(i, (i + 1) % 4) for i in range(4)]
        x = lax.ppermute(x, "tensor", ring)
        return lax.all_gather(x, "tensor").sum(0)

    found = sent(compiled(f, (4, 4)))
    assert found.counts == {"collective-permute": 1, "all-gather": 1}
    assert found.bytes["collective-permute"] == 64
    assert found.bytes["all-gather"] == 256


def test_a_loop_of_unknown_length_is_told():
    def f(x):
        body = lambda x: lax.psum(x, "tensor") * 0.1
        return lax.while_loop(lambda x: x.sum() > 1, body, x)

    assert not sent(compiled(f, (4,))).loops
    with pytest.raises(ValueError, match="no ENTRY"):
        sent("nothing")


def test_the_cost_of_a_mesh_is_that_of_its_windows():
    from beacon_jax.bench import stages
    from beacon_jax.model.presets import get_preset

    preset = get_preset(stages.PRESET)
    beacon = dataclasses.replace(preset.beacon, window=32, ratios=(stages.RATIO,))
    small = dataclasses.replace(
        preset,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        beacon=beacon,
    )
    tensor, stage = (stages.cost(small, x, jax.devices()) for x in ("tensor", "stage"))
    assert stage.count == 1  # hidden states of 36 entries; CPUs send bfloat16 as floats
    assert stage.bytes == 36 * 64 * 4
    # Two sums a layer and one of the embedding; the largest is of the window's entries.
    assert tensor.count == 2 * 8 + 1
    assert tensor.bytes == pytest.approx(2 * 7 / 8 * (16 * 36 + 32) * 64 * 4)
    told = stages.predict(small, 32 * 100, "A100 80GB", tensor, stage)
    ticks, wire = 107, stage.bytes / 300e9 + stages.LATENCY
    assert told["stage_s"] == pytest.approx(
        told["products_s"] * ticks / 100 + ticks * wire
    )
    assert told["tensor_s"] > told["products_s"]
    assert np.isclose(told["speed_up"], told["tensor_s"] / told["stage_s"])
