"""Float16: a residual stream that leaves its range, as that of Qwen2 does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from beacon_jax.attention.api import IMPLEMENTATIONS, prefix_attention
from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.decoder import Decoder, apply, residual_dtype
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.training.initial import random_variables
from tests.tiny import tiny

W, CHANNEL = 8, 3
CONFIG = tiny(
    vocab_size=29,
    hidden_size=32,
    num_layers=3,
    head_dim=8,
    o_bias=True,
    mlp_bias=True,
    qkv_bias=True,
    bos_ids=(),
)


@functools.cache
def variables():
    """Numbers that float16 can hold, in float32."""
    tree = random_variables(CONFIG, 0)
    return jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), tree)


def with_outliers():
    """One channel gets 60,000 from each of two layers and loses them in the third; the
    norms in between bring the others back to size. One layer's MLP has inputs of its
    last product that leave the range as well."""
    own = jax.tree.map(np.array, variables())
    layers = own["params"]["layers"]
    down = layers["mlp"]["down_proj"]
    down["bias"][:2, CHANNEL] = 60_000
    down["bias"][2, CHANNEL] = -60_000
    down["kernel"][:, :, CHANNEL] = 0
    layers["mlp"]["up_proj"]["bias"][0, 0] = 30_000
    layers["mlp"]["gate_proj"]["bias"][0, 0] = 8
    down["kernel"][0, 0] *= 1e-3
    # Behind 60,000 in one channel of 32 the others are divided by 10,607.
    for name, first in (("input_norm", 1), ("post_norm", 1)):
        layers[name]["scale"][first:] = 10_607
        layers[name]["scale"][:, CHANNEL] = 0
    own["params"]["final_norm"]["scale"][:] = 10_607
    own["params"]["final_norm"]["scale"][CHANNEL] = 0
    half = jax.tree.map(lambda x: x.astype(np.float16), own)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(half))
    return jax.tree.map(lambda x: x.astype(np.float32), half)


def logits(tree, dtype, tokens):
    """Of three windows and a half at x2, fed at once, and of four decoded tokens."""
    tree = jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
    plan = np.asarray([2], np.int32)
    memory = init_memory(CONFIG, 2, 64, dtype)
    given = jnp.asarray(tokens[:, :-4])
    lengths = jnp.full(2, given.shape[1])
    out, memory = feed(
        Net(CONFIG, dtype), tree, memory, given, lengths, plan, outputs="logits"
    )
    assert out.logits is not None
    found = [np.asarray(out.logits)]
    for token in tokens[:, -4:].T:
        one, memory = decode_step(
            Net(CONFIG, dtype), tree, memory, jnp.asarray(token), plan, static=(2,)
        )
        found.append(np.asarray(one)[:, None])
    return np.concatenate(found, 1)


def test_the_residual_stream_is_float32_in_float16_and_as_it_was_otherwise():
    for dtype, stream in (("float16", "float32"), ("bfloat16",) * 2, ("float32",) * 2):
        tree = jax.tree.map(lambda x, d=dtype: x.astype(d), variables())
        model = Decoder(Net(CONFIG, dtype), Layout.of_window(W, 2, "interleave"))
        x = apply(model, tree, jnp.zeros((1, W), jnp.int32), method="begin")
        assert x.dtype == jnp.dtype(residual_dtype(dtype)) == stream
        assert apply(model, tree, x, method="finish").dtype == dtype


@pytest.mark.slow
def test_outliers_beyond_float16_give_the_logits_of_float32():
    tokens = np.random.default_rng(0).integers(0, 29, (2, 3 * W + 8))
    tree = with_outliers()
    exact, ours = (logits(tree, dtype, tokens) for dtype in ("float32", "float16"))
    assert np.isfinite(ours).all()
    spread = exact.std()
    np.testing.assert_allclose(ours, exact, atol=0.03 * spread, rtol=0)


def test_biases_of_keys_as_large_as_qwen2s_do_not_overflow_the_scores():
    """q k is 90,000 before the scale, and the softmax of it depends on the rest."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 40, 2, 8)).astype(np.float16)
    q[..., 0] = k[..., 0] = 300
    exact = prefix_attention(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.zeros(1, jnp.int32)
    )
    for name in ("reference", "blockwise", "blockwise_cpu"):
        out = prefix_attention(
            *map(jnp.asarray, (q, k, v)), jnp.zeros(1, jnp.int32), implementation=name
        )
        assert out.dtype == jnp.float16 and name in IMPLEMENTATIONS
        np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=1e-2)


@functools.cache
def value_and_grad(dtype):
    """(scale) -> loss * scale of two rows of three windows, and its gradients."""
    tokens = np.random.default_rng(0).integers(0, 29, (3, 2, W)).astype(np.int32)
    batch = {"tokens": tokens, "labels": np.roll(tokens, -1, axis=-1)}
    batch["valid"] = np.full((3, 2), W, np.int32)
    own = variables()
    frozen = jax.tree.map(lambda x: x.astype(dtype), own["params"])

    def loss(beacon, scale):
        plan = jnp.asarray([2, 2, 0])
        settings = LossConfig(ratios=(2,))
        found = train_loss(Net(CONFIG, dtype), beacon, frozen, batch, plan, settings)
        return found[0] * scale

    compiled = jax.jit(jax.value_and_grad(loss))
    return functools.partial(compiled, own["beacon"])


def gradient_error(scale, factor):
    """Of float16's gradients at scale * factor, over factor, against float32's."""
    (_, wanted), (_, found) = (
        value_and_grad(dtype)(scale=value)
        for dtype, value in (("float32", scale), ("float16", scale * factor))
    )
    apart = jax.tree.map(lambda x, y: x / factor - y, found, wanted)
    return optax.tree.norm(apart) / optax.tree.norm(wanted)


@pytest.mark.slow
def test_gradients_through_the_lean_backward_pass_are_those_of_float32():
    exact, ours = (value_and_grad(d)(scale=1.0)[0] for d in ("float32", "float16"))
    np.testing.assert_allclose(ours, exact, rtol=2e-3)
    assert gradient_error(1.0, 4096.0) < 0.02


@pytest.mark.slow
def test_labels_that_count_little_lose_their_gradient_unless_the_loss_is_scaled():
    """A label of a row of 16,384 counts 2**-14."""
    assert gradient_error(2.0**-14, 1.0) > 0.1
    assert gradient_error(2.0**-14, 4096.0) < 0.02
