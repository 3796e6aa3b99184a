"""What the estimate of a step's memory says of the norms of queries and keys."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.decoder import Layer, init_variables, place_of
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.training.memory import _activations
from tests.tiny import tiny

LAYOUT = Layout(8, 8, 1)


def kept(config, dtype):
    """Bytes per entry of a window that the backward pass of a layer keeps."""
    shaped = lambda shape: jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(
        lambda: nn.unbox(init_variables(config, jax.random.key(0)))
    )
    of_layer = {
        name: jax.tree.map(lambda x: shaped(x.shape[1:]), tree["layers"])
        for name, tree in variables.items()
    }
    layer = Layer(Net(config, dtype, attention="reference"), LAYOUT, (), True)

    def pull(params, beacon, x, k, v):
        def run(beacon, x, k, v):
            own = {"params": params, "beacon": beacon}
            place = place_of(config, LAYOUT, jnp.zeros((1,), jnp.int32))
            return layer.apply(own, x, k, v, place)[:2]

        return jax.vjp(run, beacon, x, k, v)[1]

    x = shaped((1, LAYOUT.length, config.hidden_size))
    buffer = shaped((1, 128, config.num_kv_heads, config.head_dim))
    found = jax.eval_shape(
        pull, of_layer["params"], of_layer["beacon"], x, buffer, buffer
    )
    entries = [y for y in jax.tree.leaves(found) if LAYOUT.length in y.shape]
    return sum(math.prod(y.shape) * y.dtype.itemsize for y in entries) / LAYOUT.length


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_norms_of_queries_and_keys_keep_what_the_estimate_says(dtype):
    beacon = BeaconConfig(window=64, ratios=(8,))
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "beacon": beacon}
    llama, qwen3 = (tiny(family=name, **sizes) for name in ("llama", "qwen3"))
    measured = kept(qwen3, dtype) - kept(llama, dtype)
    size = jnp.dtype(dtype).itemsize
    estimated = _activations(qwen3, size) - _activations(llama, size)
    assert measured == pytest.approx(estimated, rel=0.05)
