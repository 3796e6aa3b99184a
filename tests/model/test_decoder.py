"""The decoder's parameters: shapes, names and logical axes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.model.config import RopeConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.presets import PARAMETERS, PRESETS
from beacon_jax.model.rotary import cos_sin, inverse_frequencies, rotate
from beacon_jax.model.shapes import param_shapes


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_has_the_declared_shapes_and_the_published_count(name):
    config = PRESETS[name]
    boxed = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    shapes = jax.tree.map(lambda x: tuple(x.shape), nn.unbox(boxed))
    assert shapes == param_shapes(config)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(boxed["params"]))
    if name in PARAMETERS:
        assert count == PARAMETERS[name]


def test_every_parameter_has_a_logical_axis_name_per_axis():
    config = PRESETS["tiny"]
    boxed = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    specs = nn.get_partition_spec(boxed)
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, tuple))
    shapes = jax.tree.leaves(nn.unbox(boxed))
    assert len(leaves) == len(shapes)
    for spec, leaf in zip(leaves, shapes, strict=True):
        assert len(spec) == len(leaf.shape)
        for axis, size in zip(spec, leaf.shape, strict=True):
            assert isinstance(axis, str) or (axis is None and size == 1)
    q = specs["params"]["layers"]["attention"]["q_proj"]["kernel"]
    assert tuple(q) == ("layers", "embed", "heads", "head_dim")


def test_rotation_depends_on_distance_only_and_keeps_lengths():
    config = PRESETS["tiny"]
    h = config.head_dim
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, h))
    at = lambda x, p: rotate(x, *cos_sin(config, jnp.asarray([[p]])))
    near = jnp.vdot(at(q, 5), at(k, 2))
    far = jnp.vdot(at(q, 105), at(k, 102))
    np.testing.assert_allclose(near, far, rtol=1e-4)
    np.testing.assert_allclose(
        jnp.linalg.norm(at(q, 77)), jnp.linalg.norm(q), rtol=1e-5
    )
    back = at(at(k, 9), -9)
    np.testing.assert_allclose(back, k, atol=1e-5)


def test_yarn_keeps_fast_dimensions_slows_slow_ones_and_scales():
    plain = PRESETS["tiny"]
    rope = RopeConfig(
        theta=plain.rope.theta, kind="yarn", factor=4.0, original_max_position=64
    )
    yarn = dataclasses.replace(plain, rope=rope)
    fast, slow = inverse_frequencies(plain), inverse_frequencies(yarn)
    np.testing.assert_allclose(slow[0], fast[0], rtol=1e-6)
    np.testing.assert_allclose(slow[-1], fast[-1] / 4, rtol=1e-6)
    cos, _ = cos_sin(yarn, jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(cos, 0.1 * np.log(4.0) + 1, rtol=1e-6)
    cos, _ = cos_sin(yarn, jnp.zeros((1, 1), jnp.int32), scaled=False)
    np.testing.assert_allclose(cos, 1.0)
