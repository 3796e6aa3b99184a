"""Meshes: the loss and gradients of the rows, whoever computes them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from beacon_jax.core.train_loss import train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.partition import RULES, Partition
from beacon_jax.training.config import default_config
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.sharding import make_placement, make_value_and_grad, put

N, B, W = 3, 8, 4
MODEL = ModelConfig(
    family="llama",
    vocab_size=14,
    hidden_size=16,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=64,
    eos_ids=(2,),
    bos_ids=(1,),
    beacon=BeaconConfig(window=W, ratios=(2, 4)),
)


def place(data=1, fsdp=1, tensor=1, rules=RULES, rows=(B,)):
    sizes = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    return make_placement(sizes, ConfigDict(rules), rows)


def loss_of(average, remat="lean"):
    def loss(trained, frozen, batch, plan, partition):
        variables = {**frozen, **trained}
        return train_loss(
            MODEL,
            variables["beacon"],
            variables["params"],
            batch,
            plan,
            loss_average=average,
            remat=remat,
            partition=partition,
        )

    return loss


def quick(function):
    """jit; compiling is what these tests cost, and this takes a third off it."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def alone(average, remat="lean"):
    """((loss, aux), gradients) of (trained, frozen, batch, plan) on one device."""
    loss = functools.partial(loss_of(average, remat), partition=None)
    return quick(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def inputs():
    variables = nn.unbox(init_variables(MODEL, jax.random.key(0)))
    # Far from flat, and well conditioned: the last bit of weights moves gradients by
    # 5e-7 of their largest; with 5 in place of 2 by 1.5e-5, more than is allowed below.
    params = jax.tree.map(lambda x: np.asarray(2 * x), variables["params"])
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 13, (N, B, W)).astype(np.int32)
    labels = np.where(rng.uniform(size=tokens.shape) < 0.6, tokens, -100)
    valid = np.full((N, B), W, np.int32)
    valid[0, 1] = 0  # rows of unequal length: devices have unequal label counts
    labels[:, 2] = -100
    labels[2, 2, 0] = 5
    batch = {"tokens": tokens, "labels": labels.astype(np.int32), "valid": valid}
    beacon = jax.tree.map(np.asarray, init_beacon(params, MODEL))
    return {"beacon": beacon, "params": params}, batch


def on_mesh(placement, trained_names, average, plans, parts=1, changed=None, **options):
    """(loss, aux, gradients) computed with everything where the placement wants it."""
    variables, batch = inputs()
    batch = {**batch, **(changed or {})}
    trained = {n: variables[n] for n in trained_names}
    frozen = {n: x for n, x in variables.items() if n not in trained}
    shardings = placement.trained(MODEL, trained)
    run = make_value_and_grad(
        loss_of(average, **options),
        placement,
        shardings,
        average=average,
        parts=parts,
    )
    (loss, aux), gradients = quick(run)(
        jax.tree.map(put, trained, shardings),
        jax.tree.map(put, frozen, placement.frozen(MODEL, frozen)),
        placement.batch(batch),
        placement.plan(plans),
    )
    return loss, aux, gradients


def rows_of(batch, part, parts):
    size = B // parts
    return {k: v[:, part * size : (part + 1) * size] for k, v in batch.items()}


def assert_close(tree, expected):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_every_device_its_own_plan(devices, average):
    variables, batch = inputs()
    plans = np.random.default_rng(devices).choice([2, 4], (N, devices)).astype(np.int32)
    loss, aux, gradients = on_mesh(place(devices), ["beacon"], average, plans)

    shares, wanted = [], []
    for part in range(devices):
        (own, own_aux), own_gradients = alone(average)(
            {"beacon": variables["beacon"]},
            {"params": variables["params"]},
            rows_of(batch, part, devices),
            plans[:, part],
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
    assert_close(gradients, jax.tree.map(mean, *(w[1] for w in wanted)))


@functools.cache
def five_rows(average):
    variables, batch = inputs()
    (loss, _), gradients = alone(average)(
        {"beacon": variables["beacon"]},
        {"params": variables["params"]},
        {name: value[:, :5] for name, value in batch.items()},
        np.asarray([2, 4, 2], np.int32),
    )
    return loss, gradients


@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize("mesh", [(4, 1, 1), (1, 2, 1)], ids=str)
def test_empty_rows_of_a_batch_weigh_nothing(mesh, average):
    """A `pad` batch of five rows: of four devices one has one of them, one has none."""
    _, batch = inputs()
    placement = place(*mesh)
    plans = np.repeat([[2], [4], [2]], placement.plans, axis=1).astype(np.int32)
    valid = np.where(np.arange(B) < 5, batch["valid"], 0)
    labels = np.where(np.arange(B)[:, None] < 5, batch["labels"], -100)
    changed = {"valid": valid, "labels": labels}
    loss, _, gradients = on_mesh(placement, ["beacon"], average, plans, changed=changed)
    wanted, expected = five_rows(average)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(gradients, expected)


@functools.cache
def one_device(trained):
    variables, batch = inputs()
    plan = np.asarray([2, 4, 2], np.int32)
    chosen = {n: variables[n] for n in trained}
    rest = {n: x for n, x in variables.items() if n not in trained}
    (loss, _), gradients = alone("token", "none")(chosen, rest, batch, plan)
    return loss, gradients


@pytest.mark.parametrize("trained", [("beacon",), ("params", "beacon")])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(mesh, trained):
    placement = place(*mesh)
    plans = np.repeat(np.asarray([[2], [4], [2]], np.int32), placement.plans, axis=1)
    loss, _, gradients = on_mesh(placement, trained, "token", plans)
    wanted, expected = one_device(trained)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(gradients, expected)


@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 1, 1), (1, 2, 2)], ids=str)
def test_accumulated_parts_give_the_gradients_of_the_whole_batch(mesh, average):
    placement = place(*mesh)
    plan = np.asarray([[2], [4], [2]], np.int32)
    repeat = lambda n: np.repeat(plan, n, axis=1)
    whole = on_mesh(placement, ["beacon"], average, repeat(placement.plans))
    parts = on_mesh(
        placement, ["beacon"], average, repeat(4 * placement.plans), parts=4
    )
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    assert_close(parts[2], whole[2])
    assert parts[1]["window_loss"].shape == (N, 4 * placement.plans)
    sums = [aux["window_loss"].sum(1) for aux in (parts[1], whole[1])]
    np.testing.assert_allclose(*sums, rtol=1e-5)


def test_the_optimizers_state_is_split_and_nothing_frozen_has_one():
    variables, _ = inputs()
    trained = {"beacon": variables["beacon"]}
    optimizer = make_optimizer(default_config().optimizer, 10)
    state = jax.eval_shape(optimizer.init, trained)
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        placement = place(*sizes)
        where = placement.optimizer(state, placement.trained(MODEL, trained))
        sharded = jax.jit(optimizer.init, out_shardings=where)(trained)
        kernels = [x for x in jax.tree.leaves(sharded) if x.ndim > 1]
        assert len(kernels) == 2 * len(jax.tree.leaves(trained))
        split = sizes[1] * sizes[2] if sizes[1] > 1 else 8
        for x in kernels:
            share = x.addressable_shards[0].data.size / x.size
            assert share == 1 / (split if x.shape[0] > 1 else max(sizes[:2]))


def test_parameters_are_split_over_fsdp_and_tensor():
    variables, _ = inputs()
    placement = place(1, 4, 2)
    where = placement.frozen(MODEL, {"params": variables["params"]})
    q = where["params"]["layers"]["attention"]["q_proj"]["kernel"]
    assert tuple(q.spec) == (None, "fsdp", "tensor", None)
    assert tuple(where["params"]["embed"]["embedding"].spec) == ("tensor", "fsdp")


def test_the_mesh_takes_what_the_batches_allow():
    shape = lambda *sizes, rows: tuple(place(*sizes, rows=rows).mesh.shape.values())
    assert shape(-1, rows=[8, 4]) == (4, 1, 1)
    assert shape(-1, rows=[16]) == (8, 1, 1)
    assert shape(-1, rows=[3, 8]) == (1, 1, 1)
    assert shape(1, -1, 2, rows=[16]) == (1, 4, 2)
    assert shape(2, 2, -1, rows=[16]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "rows", "message"),
    [
        ((4,), [8, 6], r"mesh.data=4 .*batch_size=6.*multiple of 4"),
        ((2, 4), [4], r"mesh.fsdp=4 .*batch_size=4.*multiple of 8"),
        ((99,), [99], r"needs 99 devices, there are 8"),
        ((-1, -1), [8], r"two axes of -1"),
        ((0,), [8], r"mesh.data=0 must be"),
    ],
)
def test_meshes_that_do_not_fit_name_the_axis(sizes, rows, message):
    with pytest.raises(ValueError, match=message):
        place(*sizes, rows=rows)


def test_rules_that_collide_or_do_not_divide_name_both_axes():
    variables, _ = inputs()
    params = {"params": variables["params"]}
    with pytest.raises(ValueError, match=r"o_proj.*'heads' and 'embed' .*'fsdp'"):
        place(1, 2, rules={**RULES, "heads": "fsdp"}).frozen(MODEL, params)
    with pytest.raises(ValueError, match=r"embedding.*'vocab' has size 14.*tensor=8"):
        place(1, 1, 8).frozen(MODEL, params)
    whole = {**RULES, "vocab": ()}
    with pytest.raises(ValueError, match=r"k_proj.*'kv_heads' has size 2.*tensor=8"):
        place(1, 1, 8, rules=whole).frozen(MODEL, params)
    with pytest.raises(ValueError, match=r"rule 'mlp' names .*'pipe'"):
        place(rules={**RULES, "mlp": "pipe"})


def test_a_partition_is_the_same_for_equal_meshes_and_rules():
    """It is a static argument: equal ones must not compile again."""
    a, b = place(2, 2, 2).partition, place(2, 2, 2).partition
    assert a == b and hash(a) == hash(b) and isinstance(a, Partition)
