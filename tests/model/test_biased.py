"""Buffers whose slots have a bias: what every operation does with it."""

import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.model import buffers
from beacon_jax.model.buffers import Biased, biased
from beacon_jax.model.config import RopeConfig
from beacon_jax.model.rotary import inverse_frequencies
from tests.tiny import tiny

L, B, S, K, H = 2, 3, 12, 2, 8
CONFIG = tiny(head_dim=H, rope=RopeConfig())
START = jnp.asarray([0, 4, 7], jnp.int32)


def random_keys(dtype, size=S, seed=0):
    """Keys with biases, in floats or int8."""
    rng = np.random.default_rng(seed)
    new = jnp.asarray(rng.normal(size=(L, B, size, K, H)), jnp.float32)
    start, frequencies = jnp.zeros(B, jnp.int32), inverse_frequencies(CONFIG)
    empty, _ = buffers.empty((L, B, size, K, H), dtype)
    keys = buffers.put_all_layers(empty, new, start, None, frequencies)
    bias = jnp.asarray(rng.normal(size=(L, B, K, size)), jnp.float32)
    return Biased(keys, bias)


@pytest.fixture(params=["float32", "int8"])
def keys(request):
    return random_keys(request.param)


def entries(buffer):
    """The keys alone, as they are stored."""
    inner = buffers.entries_of(buffer)
    return np.asarray(getattr(inner, "values", inner))


def test_it_counts_and_names_what_it_stores(keys):
    inner = keys.entries
    assert keys.shape == (L, B, S, K, H) and keys.dtype == inner.dtype
    assert keys.nbytes == inner.nbytes + L * B * K * S * 4
    assert buffers.slot_nbytes(keys) == buffers.slot_nbytes(inner) + L * K * 4
    assert buffers.dtype_name(keys) == buffers.dtype_name(inner)
    assert biased(keys) is keys and not np.any(biased(inner).bias)


def test_new_slots_are_empty_and_fewer_are_the_first(keys):
    more, less = buffers.resized(keys, S + 5), buffers.trimmed(keys, S - 5)
    for found, size in ((more, S), (less, S - 5)):
        assert np.array_equal(found.bias[..., :size], keys.bias[..., :size])
        assert np.array_equal(entries(found)[:, :, :size], entries(keys)[:, :, :size])
    assert more.shape[2] == S + 5 and not np.any(more.bias[..., S:])
    assert less.bias.shape == (L, B, K, S - 5)


@pytest.mark.parametrize("live", [None, (True, False, True)])
@pytest.mark.parametrize("layer", [None, 1])
def test_what_is_written_has_no_bias(keys, live, layer):
    t = 4
    rng = np.random.default_rng(1)
    shape = (L, B, t, K, H) if layer is None else (B, t, K, H)
    new = jnp.asarray(rng.normal(size=shape), jnp.float32)
    rows = None if live is None else jnp.asarray(live)
    frequencies = inverse_frequencies(CONFIG)
    if layer is None:
        found = buffers.put_all_layers(keys, new, START, rows, frequencies)
        want = buffers.put_all_layers(keys.entries, new, START, rows, frequencies)
    else:
        found = buffers.put(keys, new, START, layer, rows, frequencies)
        want = buffers.put(keys.entries, new, START, layer, rows, frequencies)
    assert np.array_equal(entries(found), entries(want))
    expected = np.array(keys.bias)
    for row in range(B):
        if live is None or live[row]:
            at = slice(int(START[row]), int(START[row]) + t)
            expected[slice(None) if layer is None else layer, row, :, at] = 0
    assert np.array_equal(found.bias, expected)


def test_slots_go_with_their_bias(keys):
    slots = jnp.asarray([[3, 1], [0, 11], [5, 5]])
    found = buffers.take(keys, slots)
    for row in range(B):
        for n in range(2):
            at = int(slots[row, n])
            assert np.array_equal(found.bias[:, row, :, n], keys.bias[:, row, :, at])
    other = random_keys(buffers.dtype_name(keys), size=2, seed=5)
    which = jnp.asarray([[True, False]] * B)
    for a, b in ((found, other), (found, other.entries), (found.entries, other)):
        made = buffers.choose(which, a, b)
        biases = [biased(x).bias for x in (a, b)]
        assert np.array_equal(made.bias[..., 0], biases[0][..., 0])
        assert np.array_equal(made.bias[..., 1], biases[1][..., 1])
    for into in (keys, keys.entries):
        made = buffers.copy_in(into, found, START)
        want = np.array(biased(into).bias)
        for row in range(B):
            at = int(START[row])
            want[:, row, :, at : at + 2] = found.bias[:, row]
        assert np.array_equal(made.bias, want)


def test_none_has_biases_or_all_have(keys):
    plain = keys.entries
    assert buffers.alike(plain, plain)[0] is plain
    found = buffers.alike(keys, plain)
    assert found[0] is keys and not np.any(found[1].bias)


def test_biases_are_set_where_rows_are_live(keys):
    new = jnp.ones((L, B, K, 3), jnp.float32)
    found = buffers.put_bias(keys.entries, new, START, jnp.asarray([True, True, False]))
    want = np.zeros((L, B, K, S), np.float32)
    want[:, 0, :, :3] = want[:, 1, :, 4:7] = 1
    assert np.array_equal(found.bias, want)


def test_attention_gets_the_biases_of_its_layer(keys):
    values = random_keys(buffers.dtype_name(keys), seed=2).entries
    frequencies = inverse_frequencies(CONFIG)
    _, _, options = buffers.for_attention(keys, values, frequencies)
    assert np.array_equal(options["bias"], keys.bias)
    new = jnp.zeros((B, 1, K, H), jnp.float32)
    read, layer = buffers.read(keys, new, START, jnp.asarray(1), frequencies)
    if buffers.dtype_name(keys) == "int8":  # one layer, as floats
        assert layer is None and np.array_equal(read.bias, keys.bias[1])
    else:
        assert layer == 1 and read.entries is keys.entries
