"""Moved entries against float64 rotations of un-rotated keys."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.core import move
from beacon_jax.core.memory import MemoryState
from beacon_jax.model.config import BeaconConfig, RopeConfig
from beacon_jax.model.rotary import inverse_frequencies
from tests.tiny import tiny

L, B, S, K, H, W = 2, 3, 40, 2, 8, 8
BASE = tiny(
    vocab_size=32,
    intermediate_size=16,
    num_layers=L,
    num_heads=K,
    num_kv_heads=K,
    head_dim=H,
    beacon=BeaconConfig(window=W, ratios=(2, 4), sink=2),
    eos_ids=(),
    bos_ids=(),
)
YARN = RopeConfig(kind="yarn", factor=4.0, original_max_position=64)
CONFIGS = [BASE, dataclasses.replace(BASE, rope=YARN)]


def rotated(config, keys, positions):
    """float64 keys [L, B, n, K, H] at positions [B, n], times the rotary magnitude."""
    angles = positions[..., None] * inverse_frequencies(config).astype(np.float64)
    turn = np.exp(1j * angles)[None, :, :, None] * config.rope.attention_scale
    x = (keys[..., : H // 2] + 1j * keys[..., H // 2 :]) * turn
    return np.concatenate([x.real, x.imag], axis=-1)


def state_of(config, slots, raw, seed=0, capacity=S, dtype=np.float32):
    """A memory whose keys are known un-rotated: (state, keys, values)."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, L, len(slots), capacity, K, H))
    positions = np.broadcast_to(np.arange(capacity), (len(slots), capacity))
    numbers = lambda x: jnp.asarray(x, jnp.int32)
    state = MemoryState(
        k=jnp.asarray(rotated(config, keys, positions), dtype),
        v=jnp.asarray(values, dtype),
        slots=numbers(slots),
        sinks=numbers([2 if n else 0 for n in slots]),
        raw=numbers(raw),
        ratio=numbers([4] * len(slots)),
        windows=numbers([3 if n else 0 for n in slots]),
        tokens=numbers(rng.integers(0, 32, (len(slots), W))),
    )
    return state, keys, values


@settings(max_examples=40, deadline=None)
@given(data=st.data(), config=st.sampled_from(CONFIGS))
def test_listed_entries_become_slots_with_the_keys_of_their_new_index(data, config):
    counts = st.integers(0, W)
    slots = data.draw(st.lists(st.integers(0, S - W - 2), min_size=B, max_size=B))
    count = np.asarray(data.draw(st.lists(counts, min_size=B, max_size=B)))
    chosen = [sorted(data.draw(st.permutations(range(W + 2)))[:n]) for n in count]
    place = np.zeros((B, W), np.int32)
    for row, entries in enumerate(chosen):
        place[row, : len(entries)] = entries
    state, keys, values = state_of(config, slots, [W] * B)
    after = move.keep_entries(config, state, jnp.asarray(place), jnp.asarray(count))
    for row, n in enumerate(count):
        m, source = slots[row], slots[row] + place[row, :n]
        want = rotated(config, keys[:, [row]][:, :, source], m + np.arange(n)[None])
        got = np.asarray(after.k)[:, [row], m : m + n]
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_array_equal(
            np.asarray(after.v)[:, row, m : m + n],
            values[:, row, source].astype(np.float32),
        )
        for name in ("k", "v"):
            old, new = (np.asarray(getattr(x, name))[:, row] for x in (state, after))
            np.testing.assert_array_equal(new[:, :m], old[:, :m])
            np.testing.assert_array_equal(new[:, m + n :], old[:, m + n :])
    np.testing.assert_array_equal(after.slots, np.asarray(slots) + count)
    np.testing.assert_array_equal(after.raw, np.where(count, 0, W))
    np.testing.assert_array_equal(after.windows, state.windows + (count > 0))
    first = (np.asarray(slots) == 0) & (count > 0)
    sinks = np.where(first, np.minimum(2, count), state.sinks)
    np.testing.assert_array_equal(after.sinks, sinks)


@settings(max_examples=40, deadline=None)
@given(
    front=st.lists(st.integers(0, S - 24), min_size=B, max_size=B),
    back=st.lists(st.integers(0, 24), min_size=B, max_size=B),
    config=st.sampled_from(CONFIGS),
)
def test_another_memory_s_slots_go_behind_with_the_keys_of_their_new_index(
    front, back, config
):
    state, _, _ = state_of(config, front, [0] * B)
    other, keys, values = state_of(config, back, [0] * B, seed=1, capacity=32)
    after = move.append(config, state, other)
    for row, (m, n) in enumerate(zip(front, back, strict=True)):
        want = rotated(config, keys[:, [row], :n], m + np.arange(n)[None])
        got = np.asarray(after.k)[:, [row], m : m + n]
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_array_equal(
            np.asarray(after.v)[:, row, m : m + n],
            values[:, row, :n].astype(np.float32),
        )
        for name in ("k", "v"):
            old, new = (np.asarray(getattr(x, name))[:, row] for x in (state, after))
            np.testing.assert_array_equal(new[:, :m], old[:, :m])
            np.testing.assert_array_equal(new[:, m + n :], old[:, m + n :])
    np.testing.assert_array_equal(after.slots, np.add(front, back))
    np.testing.assert_array_equal(after.windows, state.windows + other.windows)
    sinks = np.where(np.asarray(front) == 0, other.sinks, state.sinks)
    np.testing.assert_array_equal(after.sinks, sinks)


def test_garbage_beyond_the_live_entries_does_not_reach_them():
    state, _, _ = state_of(BASE, [3, 0, 30], [4, 2, 0])
    dead = np.arange(S) >= np.asarray([3 + 5, 2, 30])[:, None]
    poison = lambda x: jnp.where(dead[None, :, :, None, None], jnp.nan, x)
    place = jnp.asarray([[0, 2, 4], [0, 1, 5], [0, 0, 0]])
    count = jnp.asarray([3, 2, 0])
    broken = state.replace(k=poison(state.k), v=poison(state.v))
    clean, after = (move.keep_entries(BASE, x, place, count) for x in (state, broken))
    front, _, _ = state_of(BASE, [5, 1, 2], [0, 0, 0], seed=1)
    joined, poisoned = (move.append(BASE, front, x) for x in (clean, after))
    for row, n in enumerate((5 + 6, 1 + 2, 2 + 30)):
        for name in ("k", "v"):
            a, b = (
                np.asarray(getattr(x, name))[:, row, :n] for x in (joined, poisoned)
            )
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_entries_that_stay_where_they_are_keep_their_bits(dtype):
    state, _, _ = state_of(BASE, [3, 0, 30], [8, 8, 8], dtype=dtype)
    place = jnp.broadcast_to(jnp.arange(W), (B, W))
    after = move.keep_entries(BASE, state, place, jnp.full(B, W))
    np.testing.assert_array_equal(np.asarray(after.k), np.asarray(state.k))
    np.testing.assert_array_equal(np.asarray(after.v), np.asarray(state.v))
