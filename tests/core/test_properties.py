"""Properties of the window loop that hold for every model.

docs/specification.md sections 2 to 4.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed, feed_jit
from beacon_jax.core.memory import CapacityError, init_memory
from beacon_jax.core.plan import capacity, draw_ratios, static_ratios
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.data.windows import split_windows
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from tests.tiny import TINY

W, T = 8, 40
pytestmark = pytest.mark.optimized  # tolerances of what users run
PROPERTY = settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck)
)


def config_with(**beacon) -> ModelConfig:
    return dataclasses.replace(TINY, beacon=dataclasses.replace(TINY.beacon, **beacon))


@functools.cache
def variables():
    """Random weights, beacons apart from the base so that mixing them up shows."""
    v = nn.unbox(init_variables(TINY, jax.random.key(0)))
    v["params"] = jax.tree.map(lambda x: 3 * x, v["params"])
    beacon = init_beacon(v["params"], TINY)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    v["beacon"] = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape), beacon
    )
    return v


def text(seed, rows=2):
    return np.random.default_rng(seed).integers(0, 31, (rows, T)).astype(np.int32)


def run(config, tokens, lengths, ratios, memory=None, room=120):
    ratios = np.asarray(ratios, np.int32)
    if memory is None:
        memory = init_memory(config, len(tokens), room)
    return feed(
        Net(config),
        variables(),
        memory,
        tokens,
        np.asarray(lengths),
        ratios,
        outputs="logits",
    )


@PROPERTY
@given(seed=st.integers(0, 99), at=st.integers(1, T - 1))
def test_a_token_changes_no_output_before_it(seed, at):
    tokens = text(seed)
    other = tokens.copy()
    other[:, at] = (other[:, at] + 1) % 31
    a, _ = run(TINY, tokens, [T, T], [2, 4])
    b, _ = run(TINY, other, [T, T], [2, 4])
    np.testing.assert_array_equal(a.logits[:, :at], b.logits[:, :at])
    assert not np.allclose(a.logits[:, at:], b.logits[:, at:])


@PROPERTY
@given(seed=st.integers(0, 99), more=st.integers(1, 20))
def test_slots_never_change_once_written(seed, more):
    tokens = text(seed)
    _, memory = run(TINY, tokens, [19, 19], [2, 4])
    _, grown = run(TINY, tokens[:, ::-1], [more, more], [2, 4], memory)
    m = int(memory.slots[0])
    np.testing.assert_array_equal(memory.k[:, :, :m], grown.k[:, :, :m])
    np.testing.assert_array_equal(memory.v[:, :, :m], grown.v[:, :, :m])


LAYOUTS = pytest.mark.parametrize(
    ("sink", "placement"),
    [
        (0, "interleave"),
        (3, "append"),
        pytest.param(3, "interleave", marks=pytest.mark.slow),
        pytest.param(0, "append", marks=pytest.mark.slow),
    ],
)


@LAYOUTS
@PROPERTY
@given(
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, T), min_size=1, max_size=3),
    zero=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(seed, cuts, sink, placement, zero):
    config = config_with(sink=sink, placement=placement)
    ratios = [4, 0, 2] if zero else [4, 2]
    tokens = text(seed)
    whole, expected = run(config, tokens, [T, T], ratios)
    memory, logits = None, []
    edges = [0, *sorted(cuts), T]
    for lo, hi in itertools.pairwise(edges):
        piece = np.zeros_like(tokens)
        piece[:, : hi - lo] = tokens[:, lo:hi]
        out, memory = run(config, piece, [hi - lo] * 2, ratios, memory)
        logits.append(out.logits[:, : hi - lo])
    np.testing.assert_allclose(np.concatenate(logits, 1), whole.logits, atol=2e-5)
    assert_equal_memories(config, memory, expected)


def assert_equal_memories(config, ours, expected):
    for name in ("slots", "sinks", "raw", "windows"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(expected, name))
    used = expected.slots + expected.open_entries(config.beacon.placement)
    for row, n in enumerate(np.asarray(used)):
        np.testing.assert_allclose(
            ours.k[:, row, :n], expected.k[:, row, :n], atol=2e-5
        )
        np.testing.assert_allclose(
            ours.v[:, row, :n], expected.v[:, row, :n], atol=2e-5
        )


@LAYOUTS
def test_token_by_token_gives_what_feeding_gives(sink, placement):
    config = config_with(sink=sink, placement=placement)
    tokens, ratios = text(3), np.asarray([4, 2, 0, 2], np.int32)
    whole, expected = run(config, tokens, [T, T - 9], ratios)
    memory = init_memory(config, 2, 120)
    for t in range(T):
        active = jnp.asarray([True, t < T - 9])
        logits, memory = decode_step(
            Net(config),
            variables(),
            memory,
            jnp.asarray(tokens[:, t]),
            jnp.asarray(ratios),
            active,
            static=(0, 2, 4),
        )
        np.testing.assert_allclose(logits[0], whole.logits[0, t], atol=2e-5)
        if t < T - 9:
            np.testing.assert_allclose(logits[1], whole.logits[1, t], atol=2e-5)
    assert_equal_memories(config, memory, expected)


@pytest.mark.parametrize("sink", [0, 3])
def test_ratio_0_is_full_attention_and_so_is_an_empty_memory(sink):
    tokens = text(5)
    compressed, _ = run(config_with(sink=sink), tokens, [T, T], [0])
    plain = dataclasses.replace(TINY, beacon=None)
    full, _ = feed(
        Net(plain),
        {"params": variables()["params"], "beacon": {}},
        init_memory(plain, 2, 600),
        tokens,
        np.full(2, T),
        np.zeros(1, np.int32),
        outputs="logits",
    )
    np.testing.assert_allclose(compressed.logits, full.logits, atol=2e-5)
    first, _ = run(TINY, tokens, [W - 1] * 2, [4])
    assert not np.allclose(first.logits[:, 5], full.logits[:, 5])  # beacon at 4
    np.testing.assert_allclose(first.logits[:, :4], full.logits[:, :4], atol=2e-5)


@PROPERTY
@given(seed=st.integers(0, 99), short=st.integers(0, T))
def test_rows_of_a_ragged_batch_are_as_they_are_alone(seed, short):
    tokens = text(seed)
    both, memory = run(TINY, tokens, [T, short], [2, 4])
    alone, single = run(TINY, tokens[1:], [short], [2, 4])
    np.testing.assert_allclose(
        both.logits[1, :short], alone.logits[0, :short], atol=2e-5
    )
    assert int(memory.slots[1]) == int(single.slots[0])
    if short:
        np.testing.assert_allclose(both.last_logits[1], alone.last_logits[0], atol=2e-5)


def test_permuting_rows_permutes_results():
    tokens = text(7, rows=3)
    order = [2, 0, 1]
    a, _ = run(TINY, tokens, [T, 11, 23], [2, 4])
    b, _ = run(TINY, tokens[order], [23, T, 11], [2, 4])
    np.testing.assert_allclose(
        a.last_logits[jnp.asarray(order)], b.last_logits, atol=2e-5
    )


def loss_of(config, beacon, tokens, lengths, plan, **options):
    windows, valid = split_windows(tokens, lengths, W, align="right")
    shifted = np.concatenate([tokens[:, 1:], np.full((len(tokens), 1), -100)], 1)
    shifted = np.where(np.arange(T) < np.asarray(lengths)[:, None] - 1, shifted, -100)
    labels, _ = split_windows(shifted, lengths, W, align="right", fill=-100)
    batch = {"tokens": windows, "labels": labels.astype(np.int32), "valid": valid}
    return train_loss(
        Net(config),
        beacon,
        variables()["params"],
        batch,
        np.asarray(plan),
        LossConfig(**options),
    )


def assert_same_gradients(tree, others):
    """Sums in another order: measured 2e-7 to 6e-7 of a leaf's largest, which is 28."""

    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * float(np.abs(y).max()))

    jax.tree.map(close, tree, others)


@pytest.mark.slow  # its gradients are in the sum that the next test compares
@pytest.mark.parametrize("sink", [0, 3])
def test_a_short_row_trains_as_alone_while_others_go_on(sink):
    config = config_with(sink=sink)
    tokens, lengths, plan = text(11), [T, 19], [2, 4, 2, 4, 2]

    def short_row(beacon):
        _, aux = loss_of(config, beacon, tokens, lengths, plan)
        return aux["row_loss"][1]

    def alone(beacon):
        _, aux = loss_of(config, beacon, tokens[1:], lengths[1:], plan[2:])
        return aux["row_loss"][0]

    beacon = variables()["beacon"]
    a, da = jax.value_and_grad(short_row)(beacon)
    b, db = jax.value_and_grad(alone)(beacon)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert_same_gradients(da, db)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["lean", "lean-layer"])
def test_a_batch_of_mixed_lengths_has_the_gradients_of_its_rows_alone(remat):
    config, lengths, plan = config_with(sink=3), [T, 19, 2 * W], [2, 4, 2, 4, 2]
    tokens = np.concatenate([text(16), text(17)[:1]])

    def gradient(rows, lengths, plan):
        f = lambda b: loss_of(config, b, tokens[rows], lengths, plan, remat=remat)
        return jax.value_and_grad(f, has_aux=True)(variables()["beacon"])

    (loss, _), together = gradient(slice(3), lengths, plan)
    count, parts = 0, []
    for i, length in enumerate(lengths):
        windows = -(-length // W)
        own = gradient(slice(i, i + 1), [length], plan[len(plan) - windows :])
        parts.append(((own[0][0], own[1]), float(own[0][1]["row_count"][0])))
        count += parts[-1][1]
    mean = lambda *xs: sum(x * n / count for x, (_, n) in zip(xs, parts, strict=True))
    alone, gradients = jax.tree.map(mean, *(part for part, _ in parts))
    np.testing.assert_allclose(loss, alone, rtol=1e-5)
    assert_same_gradients(together, gradients)


def test_the_first_window_can_be_left_out_of_the_loss():
    beacon, tokens, plan = variables()["beacon"], text(12), [2, 4, 2, 4, 2]
    _, every = loss_of(TINY, beacon, tokens, [T, 19], plan)
    loss, aux = loss_of(TINY, beacon, tokens, [T, 19], plan, skip_first_window=True)
    kept = np.asarray(every["token_loss"]).copy()
    kept[0, 0] = kept[2, 1] = 0  # the first windows of a 5- and a 3-window row
    counted = (T - 1 - W) + (19 - 1 - W)
    np.testing.assert_allclose(loss, kept.sum() / counted, rtol=1e-5)
    np.testing.assert_array_equal(aux["row_count"], [T - 1 - W, 19 - 1 - W])


def test_a_batch_without_labels_has_loss_0_and_no_gradient():
    tokens = text(13)
    windows, valid = split_windows(tokens, None, W, align="right")
    batch = {
        "tokens": windows,
        "labels": np.full_like(windows, -100),
        "valid": valid,
    }
    plan = np.full(len(windows), 2)
    f = lambda b: train_loss(Net(TINY), b, variables()["params"], batch, plan)[0]
    loss, grads = jax.value_and_grad(f)(variables()["beacon"])
    assert loss == 0
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


# `lean` and `lean-layer` also have the bits of `window`: test_lean_vjp.
@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("lean", marks=pytest.mark.slow),
        pytest.param("layer", marks=pytest.mark.slow),
        pytest.param("lean-layer", marks=pytest.mark.slow),
        pytest.param("window", marks=pytest.mark.slow),
    ],
)
def test_recomputing_changes_neither_loss_nor_gradients(remat):
    tokens, plan = text(14), [2, 4, 2, 4, 2]
    f = lambda b, r: loss_of(TINY, b, tokens, [T, T], plan, remat=r)[0]
    a = jax.value_and_grad(f)(variables()["beacon"], "none")
    b = jax.value_and_grad(f)(variables()["beacon"], remat)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_the_last_layers_beacon_queries_get_no_gradient():
    f = lambda b: loss_of(TINY, b, text(15), [T, T], [2, 4, 2, 4, 2])[0]
    grads = jax.grad(f)(variables()["beacon"])["layers"]["attention"]
    assert np.all(np.asarray(grads["q_proj"]["kernel"])[-1] == 0)
    assert np.any(np.asarray(grads["q_proj"]["kernel"])[0] != 0)
    assert np.any(np.asarray(grads["k_proj"]["kernel"])[-1] != 0)


def test_five_lengths_and_two_plans_share_one_trace():
    before = feed_jit._cache_size()
    for length, plan in zip(
        (1, 7, 16, 33, 40), ([2, 4],) * 3 + ([4, 2],) * 2, strict=True
    ):
        run(TINY, text(1), [length] * 2, plan, room=133)
    assert feed_jit._cache_size() == before + 1


def test_too_small_a_buffer_is_refused_with_the_capacity_that_would_do():
    with pytest.raises(CapacityError, match="capacity=20") as error:
        run(TINY, text(1), [T, T], [2], room=20)
    run(TINY, text(1), [T, T], [2], room=error.value.needed)
    assert error.value.needed == capacity(TINY, [2] * 5)


def test_rows_that_need_different_ratios_in_one_step_are_refused():
    _, memory = run(TINY, text(1), [9, 2], [2, 4])
    with pytest.raises(ValueError, match="different ratios"):
        run(TINY, text(1), [20, 20], [2, 4], memory)


def test_a_memory_knows_its_slots_and_the_ratios_to_come():
    _, memory = run(TINY, text(1), [20, 3], [2])
    assert memory.slots.tolist() == [8, 0]
    assert memory.slot_nbytes == 2 * 2 * 2 * 4 * 4  # k and v, layers, heads, H, bytes
    assert static_ratios(memory, np.asarray([4])) == (2, 4)


class TestRatios:
    def test_mixes_draw_what_they_say(self):
        step = draw_ratios(TINY, 64, mix="step-random", seed=1)
        assert set(step) == {2, 4}
        assert len(set(draw_ratios(TINY, 64, mix="instance-random", seed=1))) == 1
        assert draw_ratios(TINY, 5, mix="sequence").tolist() == [2, 4, 2, 4, 2]
        listed = draw_ratios(TINY, 4, mix="list", ratios=[4, 0])
        assert listed.tolist() == [4, 0, 0, 0]
        again = draw_ratios(TINY, 64, mix="step-random", seed=1)
        np.testing.assert_array_equal(step, again)

    def test_0_is_drawn_once_at_most_and_never_near_the_end(self):
        config = config_with(ratios=(0, 2))
        for mix in ("step-random", "sequence", "instance-random"):
            for seed in range(20):
                drawn = draw_ratios(config, 6, mix=mix, seed=seed, training=True)
                assert (drawn == 0).sum() <= 1
                assert drawn[-1] == 2

    def test_adapt_takes_the_smallest_ratio_that_reaches(self):
        config = config_with(ratios=(2, 4, 8))
        # (256 - 8) r + 8 positions: 504, 1000, 1992
        for length, ratio in ((400, 2), (500, 4), (990, 8), (5000, 8)):
            drawn = draw_ratios(config, 2, mix="adapt-20", length=length)
            assert drawn.tolist() == [ratio, ratio]

    def test_bad_arguments_name_themselves(self):
        with pytest.raises(ValueError, match="3.*8|8.*3"):
            draw_ratios(TINY, 2, ratios=[3])
        with pytest.raises(ValueError, match="mix='random'"):
            draw_ratios(TINY, 2, mix="random")
        with pytest.raises(ValueError, match="need beacons"):
            draw_ratios(dataclasses.replace(TINY, beacon=None), 2, ratios=[4])
