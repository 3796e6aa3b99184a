"""Data parallelism: the loss and gradients of the rows, whoever computes them."""

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
from beacon_jax.training.sharding import data_parallel, make_mesh, replicate

N, B, W = 3, 4, 4
MODEL = ModelConfig(
    family="llama",
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position=64,
    eos_ids=(2,),
    bos_ids=(1,),
    beacon=BeaconConfig(window=W, ratios=(2, 4)),
)


def value_and_grad(average):
    loss = lambda trained, frozen, batch, plan: train_loss(
        MODEL, trained["beacon"], frozen["params"], batch, plan, loss_average=average
    )
    return jax.value_and_grad(loss, has_aux=True)


@functools.cache
def inputs():
    variables = nn.unbox(init_variables(MODEL, jax.random.key(0)))
    params = jax.tree.map(lambda x: 5 * x, variables["params"])
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 13, (N, B, W)).astype(np.int32)
    labels = np.where(rng.uniform(size=tokens.shape) < 0.6, tokens, -100)
    valid = np.full((N, B), W, np.int32)
    valid[0, 1] = 0  # rows of unequal length: devices have unequal label counts
    labels[:, 2] = -100
    labels[2, 2, 0] = 5
    batch = {"tokens": tokens, "labels": labels.astype(np.int32), "valid": valid}
    return {"beacon": init_beacon(params, MODEL)}, {"params": params}, batch


def rows_of(batch, part, parts):
    size = B // parts
    return {k: v[:, part * size : (part + 1) * size] for k, v in batch.items()}


@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_device_its_own_plan(devices, average):
    trained, frozen, batch = inputs()
    plans = np.random.default_rng(devices).choice([2, 4], (N, devices)).astype(np.int32)
    mesh = make_mesh(devices, [B])
    parallel = jax.jit(data_parallel(value_and_grad(average), mesh, average))
    (loss, aux), gradients = parallel(*replicate((trained, frozen), mesh), batch, plans)

    total, shares, wanted = 0.0, [], []
    for part in range(devices):
        (own, own_aux), own_gradients = value_and_grad(average)(
            trained, frozen, rows_of(batch, part, devices), plans[:, part]
        )
        count = float(own_aux["row_count"].sum()) if average == "token" else 1.0
        shares.append(count)
        wanted.append((own, own_gradients))
        np.testing.assert_allclose(
            aux["window_loss"][:, part], own_aux["window_loss"], rtol=1e-5, atol=1e-6
        )
    total = sum(shares)
    mean = lambda *parts: sum(s / total * x for s, x in zip(shares, parts, strict=True))
    np.testing.assert_allclose(loss, mean(*(w[0] for w in wanted)), rtol=1e-5)
    expected = jax.tree.map(mean, *(w[1] for w in wanted))
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(y).max()))


def test_one_plan_gives_the_loss_of_one_device():
    trained, frozen, batch = inputs()
    plan = np.asarray([2, 4, 2], np.int32)
    (whole, _), gradients = value_and_grad("token")(trained, frozen, batch, plan)
    mesh = make_mesh(4, [B])
    parallel = jax.jit(data_parallel(value_and_grad("token"), mesh, "token"))
    plans = np.repeat(plan[:, None], 4, axis=1)
    (loss, _), split = parallel(*replicate((trained, frozen), mesh), batch, plans)
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(split), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(y).max()))


def test_the_mesh_takes_what_the_batches_allow():
    assert make_mesh(-1, [8, 4]).size == 4
    assert make_mesh(-1, [16]).size == 8
    assert make_mesh(-1, [3, 8]).size == 1
    with pytest.raises(ValueError, match=r"mesh.data=4 .*batch_size=6.*multiple of 4"):
        make_mesh(4, [8, 6])
    with pytest.raises(ValueError, match=r"mesh.data=99: there are 8 devices"):
        make_mesh(99, [99])
