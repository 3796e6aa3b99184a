"""Schedules, clipping, skipped updates, and what the optimiser allocates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beacon_jax.model.presets import PRESETS
from beacon_jax.model.shapes import param_shapes
from beacon_jax.training.config import default_config
from beacon_jax.training.optim import learning_rate, make_optimizer, skipped

PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.full((5,), 2.0)}


def settings(**changes):
    config = default_config().optimizer
    config.update(changes)
    return config


def shares(steps, **changes):
    share = learning_rate(settings(**changes), steps)
    return [float(share(step)) for step in range(steps + 1)]


def gradients(value, *, norm=None):
    tree = jax.tree.map(lambda x: jnp.full_like(x, value), PARAMS)
    scale = 1.0 if norm is None else norm / optax.tree.norm(tree)
    return jax.tree.map(lambda x: x * scale, tree)


def moments(state):
    """Adam's first moments."""
    return optax.tree.get(state, "mu")


def test_the_default_falls_linearly_from_the_first_step_to_zero():
    config = default_config().optimizer
    assert (config.schedule, config.warmup, config.decay_start) == ("linear", 0, 0.0)
    np.testing.assert_allclose(shares(10), 1 - np.arange(11) / 10, atol=1e-7)


def test_linear_rises_stays_falls_and_stops_at_the_end():
    got = shares(20, warmup=4, decay_start=0.5, end=0.25)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[4:11] == [1.0] * 7
    assert got[15] == 0.5
    assert got[17:] == pytest.approx([0.3, 0.25, 0.25, 0.25])


def test_cosine_rises_to_the_peak_and_comes_to_rest_at_the_end():
    got = shares(20, schedule="cosine", warmup=4, end=0.2)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[4] == 1.0
    assert got[12] == pytest.approx(0.6)  # halfway between the peak and the end
    assert got[20] == pytest.approx(0.2)
    assert got[4:] == sorted(got[4:], reverse=True)
    flat = got[4] - got[5], got[19] - got[20]
    assert max(flat) < 0.1 * (got[11] - got[13])


def test_cosine_without_warm_up_is_the_textbook_curve():
    expected = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(11)]
    np.testing.assert_allclose(shares(10, schedule="cosine"), expected, atol=1e-6)


def test_cosine_waits_for_decay_start():
    got = shares(20, schedule="cosine", decay_start=0.5)
    assert got[:11] == [1.0] * 11
    assert got[15] == pytest.approx(0.5)
    assert got[20] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule):
    got = shares(4, schedule=schedule, warmup=100, end=1.0)
    assert got == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_updates_follow_the_schedule(name, schedule):
    changes = {"name": name, "lr": 0.1, "adam_lr": 0.1}
    config = settings(schedule=schedule, warmup=2, **changes)
    optimizer, share = make_optimizer(config, 6), learning_rate(config, 6)
    constant = make_optimizer(settings(end=1.0, **changes), 6)
    state, reference = optimizer.init(PARAMS), constant.init(PARAMS)
    for step in range(6):
        got, state = optimizer.update(gradients(1.0), state, PARAMS)
        full, reference = constant.update(gradients(1.0), reference, PARAMS)
        expected = full["b"] * share(step)
        np.testing.assert_allclose(got["b"], expected, rtol=1e-5)
        assert full["b"].all()


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (7.0, 7.0), (0.0, 100.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, norm):
    config = settings(clip=clip)
    optimizer = make_optimizer(config, 10)
    _, state = optimizer.update(
        gradients(1.0, norm=100.0), optimizer.init(PARAMS), PARAMS
    )
    found = optax.tree.norm(moments(state)) / (1 - config.b1)
    assert float(found) == pytest.approx(norm, rel=1e-4)


def test_small_gradients_are_not_scaled_up():
    optimizer = make_optimizer(settings(clip=1.0), 10)
    _, state = optimizer.update(
        gradients(1.0, norm=0.1), optimizer.init(PARAMS), PARAMS
    )
    assert float(optax.tree.norm(moments(state))) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_skipped_and_counted(bad):
    optimizer = make_optimizer(settings(), 10)
    update = jax.jit(optimizer.update)
    _, before = update(gradients(1.0), optimizer.init(PARAMS), PARAMS)
    assert skipped(before) == (0, 0)
    broken = {**gradients(1.0), "b": PARAMS["b"].at[2].set(bad)}
    state = before
    for count in (1, 2):
        updates, state = update(broken, state, PARAMS)
        assert all(not x.any() for x in jax.tree.leaves(updates))
        assert skipped(state) == (count, count)
    kept = jax.tree.map(jnp.array_equal, before.inner_state, state.inner_state)
    assert all(jax.tree.leaves(kept))
    updates, state = update(gradients(1.0), state, PARAMS)
    assert all(x.all() for x in jax.tree.leaves(updates))
    assert skipped(state) == (0, 2)


def shapes(config, collection):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        param_shapes(config)[collection],
        is_leaf=lambda x: isinstance(x, tuple),
    )


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("preset", ["llama2-7b", "qwen2-7b"])
def test_adam_holds_two_numbers_per_trained_parameter_and_nothing_else(preset):
    trained = {"beacon": shapes(PRESETS[preset], "beacon")}
    state = jax.eval_shape(make_optimizer(settings(), 10).init, trained)
    scalars = [x for x in jax.tree.leaves(state) if x.ndim == 0]
    assert size(state) == 2 * size(trained) + size(scalars)
    assert size(scalars) < 64


def test_muon_holds_one_number_per_entry_of_a_matrix():
    trained = {"params": shapes(PRESETS["tiny"], "params")}
    optimizer = make_optimizer(settings(name="muon"), 10)
    state = jax.eval_shape(optimizer.init, trained)
    kernels = [
        x
        for path, x in jax.tree.leaves_with_path(trained["params"]["layers"])
        if path[-1].key == "kernel"
    ]
    rest = size(state) - (2 * size(trained) - size(kernels))
    assert 0 < rest < 64  # counters and coefficients


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd"}, "optimizer.name='sgd' is unknown: use adamw or muon"),
        ({"schedule": "step"}, "schedule='step' is unknown: use linear or cosine"),
        ({"decay_start": 1.0}, "optimizer.decay_start=1.0 must lie in"),
        ({"end": 2.0}, "optimizer.end=2.0 must lie in"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(settings(**changes), 10)
