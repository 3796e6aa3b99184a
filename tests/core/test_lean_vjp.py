"""The lean backward pass against plain reverse mode, over the product of options."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from beacon_jax.attention import IMPLEMENTATIONS, gpu_blocks
from beacon_jax.attention.pallas_gpu import pallas_gpu
from beacon_jax.attention.pallas_tpu import pallas_tpu
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from tests.tiny import tiny

pytestmark = pytest.mark.optimized

N, B, W = 4, 2, 8
MODEL = tiny(
    family="qwen2",
    vocab_size=17,
    intermediate_size=20,
    max_position=128,
    qkv_bias=True,
    beacon=None,
)


def setting(sink, placement, param, tied):
    beacon = BeaconConfig(
        window=W, ratios=(2, 4), sink=sink, placement=placement, param=param
    )
    return dataclasses.replace(MODEL, beacon=beacon, tie_embeddings=tied)


@functools.cache
def variables(config):
    params = nn.unbox(init_variables(config, jax.random.key(0)))["params"]
    params = jax.tree.map(lambda x: 3 * x, params)
    beacon = init_beacon(params, config)
    noise = jax.random.key(1)
    return params, jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(noise, x.shape), beacon
    )


def batch():
    """A row that starts a window later, labels here and there."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 17, (N, B, W)).astype(np.int32)
    labels = np.where(rng.uniform(size=tokens.shape) < 0.7, tokens, -100)
    valid = np.full((N, B), W, np.int32)
    valid[0, 1] = 0
    valid[-1] = [5, 8]
    labels[0, 1] = labels[-1, 0, 5:] = -100
    return {"tokens": tokens, "labels": labels.astype(np.int32), "valid": valid}


# An orthogonal array: every pair of values of any two options occurs.
#  sink  placement      beacon projections     tied   trained  plan          attention
CASES = [
    (0, "interleave", ("q", "k", "v"), False, "beacon", (2, 4, 2, 4), "pallas_gpu"),
    (0, "append", ("q", "k", "v", "o"), True, "all", (4, 0, 2, 2), "reference"),
    (3, "interleave", ("q", "k", "v", "o"), True, "beacon", (0, 4, 4, 2), "blockwise"),
    (3, "append", ("q", "k", "v"), False, "all", (2, 2, 0, 4), "pallas_tpu"),
    (0, "interleave", ("k",), True, "all", (2, 0, 4, 4), "blockwise"),
    (3, "append", ("k",), False, "beacon", (4, 4, 2, 0), "pallas_gpu"),
]


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    """The kernels themselves; by name, on a CPU, they stand for blockwise attention."""
    small = gpu_blocks.Block(16, 16, 4, 1)
    kernels = {
        "pallas_gpu": functools.partial(
            pallas_gpu, blocks=gpu_blocks.GpuBlocks(small, small, small), interpret=True
        ),
        "pallas_tpu": functools.partial(pallas_tpu, interpret=True),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in kernels.items():
            patch.setitem(IMPLEMENTATIONS, name, kernel)
        yield


def loss_and_own(case):
    """train_loss as a function of what the case trains, and that."""
    sink, placement, param, tied, trained, plan, attention = case
    config = setting(sink, placement, param, tied)
    params, beacon = variables(config)

    def loss(own, rows, remat, offload=False):
        return train_loss(
            Net(config, attention=attention),
            own["beacon"],
            {"params": params, **own}["params"],
            rows,
            jnp.asarray(plan),
            LossConfig(ratios=(0, 2, 4), remat=remat, offload=offload),
        )

    own = {"beacon": beacon} | ({"params": params} if trained == "all" else {})
    return loss, own


def named(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)}


@functools.cache
def plain(case):
    loss, own = loss_and_own(case)
    return jax.jit(jax.value_and_grad(lambda own: loss(own, batch(), "window")[0]))(own)


# A case is three or four programs that take ten seconds each to compile.
some = lambda *core: pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=f"{case[0]}-{case[1]}-{case[4]}",
            marks=[] if i in core else pytest.mark.slow,
        )
        for i, case in enumerate(CASES)
    ],
)


@some(2)
def test_the_product_of_options_has_the_bits_of_plain_reverse_mode(case):
    loss, own = loss_and_own(case)
    expected, gradients = plain(case)
    for name, x in named(gradients).items():
        assert np.any(x) or "q_proj" in name or "norm" in name, name
    for remat, offload in (("lean", case[0] > 0), ("lean-layer", case[0] == 0)):
        run = functools.partial(loss, remat=remat, offload=offload)
        gradient = jax.jit(
            jax.value_and_grad(lambda own, run=run: run(own, batch())[0])
        )
        value, ours = gradient(own)
        assert value == expected
        for name, x in named(gradients).items():
            np.testing.assert_array_equal(named(ours)[name], x, err_msg=name)


@some()
def test_the_product_of_options_under_shard_map_has_the_gradients_of_one_device(case):
    """A row per device. Sums over rows are split, so that the last bits may differ."""
    loss, own = loss_and_own(case)
    mesh = jax.make_mesh((B,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, "data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def shared(own, rows):
        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, aux), gradients = gradient(own, rows, "lean", case[0] == 0)
        count = aux["row_count"].sum()
        total = jax.lax.psum(count, "data")
        mean = lambda x: jax.lax.psum(x * count, "data") / total
        return jax.tree.map(mean, (value, gradients))

    value, ours = jax.jit(shared)(own, batch())
    expected, gradients = plain(case)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, x in named(gradients).items():
        scale = float(np.abs(x).max())
        np.testing.assert_allclose(
            named(ours)[name], x, rtol=0, atol=2e-6 * scale, err_msg=name
        )
