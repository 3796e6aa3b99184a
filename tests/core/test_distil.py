"""Distillation from the model's own full attention, against a plain implementation."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.distil import teach
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.decoder import Decoder, apply, init_variables
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.partition import make_partition
from tests.tiny import TINY

W, N = 8, 4
pytestmark = pytest.mark.optimized  # a tolerance of 1e-5
PLAN = np.array([2, 4, 2, 4], np.int32)


@functools.cache
def variables(tied=False):
    v = nn.unbox(init_variables(config(tied=tied), jax.random.key(0)))
    v["params"] = jax.tree.map(lambda x: 3 * x, v["params"])
    keys = iter(jax.random.split(jax.random.key(1), 100))
    v["beacon"] = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape),
        init_beacon(v["params"], config(tied=tied)),
    )
    return v


def config(*, tied=False, **beacon):
    beacon = dataclasses.replace(TINY.beacon, **beacon)
    return dataclasses.replace(TINY, tie_embeddings=tied, beacon=beacon)


@functools.cache
def batch():
    """Rows of 4 windows, of 2 and a part, and of a part: their first ones are empty."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (N, 3, W)).astype(np.int32)
    valid = np.array([[W, 0, 0], [W, W, 0], [W, W, 0], [W, 5, 3]], np.int32)
    labels = np.roll(tokens, -1, axis=2)
    labels[rng.random(labels.shape) < 0.3] = -100
    weights = rng.random(labels.shape).astype(np.float32)
    return {"tokens": tokens, "labels": labels, "valid": valid, "weights": weights}


def full_attention(v, net, rows):
    """Logits of whole rows at once, without windows or beacons, [N, B, W, V]."""
    n, b, w = rows["tokens"].shape
    out = np.zeros((n, b, w, net.config.vocab_size), np.float32)
    for i in range(b):
        first = int(np.argmax(rows["valid"][:, i] > 0))
        ids = rows["tokens"][first:, i].reshape(1, -1)
        c, length = net.config, ids.shape[1]
        model = Decoder(net, Layout(1, length, 0))
        shape = (c.num_layers, 1, length, c.num_kv_heads, c.head_dim)
        buffer, zero = jnp.zeros(shape), jnp.zeros(1, jnp.int32)
        hidden, *_ = apply(model, v, jnp.asarray(ids), buffer, buffer, zero)
        logits = apply(model, v, hidden, method="logits")
        out[first:, i] = np.asarray(logits).reshape(-1, w, c.vocab_size)
    return jnp.asarray(out)


def behind(rows):
    """Real tokens behind each row's first window, [N, B, W]."""
    first = np.argmax(rows["valid"] > 0, axis=0)
    later = np.arange(N)[:, None] > first
    live = np.arange(W) < rows["valid"][..., None]
    return (live & later[..., None]).astype(np.float32)


def counted(rows):
    """How much each token counts: as its label, 1 without one, [N, B, W]."""
    return behind(rows) * np.where(rows["labels"] != -100, rows["weights"], 1)


def expected(v, net, rows, label_weight, average):
    """The loss as a function of the beacons, with whole tables of logits."""
    taught = jax.nn.log_softmax(full_attention(v, net, rows))
    labelled, weights = rows["labels"] != -100, counted(rows)

    def loss(beacon):
        plain = LossConfig(remat="none")
        given = (beacon, v["params"], rows, PLAN, plain)
        _, aux = train_loss(net, *given, outputs="logits")
        student = jax.nn.log_softmax(aux["logits"])
        each = jnp.sum(jnp.exp(taught) * (taught - student), -1)
        labels = np.maximum(rows["labels"], 0)[..., None]
        entropy = -jnp.take_along_axis(student, labels, -1)[..., 0]
        each = (each + label_weight * labelled * entropy) * weights
        if average == "row":
            count = np.maximum(weights.sum((0, 2)), 1)
            return jnp.mean(each.sum((0, 2)) / count)
        return each.sum() / weights.sum()

    return jax.jit(jax.value_and_grad(loss))(v["beacon"])


def close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        most = np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(most, 1e-3))


def test_the_teacher_is_full_attention_over_the_row():
    v, net = variables(), Net(config())
    rows = batch()
    hidden, _ = teach(net, v, jnp.asarray(rows["tokens"]), jnp.asarray(rows["valid"]))
    logits = apply(Decoder(net, Layout(1, 1, 0)), v, hidden, method="logits")
    live = np.arange(W) < rows["valid"][..., None]
    found, wanted = (
        np.asarray(x)[live] for x in (logits, full_attention(v, net, rows))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "remat, label_weight, average, tied, beacon",
    [
        pytest.param("lean", 0.0, "token", False, {}, marks=pytest.mark.slow),
        ("lean-layer", 0.5, "row", True, {"placement": "append"}),
        pytest.param("none", 0.5, "token", False, {"sink": 3}, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_a_plain_implementation(
    remat, label_weight, average, tied, beacon
):
    v, net, rows = variables(tied), Net(config(tied=tied, **beacon)), batch()
    settings = LossConfig("distil", label_weight, average=average, remat=remat)
    loss = lambda own: train_loss(net, own, v["params"], rows, PLAN, settings)[0]
    found = jax.jit(jax.value_and_grad(loss))(v["beacon"])
    close(found, expected(v, net, rows, label_weight, average))


@pytest.mark.slow
def test_the_teacher_has_no_gradient():
    """All weights get gradients of the student alone, as if logits were given."""
    v, net, rows = variables(), Net(config()), batch()
    settings = LossConfig("distil", remat="none")
    loss = lambda p: train_loss(net, v["beacon"], p, rows, PLAN, settings)[0]
    taught = jax.nn.log_softmax(full_attention(v, net, rows))

    def plain(params):
        given = (v["beacon"], params, rows, PLAN, LossConfig(remat="none"))
        _, aux = train_loss(net, *given, outputs="logits")
        student = jax.nn.log_softmax(aux["logits"])
        each = jnp.sum(jnp.exp(taught) * (taught - student), -1) * counted(rows)
        return each.sum() / counted(rows).sum()

    close(*(jax.jit(jax.grad(f))(v["params"]) for f in (loss, plain)))


def test_what_ratio_0_reads_diverges_from_nothing():
    v, net, rows = variables(), Net(config(ratios=(0, 2))), batch()
    given = (v["beacon"], v["params"], rows, np.zeros(N, np.int32))
    loss, aux = train_loss(net, *given, LossConfig("distil"))
    assert abs(float(loss)) < 1e-5
    np.testing.assert_allclose(aux["row_count"], counted(rows).sum((0, 2)), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2", "tensor:2", "fsdp:2"])
def test_a_mesh_changes_nothing(mesh):
    v, rows = variables(), jax.tree.map(lambda x: x[:, :2], batch())
    settings = LossConfig("distil", 0.5)

    def found(net):
        loss = lambda own: train_loss(net, own, v["params"], rows, PLAN, settings)[0]
        return jax.jit(jax.value_and_grad(loss))(v["beacon"])

    split = make_partition(mesh, jax.devices()[:2])
    close(found(Net(config(), partition=split)), found(Net(config())))


@pytest.mark.slow
def test_offloaded_buffers_change_nothing():
    v, net, rows = variables(), Net(config()), batch()

    def found(settings):
        loss = lambda own: train_loss(net, own, v["params"], rows, PLAN, settings)[0]
        return jax.jit(jax.value_and_grad(loss))(v["beacon"])

    one = found(LossConfig("distil", 0.5))
    close(found(LossConfig("distil", 0.5, offload=True)), one)


@pytest.mark.parametrize(
    "options, match",
    [({"kind": "distill"}, "did you mean distil"), ({"average": "rows"}, "'token'")],
)
def test_unknown_settings_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        LossConfig(**options)
