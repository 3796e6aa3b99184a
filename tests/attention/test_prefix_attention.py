"""`prefix_attention` against a float64 loop over its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.attention import IMPLEMENTATIONS, prefix_attention
from beacon_jax.attention.blockwise import blockwise
from beacon_jax.attention.reference import reference


def spelled_out(q, k, v, prefix):
    """The definition, one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, n, h = q.shape
    group = n // k.shape[2]
    out = np.zeros(q.shape)
    for row in range(b):
        for i in range(t):
            for head in range(n):
                seen = slice(0, int(prefix[row]) + i + 1)
                s = k[row, seen, head // group] @ q[row, i, head] / np.sqrt(h)
                p = np.exp(s - s.max())
                out[row, i, head] = (p / p.sum()) @ v[row, seen, head // group]
    return out


def inputs(heads=4, kv=2, t=5, s=13):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, t, heads, 8), (2, s, kv, 8), (2, s, kv, 8))
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape) for key, shape in pairs]


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("prefix", [(0, 8), (3, 0), (8, 8)])
def test_it_is_causal_attention_behind_a_prefix(implementation, kv, prefix):
    q, k, v = inputs(kv=kv)
    ours = prefix_attention(q, k, v, jnp.asarray(prefix), implementation=implementation)
    np.testing.assert_allclose(ours, spelled_out(q, k, v, prefix), atol=5e-6)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_dead_slots_are_never_read(implementation):
    q, k, v = inputs()
    prefix = jnp.asarray([2, 6])
    dead = (jnp.arange(13) >= (prefix + 5)[:, None])[..., None, None]

    def f(k, v):
        return prefix_attention(q, k, v, prefix, implementation=implementation)

    poisoned = f(jnp.where(dead, jnp.nan, k), jnp.where(dead, jnp.nan, v))
    np.testing.assert_array_equal(f(k, v), poisoned)


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_a_stacked_buffer_with_a_layer_is_that_layers_buffer(implementation):
    q, k, v = inputs()
    prefix, options = jnp.asarray([2, 6]), {"implementation": implementation}
    stacked = prefix_attention(
        q, jnp.stack([v, k]), jnp.stack([k, v]), prefix, layer=1, **options
    )
    np.testing.assert_array_equal(stacked, prefix_attention(q, k, v, prefix, **options))


@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_queries_beyond_the_valid_ones_give_0(implementation):
    q, k, v = inputs()
    queries = jnp.asarray([2, 5])
    out = prefix_attention(
        q, k, v, jnp.asarray([2, 6]), queries=queries, implementation=implementation
    )
    assert np.all(np.asarray(out[0, 2:]) == 0) and np.all(np.asarray(out[1]) != 0)


def test_wrong_arguments_name_themselves():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="implementation='flash'"):
        prefix_attention(q, k, v, jnp.zeros(2, jnp.int32), implementation="flash")
    with pytest.raises(ValueError, match="3 heads"):
        prefix_attention(q[:, :, :3], k, v, jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("block", [1, 4, 6, 13])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_blocks_change_neither_values_nor_gradients(block, kv):
    """Blocks that do not divide S overlap; dead ones and NaN in them are skipped."""
    q, k, v = inputs(kv=kv)
    prefix = jnp.asarray([1, 3])  # keys 8 to 12 are dead in both rows
    dead = (jnp.arange(13) >= (prefix + 5)[:, None])[..., None, None]
    weight = jax.random.normal(jax.random.key(9), q.shape)

    def loss(attend, q, k, v):
        out = attend(q, k, v, prefix, scale=0.3, queries=jnp.asarray([5, 4]))
        return (out * weight).sum()

    poison = lambda x: jnp.where(dead, jnp.nan, x)
    ours = functools.partial(loss, functools.partial(blockwise, block=block))
    value, gradients = jax.value_and_grad(ours, (0, 1, 2))(q, poison(k), poison(v))
    theirs = functools.partial(loss, reference)
    expected, right = jax.value_and_grad(theirs, (0, 1, 2))(q, k, v)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(gradients, right, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_gradients_of_a_stacked_buffer_belong_to_its_layer():
    q, k, v = inputs()
    prefix = jnp.asarray([2, 6])
    attend = functools.partial(blockwise, scale=0.3, block=4)
    stack = lambda x: jnp.stack([jnp.ones_like(x), x])
    whole = jax.grad(lambda k: attend(q, k, stack(v), prefix, layer=1).sum())(stack(k))
    alone = jax.grad(lambda k: attend(q, k, v, prefix).sum())(k)
    np.testing.assert_array_equal(whole, jnp.stack([jnp.zeros_like(alone), alone]))
