"""Meshes: the loss and gradients of the rows, whoever computes them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from beacon_jax.model.partition import RULES, Partition
from beacon_jax.training.config import default_config
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.sharding import make_placement, make_value_and_grad, put
from tests.tiny import tiny

N, B, W = 3, 8, 4
MODEL = tiny(
    vocab_size=14,
    intermediate_size=12,
    max_position=64,
    beacon=BeaconConfig(window=W, ratios=(2, 4)),
)


def place(data=1, fsdp=1, tensor=1, stage=1, rules=RULES, rows=(B,)):
    sizes = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor, "stage": stage})
    return make_placement(sizes, ConfigDict(rules), rows)


def loss_of(average, remat="lean", **others):
    def loss(trained, frozen, batch, plan, partition):
        variables = {**frozen, **trained}
        return train_loss(
            Net(MODEL, partition=partition),
            variables["beacon"],
            variables["params"],
            batch,
            plan,
            LossConfig(average=average, remat=remat, **others),
        )

    return loss


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


# --- what is expected: every row alone, on one device, by plain reverse mode ---------


@functools.cache
def alone():
    """((loss, aux), gradients) of a row: one program for all that is expected here."""
    loss = functools.partial(loss_of("token", "none"), partition=None)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def row_alone(row, plan):
    """(loss, label count, sum of losses per window [N], gradients) of one row."""
    variables, batch = inputs()
    rows = {name: value[:, row : row + 1] for name, value in batch.items()}
    plan = np.asarray(plan, np.int32)
    (loss, aux), gradients = alone()(variables, {}, rows, plan)
    return loss, float(aux["row_count"][0]), aux["window_loss"], gradients


def expected(average, plans, rows=B):
    """(loss, window losses [N, rows], gradients) of the batch's first rows.

    plans: [N, P], of as many rows of the batch each.
    """
    plans = np.repeat(plans, B // plans.shape[1], axis=1)
    found = [row_alone(r, tuple(plans[:, r].tolist())) for r in range(rows)]
    losses, counts, windows, gradients = zip(*found, strict=True)
    shares = np.asarray(counts) if average == "token" else np.ones(rows)
    shares = shares / shares.sum()
    mean = lambda *parts: sum(s * x for s, x in zip(shares, parts, strict=True))
    return mean(*losses), np.stack(windows, 1), jax.tree.map(mean, *gradients)


# --- what is tested: programs of a mesh, compiled once for all tests -----------------


@functools.cache
def on(mesh, trained_names, average, parts, **others):
    placement, (variables, _) = place(*mesh), inputs()
    trained = {name: variables[name] for name in trained_names}
    frozen = {n: x for n, x in variables.items() if n not in trained}
    shardings = placement.trained(MODEL, trained)
    run = jax.jit(
        make_value_and_grad(
            loss_of(average, **others),
            placement,
            shardings,
            average=average,
            parts=parts,
        )
    )
    trained = jax.tree.map(put, trained, shardings)
    frozen = jax.tree.map(put, frozen, placement.frozen(MODEL, frozen))
    return placement, functools.partial(run, trained, frozen)


def on_mesh(mesh, trained_names, average, plans, parts=1, changed=None):
    """(loss, aux, gradients) computed with everything where the placement wants it."""
    placement, run = on(mesh, trained_names, average, parts)
    batch = {**inputs()[1], **(changed or {})}
    (loss, aux), gradients = run(placement.batch(batch), placement.plan(plans))
    return loss, aux, gradients


def assert_close(tree, expected):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(y).max()))


def chosen(gradients, names):
    return {name: gradients[name] for name in names}


BEACON, BOTH = ("beacon",), ("params", "beacon")
PLAN = np.asarray([[2], [4], [2]], np.int32)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("devices", "average"),
    [
        pytest.param(8, "token", marks=slow),
        pytest.param(1, "row", marks=slow),
        pytest.param(4, "row", marks=slow),
        pytest.param(1, "token", marks=slow),
        pytest.param(4, "token", marks=slow),
        pytest.param(8, "row", marks=slow),
    ],
)
def test_every_device_its_own_plan(devices, average):
    plans = np.random.default_rng(devices).choice([2, 4], (N, devices)).astype(np.int32)
    loss, aux, gradients = on_mesh((devices, 1, 1), BEACON, average, plans)
    wanted, windows, theirs = expected(average, plans)
    windows = windows.reshape(N, devices, -1).sum(-1)
    np.testing.assert_allclose(aux["window_loss"], windows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(gradients, chosen(theirs, BEACON))


@pytest.mark.parametrize(
    ("mesh", "average"),
    [
        pytest.param((4, 1, 1), "row", marks=slow),
        pytest.param((4, 1, 1), "token", marks=slow),
        pytest.param((1, 2, 2), "row", marks=slow),
        pytest.param((1, 2, 2), "token", marks=slow),
    ],
    ids=str,
)
def test_empty_rows_of_a_batch_weigh_nothing(mesh, average):
    """A `pad` batch of five rows: of four devices one has one of them, one has none."""
    _, batch = inputs()
    plans = np.repeat(PLAN, place(*mesh).plans, axis=1)
    valid = np.where(np.arange(B) < 5, batch["valid"], 0)
    labels = np.where(np.arange(B)[:, None] < 5, batch["labels"], -100)
    changed = {"valid": valid, "labels": labels}
    loss, _, gradients = on_mesh(mesh, BEACON, average, plans, changed=changed)
    wanted, _, theirs = expected(average, PLAN, rows=5)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(gradients, chosen(theirs, BEACON))


@pytest.mark.parametrize(
    ("mesh", "trained"),
    [
        ((8, 1, 1), BEACON),
        pytest.param((2, 2, 2), BOTH, marks=slow),
        pytest.param((8, 1, 1), BOTH, marks=slow),
        pytest.param((1, 8, 1), BEACON, marks=slow),
        pytest.param((1, 8, 1), BOTH, marks=slow),
        pytest.param((2, 2, 2), BEACON, marks=slow),
        pytest.param((1, 4, 2), BEACON, marks=slow),
        pytest.param((1, 4, 2), BOTH, marks=slow),
        pytest.param((2, 1, 1, 2), BEACON, marks=slow),
        pytest.param((1, 1, 1, 2), BOTH, marks=slow),
        pytest.param((2, 1, 2, 2), BOTH, marks=slow),
        pytest.param((1, 2, 1, 2), BOTH, marks=slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_loss_and_gradients_of_one_device(mesh, trained):
    plans = np.repeat(PLAN, place(*mesh).plans, axis=1)
    loss, _, gradients = on_mesh(mesh, trained, "token", plans)
    wanted, _, theirs = expected("token", PLAN)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(gradients, chosen(theirs, trained))


@slow
@pytest.mark.parametrize("average", ["token", "row"])
@pytest.mark.parametrize(
    ("mesh", "parts"),
    [((1, 1, 1), 4), ((4, 1, 1), 2), ((1, 2, 2), 4), ((2, 1, 1, 2), 2)],
    ids=str,
)
def test_accumulated_parts_give_the_gradients_of_the_whole_batch(mesh, average, parts):
    pieces = parts * place(*mesh).plans
    plans = np.repeat(PLAN, pieces, axis=1)
    loss, aux, gradients = on_mesh(mesh, BEACON, average, plans, parts=parts)
    wanted, windows, theirs = expected(average, PLAN)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    assert_close(gradients, chosen(theirs, BEACON))
    assert aux["window_loss"].shape == (N, pieces)
    np.testing.assert_allclose(aux["window_loss"].sum(1), windows.sum(1), rtol=1e-5)


@slow
@pytest.mark.parametrize("average", ["token", "row"])
def test_attention_is_compared_alike_on_any_mesh(average):
    """And in parts: devices and parts have their own rows, with unequal weights."""
    others = {"attention_weight": 2.0, "attention_queries": 2}
    found = []
    for mesh, parts in ((1, 1, 1), 1), ((2, 2, 2), 2), ((1, 4, 2), 1):
        placement, run = on(mesh, BEACON, average, parts, **others)
        plans = np.repeat(PLAN, parts * placement.plans, axis=1)
        (loss, _), gradients = run(placement.batch(inputs()[1]), placement.plan(plans))
        found.append((loss, gradients))
    plain, _, _ = on_mesh((1, 1, 1), BEACON, average, PLAN)
    assert found[0][0] > plain + 0.1
    for loss, gradients in found[1:]:
        np.testing.assert_allclose(loss, found[0][0], rtol=1e-5)
        assert_close(gradients, found[0][1])


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
    assert shape(-1, rows=[8, 4]) == (4, 1, 1, 1)
    assert shape(-1, rows=[16]) == (8, 1, 1, 1)
    assert shape(-1, rows=[3, 8]) == (1, 1, 1, 1)
    assert shape(1, -1, 2, rows=[16]) == (1, 4, 2, 1)
    assert shape(2, 2, -1, rows=[16]) == (2, 2, 2, 1)
    assert shape(2, 1, 1, -1, rows=[16]) == (2, 1, 1, 4)


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
