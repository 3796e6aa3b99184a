"""Layers in stages: windows in a pipeline give what one device gives, bit by bit."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed, feed_jit
from beacon_jax.core.law import Law
from beacon_jax.core.memory import init_memory
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.inference import leaves
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.decoder import init_variables, variable_axes
from beacon_jax.model.net import Net
from beacon_jax.model.partition import make_partition
from tests.tiny import TINY, W, tiny

RATIOS = (0, 2, 4)
PLANS = {
    "one": np.array([4], np.int32),
    "mixed": np.array([2, 0, 4, 4, 2], np.int32),
}
ROOM = 128


def config(placement="interleave", layers=8):
    beacon = dataclasses.replace(TINY.beacon, placement=placement, sink=1)
    return tiny(num_layers=layers, vocab_size=32, beacon=beacon)


@functools.cache
def variables(model):
    v = nn.unbox(init_variables(model, jax.random.key(0)))
    v["params"] = jax.tree.map(lambda x: 3 * x, v["params"])
    keys = iter(jax.random.split(jax.random.key(1), 100))
    v["beacon"] = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape),
        init_beacon(v["params"], model),
    )
    return v


def split(model, mesh):
    """The net and the variables on a mesh; on one device without."""
    if mesh is None:
        return Net(model), variables(model)
    partition = make_partition(mesh)
    place = lambda axes, x: jax.device_put(x, partition.sharding(axes, x.shape))
    is_axes = lambda x: isinstance(x, tuple)
    axes = variable_axes(model)
    moved = jax.tree.map(place, axes, variables(model), is_leaf=is_axes)
    return Net(model, partition=partition), moved


def empty(net, rows, dtype, biased=False):
    memory = init_memory(net.config, rows, ROOM, dtype, biased=biased)
    if net.partition is None:
        return memory
    return jax.device_put(memory, leaves.shardings(net.partition, memory))


def tokens(rows, length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(3, 31, (rows, length)).astype(np.int32)


def read(model, mesh, rows=2, dtype="float32", outputs="last", plan="mixed", **more):
    """Three texts in turn, the second of another length per row, and two tokens."""
    net, v = split(model, mesh)
    memory, found = empty(net, rows, dtype, more.get("biased", False)), []
    for seed, length in enumerate((3 * W + 3, 2 * W, 5)):
        ids = tokens(rows, length, seed)
        lengths = np.maximum(length - np.arange(rows) * (W + 1) * (seed == 1), 0)
        given = (net, v, memory, ids, lengths, PLANS[plan])
        labels = np.roll(ids, -1, axis=1)
        out, memory = feed(*given, outputs=outputs, labels=labels)
        live = np.arange(length) < lengths[:, None]
        each = [x for x in jax.tree.leaves(out[1:])]
        found += [out.last_logits, *(np.asarray(x)[live] for x in each)]
    for token in (7, 9):
        ids = np.full(rows, token, np.int32)
        given = (net, v, memory, ids, PLANS[plan])
        logits, memory = decode_step(*given, static=RATIOS)
        found.append(logits)
    used = np.asarray(Law.of(model).entries(memory.ratio, memory.raw))
    used = used + np.asarray(memory.slots)
    slots = np.arange(ROOM) < used[:, None]
    for leaf in jax.tree.leaves((memory.k, memory.v)):
        leaf = np.asarray(leaf)
        if leaf.ndim == 5:
            leaf = leaf[:, slots]
        found.append(leaf)
    found += [memory.slots, memory.sinks, memory.raw, memory.ratio, memory.windows]
    return [np.asarray(x) for x in found]


def same(one, other, exact=True):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            size = max(np.abs(a).max(initial=0), 1)
            np.testing.assert_allclose(a, b, atol=2e-5 * size)


@pytest.mark.parametrize(
    ("mesh", "outputs"),
    [
        pytest.param("stage:8", "likely", marks=pytest.mark.slow),
        pytest.param("stage:8", "last", marks=pytest.mark.slow),
        pytest.param("stage:2", "last", marks=pytest.mark.slow),
        pytest.param("stage:2", "likely", marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_reads_what_one_device_reads(mesh, outputs):
    model = config()
    same(read(model, None, outputs=outputs), read(model, mesh, outputs=outputs))


SLOW = [
    {"outputs": "logits"},
    {"outputs": "score"},
    {"dtype": "int8"},
    {"dtype": jnp.bfloat16},
    {"plan": "one", "rows": 1},
    {"biased": True},
    {"placement": "append"},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_it_does_so_for_every_kind_of_memory(case):
    case = dict(case)
    model = config(case.pop("placement", "interleave"))
    same(read(model, None, **case), read(model, "stage:4", **case))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("data:2,tensor:2,stage:2", marks=pytest.mark.slow),
        pytest.param("tensor:2,stage:4", marks=pytest.mark.slow),
        pytest.param("fsdp:2,stage:4", marks=pytest.mark.slow),
    ],
)
def test_the_other_axes_of_a_mesh_go_on_splitting(mesh):
    model = config()
    same(read(model, None), read(model, mesh), exact=False)


# --- training -------------------------------------------------------------------------


def batch(model, n=4, rows=2):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 31, (n, rows, W)).astype(np.int32)
    valid = np.full((n, rows), W, np.int32)
    valid[0, 1] = 0
    valid[-1, 0] = 3
    labels = np.where(rng.uniform(size=ids.shape) < 0.7, np.roll(ids, -1, 2), -100)
    return {"tokens": ids, "labels": labels.astype(np.int32), "valid": valid}


def gradients(model, mesh, everything=False, **loss):
    net, v = split(model, mesh)
    plan = np.array([2, 4, 4, 0], np.int32)

    def value(trained, frozen):
        both = {**frozen, **trained}
        given = (both["beacon"], both["params"], batch(model), plan)
        return train_loss(net, *given, LossConfig(**loss))[0]

    trained = v if everything else {"beacon": v["beacon"]}
    frozen = {} if everything else {"params": v["params"]}
    value, found = jax.value_and_grad(value)(trained, frozen)
    return [np.asarray(x) for x in (value, *jax.tree.leaves(found))]


@pytest.mark.parametrize("mesh", ["stage:4"])
@pytest.mark.parametrize("remat", ["lean"])
def test_the_gradient_of_a_pipeline_is_that_of_one_device(mesh, remat):
    model = config()
    same(gradients(model, None, remat=remat), gradients(model, mesh, remat=remat))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["lean", "lean-layer"])
@pytest.mark.parametrize(
    ("kind", "everything"), [("labels", False), ("labels", True), ("distil", False)]
)
def test_every_loss_has_its_gradient_in_a_pipeline(remat, kind, everything):
    options = {"remat": remat, "kind": kind, "everything": everything}
    one, split = (gradients(config(), m, **options) for m in (None, "stage:8"))
    # XLA fuses what is run again with other products than without stages: rounding.
    same(one, split, exact=remat == "lean")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2,stage:4", "data:2,tensor:2,stage:2"])
def test_a_gradient_is_split_over_other_axes_too(mesh):
    model = config()
    one, split = (gradients(model, m, remat="lean") for m in (None, mesh))
    same(one, split, exact=False)


def test_what_a_pipeline_does_not_have_is_refused():
    model = config()
    with pytest.raises(ValueError, match=r"remat='none'.*mesh\.stage=2.*'lean'"):
        gradients(model, "stage:2", remat="none")
    with pytest.raises(ValueError, match=r"offload=True.*mesh\.stage=2"):
        gradients(model, "stage:2", remat="lean", offload=True)
    with pytest.raises(ValueError, match=r"'layers' has size 8, .*stage=3 do not"):
        split(model, "stage:3")


# --- what is sent ---------------------------------------------------------------------


def compiled(model, mesh):
    net, v = split(model, mesh)
    memory = empty(net, 1, "float32")
    ids = tokens(1, 8 * W)
    given = (net, v, memory, ids, np.array([8 * W]), PLANS["one"][None], None)
    lowered = feed_jit.lower(*given, static=(4,), outputs="last")
    return lowered.compile().as_text()


def test_reading_sends_windows_on_and_sums_nothing_up():
    text = compiled(config(), "stage:8")
    assert "collective-permute" in text
    for sum_of_devices in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
        assert not re.search(rf"= \S+ {sum_of_devices}", text), sum_of_devices
    assert "all-reduce" in compiled(config(), "tensor:2")  # the search finds one
