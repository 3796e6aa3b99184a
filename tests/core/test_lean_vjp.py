"""The lean backward pass against plain reverse mode, over the product of options."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.train_loss import train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import init_variables

N, B, W = 4, 2, 8
MODEL = ModelConfig(
    family="qwen2",
    vocab_size=17,
    hidden_size=16,
    intermediate_size=20,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=128,
    eos_ids=(2,),
    bos_ids=(1,),
    qkv_bias=True,
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
#        sink  placement      beacon projections     tied   trained  plan
CASES = [
    (0, "interleave", ("q", "k", "v"), False, "beacon", (2, 4, 2, 4)),
    (0, "append", ("q", "k", "v", "o"), True, "all", (4, 0, 2, 2)),
    (3, "interleave", ("q", "k", "v", "o"), True, "beacon", (0, 4, 4, 2)),
    (3, "append", ("q", "k", "v"), False, "all", (2, 2, 0, 4)),
    (0, "interleave", ("k",), True, "all", (2, 0, 4, 4)),
    (3, "append", ("k",), False, "beacon", (4, 4, 2, 0)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[4]}")
def test_the_product_of_options_has_the_bits_of_plain_reverse_mode(case):
    sink, placement, param, tied, trained, plan = case
    config = setting(sink, placement, param, tied)
    params, beacon = variables(config)

    def loss(own, remat):
        return train_loss(
            config,
            own["beacon"],
            {"params": params, **own}["params"],
            batch(),
            jnp.asarray(plan),
            ratios=(0, 2, 4),
            remat=remat,
        )[0]

    own = {"beacon": beacon} | ({"params": params} if trained == "all" else {})
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, plain = gradient(own, "window")
    for remat in ("lean", "lean-layer"):
        value, ours = gradient(own, remat)
        assert value == expected
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(ours),
            jax.tree.leaves(plain),
            strict=True,
        )
        for (path, x), y in pairs:
            scale, name = float(np.abs(y).max()), jax.tree_util.keystr(path)
            assert scale > 0 or "q_proj" in name or "norm" in name, name
            np.testing.assert_array_equal(x, y, err_msg=name)
