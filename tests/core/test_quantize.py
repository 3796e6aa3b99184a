"""int8 buffers: what rounding costs, and outliers that must not make it cost more."""

import dataclasses
import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from beacon_jax.attention import prefix_attention
from beacon_jax.attention.mean import cos_sin_table, kernel_tables, product, turns
from beacon_jax.attention.reference import reference
from beacon_jax.core.quantize import (
    channel_mean,
    dequantize,
    empty,
    for_attention,
    pair_spread,
    quantize,
    residual,
    rotated_mean,
    write,
    write_residual,
)
from beacon_jax.model.config import RopeConfig
from beacon_jax.model.presets import get_preset
from beacon_jax.model.rotary import cos_sin, inverse_frequencies, rotate

PROPERTY = settings(
    max_examples=20, deadline=None, suppress_health_check=list(HealthCheck)
)
B, S, K, H = 2, 400, 2, 64
QWEN2 = dataclasses.replace(get_preset("qwen2-0.5b"), num_heads=2 * K, num_kv_heads=K)
YARN = dataclasses.replace(
    QWEN2,
    rope=RopeConfig(theta=1e6, kind="yarn", factor=16.0, original_max_position=2048),
)
CONFIGS = {"plain": QWEN2, "yarn": YARN}
FREQUENCIES = inverse_frequencies(QWEN2)


def channels(kind: str):
    """What is added to the un-rotated keys, [K, H]: 100 times their deviation in three
    channels, or a bias of that size everywhere."""
    sign = jnp.where(jax.random.bernoulli(jax.random.key(8), 0.5, (K, H)), 100.0, -100)
    some = jnp.zeros((K, H)).at[:, jnp.asarray([3, 17, 50])].set(1.0)
    return {"none": jnp.zeros((K, H)), "outliers": sign * some, "bias": sign}[kind]


def keys(kind: str, slots: int = S):
    """Un-rotated, [B, S, K, H]."""
    return jax.random.normal(jax.random.key(1), (B, slots, K, H)) + channels(kind)


def turned(x, config, start=0):
    positions = start + jnp.arange(x.shape[-3])[None]
    return rotate(x, *cos_sin(config, positions))


def stored(k, config, *, mean: bool, spread=False, start=0, capacity=S):
    """A buffer of one layer with these keys, rotated, and its entries as floats."""
    frequencies = inverse_frequencies(config)
    # Of the first quarter, as of a text's first window: later keys have others.
    valid = jnp.broadcast_to(jnp.arange(k.shape[1]) < k.shape[1] // 4, k.shape[:2])
    mu = channel_mean(k, valid)[None] * config.rope.attention_scale if mean else None
    factors = pair_spread(k, valid)[None] if spread else None
    at = jnp.full(B, start)
    put = jax.jit(functools.partial(write, layer=0, frequencies=frequencies))
    buffer = put(
        empty((1, B, capacity, K, H), mu, factors), turned(k, config, start), at
    )
    return buffer, dequantize(buffer, 0, frequencies=frequencies)[:, start:]


def weights(k, config, t=16, share=1.0):
    """float64 attention [B, K, T, S] of queries (times `share`) behind the keys."""
    q = share * jax.random.normal(jax.random.key(2), (B, t, K, H))
    q = np.asarray(turned(q, config, k.shape[1]), np.float64)
    scores = np.einsum("BTKH,BSKH->BKTS", q, np.asarray(k, np.float64)) * H**-0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def variation(ours, exact, config, share=1.0):
    """Largest total variation of a query's attention."""
    run = functools.partial(weights, config=config, share=share)
    gap = np.abs(run(ours) - run(exact))
    return gap.sum(-1).max() / 2


class TestRoundTrip:
    @PROPERTY
    @given(seed=st.integers(0, 2**31), size=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
    def test_an_element_is_off_by_half_a_step_at_most(self, seed, size):
        x = size * jax.random.normal(jax.random.key(seed), (3, 7, 2, 16))
        x = x.at[1].set(0.0)
        values, scale = quantize(x)
        back = np.asarray(values, np.float64) * np.swapaxes(scale, -1, -2)[..., None]
        step = np.abs(x).max(-1, keepdims=True) / 127
        assert np.isfinite(scale).all() and not back[1].any()
        assert (np.abs(back - x) <= step * (0.5 + 1e-4)).all()

    @PROPERTY
    @given(seed=st.integers(0, 2**31))
    def test_a_second_trip_changes_nothing(self, seed):
        values, scale = quantize(jax.random.normal(jax.random.key(seed), (7, 2, 16)))
        again, _ = quantize(values * jnp.swapaxes(scale, -1, -2)[..., None])
        np.testing.assert_array_equal(values, again)

    def test_slots_without_entries_are_exactly_0_whatever_the_mean(self):
        buffer, _ = stored(keys("bias", 5), QWEN2, mean=True, start=3, capacity=12)
        back = dequantize(buffer, frequencies=FREQUENCIES)
        written = (np.arange(12) >= 3) & (np.arange(12) < 8)
        assert not back[:, :, ~written].any() and (back[:, :, written] != 0).all()


class TestWrite:
    @pytest.mark.parametrize("layer", [None, 1])
    @pytest.mark.parametrize("mean", [False, True])
    def test_live_rows_get_their_entries_and_all_else_stays(self, layer, mean):
        layers, t = 3, 4
        start, live = jnp.asarray([2, 5]), jnp.asarray([True, False])
        mu = 100 * jax.random.normal(jax.random.key(3), (layers, B, K, H))
        before = empty((layers, B, 11, K, H), mu if mean else None)
        full = jax.random.normal(jax.random.key(4), (layers, B, 11, K, H))
        put = jax.jit(functools.partial(write, frequencies=FREQUENCIES))
        before = put(before, full, jnp.zeros(B, jnp.int32))
        new = jax.random.normal(jax.random.key(5), (layers, B, t, K, H))
        new = new if layer is None else new[layer]
        after = put(before, new, start, layer, live)
        wrote = np.zeros((layers, B, 11), bool)
        wrote[slice(None) if layer is None else layer, 0, 2:6] = True
        for a, b in ((after.values, before.values), (after.scale, before.scale)):
            a, b = (np.asarray(x) for x in (a, b))
            a, b = (x if x.ndim == 5 else np.swapaxes(x, 2, 3) for x in (a, b))
            np.testing.assert_array_equal(a[~wrote], b[~wrote])
        back = dequantize(after, frequencies=FREQUENCIES)[:, 0, 2:6]
        new = new[:, 0] if layer is None else new[0][None]
        back = back if layer is None else back[layer][None]
        scale = (
            after.scale[:, 0, :, 2:6] if layer is None else after.scale[1:2, 0, :, 2:6]
        )
        allowed = 0.5 * jnp.swapaxes(scale, -1, -2)[..., None] + 1e-4
        assert (jnp.abs(back - new) <= allowed).all()

    def test_a_mean_needs_frequencies(self):
        buffer = empty((1, B, S, K, H), jnp.ones((1, B, K, H)))
        new, start = jnp.ones((B, 1, K, H)), jnp.zeros(B, jnp.int32)
        for call in (lambda: write(buffer, new, start, 0), lambda: dequantize(buffer)):
            with pytest.raises(ValueError, match="frequencies=None"):
                call()

    def test_bytes_are_counted(self):
        plain = empty((1, B, S, K, H))
        assert plain.nbytes == B * S * K * (H + 4)
        with_mean = plain.replace(mean=jnp.ones((1, B, K, H)))
        assert with_mean.nbytes == plain.nbytes + 4 * B * K * H


class TestOutliers:
    """Total variation of the attention against that over float32 keys."""

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("kind", ["none", "outliers", "bias"])
    def test_without_their_mean_keys_attend_as_in_float32(self, kind, config):
        config = CONFIGS[config]
        exact = turned(keys(kind), config)
        _, ours = stored(keys(kind), config, mean=True)
        assert variation(ours, exact, config) <= 0.01

    @pytest.mark.parametrize("kind", ["outliers", "bias"])
    def test_with_it_they_do_not(self, kind):
        exact = turned(keys(kind), QWEN2)
        _, ours = stored(keys(kind), QWEN2, mean=False)
        assert variation(ours, exact, QWEN2) > 0.01

    def test_large_channels_without_a_bias_need_a_spread(self):
        """With queries that are as much smaller there: other scores mean nothing."""
        large = jnp.ones(H).at[jnp.asarray([3, 17, 50])].set(100.0)
        pair = jnp.tile(jnp.maximum(*jnp.split(large, 2)), 2)
        k = jax.random.normal(jax.random.key(1), (B, S, K, H)) * large + 5
        exact = turned(k, QWEN2)
        gap = lambda **how: variation(
            stored(k, QWEN2, **how)[1], exact, QWEN2, 1 / pair
        )
        assert gap(mean=True, spread=True) <= 0.01 < gap(mean=True)

    def test_a_spread_is_a_power_of_two_per_pair_and_1_without_a_reason(self):
        k = keys("bias") * jnp.ones(H).at[3].set(100.0)
        valid = jnp.asarray([[True] * S, [False] * S])
        spread = pair_spread(k, valid)
        assert set(np.unique(spread[0]).tolist()) == {1.0, 128.0}
        assert (spread[0, :, [3, 3 + H // 2]] == 128).all() and (spread[1] == 1).all()
        assert (pair_spread(jnp.ones((B, S, K, H)), valid) == 1).all()

    def test_at_the_end_of_a_long_memory_too(self):
        """Where angles in float32 are off by 0.004."""
        start = 130_000
        buffer, ours = stored(
            keys("outliers"), QWEN2, mean=True, start=start, capacity=start + S
        )
        exact = turned(keys("outliers"), QWEN2, start)
        step = jnp.swapaxes(buffer.scale[0, :, :, start:], 1, 2)[..., None]
        assert (jnp.abs(ours - exact) <= step / 2 + 1e-4).all()
        assert variation(ours, exact, QWEN2) <= 0.01

    @pytest.mark.parametrize("spread", [False, True])
    @pytest.mark.parametrize("config", CONFIGS)
    def test_entries_that_move_take_no_mean_along(self, config, spread):
        """Every other entry to the front half, as when a window is compressed."""
        config = CONFIGS[config]
        buffer, _ = stored(keys("outliers"), config, mean=True, spread=spread)
        place, here = 2 * jnp.arange(S // 2) + 1, jnp.arange(S // 2)
        moved = residual(buffer, jnp.broadcast_to(place, (B, S // 2)))
        distance = jnp.broadcast_to(here - place, (B, S // 2))
        moved = rotate(moved, *cos_sin(config, distance, scaled=False))
        after = write_residual(buffer, moved, jnp.zeros(B, jnp.int32))
        ours = dequantize(after, 0, frequencies=inverse_frequencies(config))
        exact = turned(keys("outliers")[:, place], config)
        assert variation(ours[:, : S // 2], exact, config) <= 0.01

    @pytest.mark.parametrize("mean", [False, True])
    @pytest.mark.parametrize("spread", [False, True])
    def test_attention_over_the_buffer_is_attention_over_its_floats(self, mean, spread):
        config, t = YARN, 3
        k = keys("outliers").at[..., 5].multiply(9)
        k, dequantised = stored(k, config, mean=mean, spread=spread)
        values = jax.random.normal(jax.random.key(6), (B, S, K, H))
        v = write(empty((1, B, S, K, H)), values, jnp.zeros(B, jnp.int32), 0)
        q = jax.random.normal(jax.random.key(7), (B, t, 2 * K, H))
        q, prefix = turned(q, config, S), jnp.asarray([S - t, 30])
        own, options = for_attention(q, k, v, 0)
        options["frequencies"] = inverse_frequencies(config)
        ours = prefix_attention(own, k.values, v.values, prefix, **options)
        with jax.default_matmul_precision("highest"):
            theirs = reference(q, dequantised, dequantize(v, 0), prefix, scale=H**-0.5)
        # float32 sums of numbers near 1000 on both sides.
        np.testing.assert_allclose(ours, theirs, atol=5e-4)


class TestTables:
    def test_angles_are_those_of_float64_at_every_length(self):
        positions = np.concatenate([np.arange(2000), 2**17 - np.arange(1, 2000)])
        angle = positions[:, None] * FREQUENCIES.astype(np.float64)
        exact = np.concatenate([np.cos(angle), np.sin(angle)], -1)
        ours = jax.jit(cos_sin_table)(turns(FREQUENCIES), positions)
        assert np.abs(ours - exact).max() <= 5e-7

    def test_a_rotated_mean_is_a_rotated_key(self):
        mean, positions = keys("bias")[:, 0], jnp.broadcast_to(jnp.arange(9), (B, 9))
        ours = rotated_mean(mean, positions, FREQUENCIES)
        theirs = turned(jnp.broadcast_to(mean[:, None], ours.shape), QWEN2)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)

    @pytest.mark.parametrize(("dtype", "most"), [("float32", 5e-4), ("bfloat16", 5e-3)])
    def test_two_bfloat16_parts_are_enough_for_a_mean_of_100(self, dtype, most):
        """Scores of hundreds against float64; one bfloat16 part errs by 0.5."""
        block, slots = 32, 2**17
        query = 100 * H**-0.5 * jax.random.normal(jax.random.key(0), (64, H))
        starts, table = kernel_tables(
            jnp.asarray(turns(FREQUENCIES)), slots, block, jnp.dtype(dtype)
        )
        dot = lambda a, b: jnp.matmul(
            a, b.T, precision="highest", preferred_element_type=jnp.float32
        )
        j = 4000
        cos, sin = starts[j]
        quarter = jnp.concatenate([query[:, H // 2 :], -query[:, : H // 2]], -1)
        here: Any = query * cos + quarter * sin
        ours = product(dot, here, list(table))
        angle = (j * block + np.arange(block))[:, None] * np.float64(FREQUENCIES)
        exact = np.concatenate([np.cos(angle), np.sin(angle)], -1)
        exact = np.asarray(query, np.float64) @ exact.T
        assert np.abs(ours - exact).max() <= most
        if dtype == "bfloat16":
            single = dot(here.astype(dtype), table[0])
            assert np.abs(single - exact).max() > 10 * most
