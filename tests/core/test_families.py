"""What every family's decoder does, with the beacons of its own form (rank 0)."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import FAMILIES, BeaconConfig
from beacon_jax.model.decoder import Decoder, apply, init_variables
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from tests.tiny import W, tiny

pytestmark = pytest.mark.optimized

RATIO, EOS, B = 2, 2, 2


@functools.cache
def model(family):
    """The config and base weights of a family; norms are drawn around one."""
    config = tiny(family=family, qkv_bias=family == "qwen2")
    params = nn.unbox(init_variables(config, jax.random.key(0)))["params"]
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = lambda x: 3 * x + 0.3 * jax.random.normal(next(keys), x.shape)
    return config, jax.tree.map(noise, params)


def tokens(length, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(3, 31, (B, length)).astype(np.int32)


def run(config, variables, ids, layout):
    """Hidden states of the raw rows and all entries of a window in an empty buffer."""
    decoder = Decoder(Net(config), layout, tuple(range(layout.length)))
    shape = (config.num_layers, B, 16, config.num_kv_heads, config.head_dim)
    buffer, start = jnp.zeros(shape), jnp.zeros((B,), jnp.int32)
    hidden, kept, *_ = apply(
        decoder, variables, jnp.asarray(ids), buffer, buffer, start
    )
    return np.asarray(hidden), kept


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_beacons_act_as_eos_tokens_behind_every_rth_token(family):
    config, params = model(family)
    ids, layout = tokens(W), Layout(W // RATIO, RATIO, 1)
    fresh = {"params": params, "beacon": init_beacon(params, config)}
    found, kept = run(config, fresh, ids, layout)
    mixed = np.insert(ids, range(RATIO, W + 1, RATIO), EOS, axis=1)
    plain = dataclasses.replace(config, beacon=None)
    whole = Layout(1, layout.length, 0)
    expected, all_kept = run(plain, {"params": params, "beacon": {}}, mixed, whole)
    raw = np.delete(np.arange(layout.length), layout.beacon_index)
    np.testing.assert_allclose(found, expected[:, raw], rtol=0, atol=1e-5)
    for ours, theirs in zip(kept, all_kept, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_what_a_qwen3_keeps_are_normalised_keys_before_rotary():
    """Each head has the mean square one, but for the scales, wherever it stands."""
    config, params = model("qwen3")
    fresh = {"params": params, "beacon": init_beacon(params, config)}
    _, kept = run(config, fresh, tokens(W), Layout(W // RATIO, RATIO, 1))
    scale = np.asarray(params["layers"]["attention"]["k_norm"]["scale"])
    keys = np.asarray(kept.k) / scale[:, None, None, None]
    np.testing.assert_allclose((keys**2).mean(-1), 1, rtol=1e-3)
    same = np.insert(tokens(W), 0, tokens(W)[:, 0], axis=1)  # one place further
    _, moved = run(config, fresh, same[:, :W], Layout(1, W, 0))
    first = lambda x, i: np.asarray(x.k)[0, :, i]
    np.testing.assert_allclose(first(moved, 1), first(kept, 0), rtol=1e-5)


def trained_beacons(config, params):
    keys = iter(jax.random.split(jax.random.key(2), 100))
    noise = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)
    return jax.tree.map(noise, init_beacon(params, config))


@pytest.mark.slow
def test_a_qwen3_reads_text_at_once_in_pieces_and_token_by_token():
    config, params = model("qwen3")
    variables = {"params": params, "beacon": trained_beacons(config, params)}
    ids, plan, net = tokens(3 * W + 5), np.asarray([2, 4], np.int32), Net(config)

    def read(memory, part):
        lengths = jnp.full(B, part.shape[1])
        part = jnp.asarray(part)
        out, memory = feed(
            net, variables, memory, part, lengths, plan, outputs="logits"
        )
        assert out.logits is not None
        return np.asarray(out.logits)[:, -1], memory

    expected, memory = read(init_memory(config, B, 64), ids)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    found, pieces = None, init_memory(config, B, 64)
    for part in np.split(ids, [5, 7, 19], axis=1):
        found, pieces = read(pieces, part)
    close(found, expected)
    single = init_memory(config, B, 64)
    for token in ids.T:
        found, single = decode_step(
            net, variables, single, jnp.asarray(token), plan, static=(2, 4)
        )
    close(found, expected)
    slots = int(memory.slots[0])
    close(single.k[:, :, :slots], memory.k[:, :, :slots])


@pytest.mark.slow
@pytest.mark.parametrize(("offload", "rank"), [(False, 0), (True, 3)])
def test_all_weights_of_a_qwen3_get_the_gradients_of_plain_reverse_mode(offload, rank):
    """Those of its norms, too. XLA fuses these differently in front of one layer and of
    all, so that the last bits may differ; the tolerance is that of sums over devices.
    """
    config, params = model("qwen3")
    anchor = "last" if rank else "none"
    beacon = BeaconConfig(window=W, ratios=(2, 4), rank=rank, anchor=anchor)
    config = dataclasses.replace(config, beacon=beacon)
    own = {"params": params, "beacon": trained_beacons(config, params)}
    ids = tokens(3 * W).reshape(B, 3, W).swapaxes(0, 1)
    rows = {"tokens": ids, "labels": ids, "valid": np.full((3, B), W, np.int32)}

    def gradient(remat, offload=False):
        def loss(own):
            kind = LossConfig(ratios=(2, 4), remat=remat, offload=offload)
            plan = jnp.asarray((2, 4, 0))
            return train_loss(
                Net(config), own["beacon"], own["params"], rows, plan, kind
            )[0]

        return jax.jit(jax.value_and_grad(loss))(own)

    expected, gradients = gradient("window")
    for norm in ("q_norm", "k_norm"):
        x = gradients["params"]["layers"]["attention"][norm]["scale"]
        assert np.all(np.abs(x) > 0), norm
    for remat in ("lean", "lean-layer"):
        value, ours = gradient(remat, offload)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for path, x in jax.tree.leaves_with_path(gradients):
            name, scale = jax.tree_util.keystr(path), float(np.abs(x).max())
            np.testing.assert_allclose(
                dict(jax.tree.leaves_with_path(ours))[path],
                x,
                rtol=0,
                atol=2e-6 * scale,
                err_msg=name,
            )


def test_beacons_of_a_qwen3_have_no_norms_of_their_own():
    config, params = model("qwen3")
    for rank, anchor in ((0, "none"), (3, "none"), (3, "last")):
        beacon = BeaconConfig(window=W, ratios=(2,), rank=rank, anchor=anchor)
        fresh = init_beacon(params, dataclasses.replace(config, beacon=beacon))
        names = fresh["layers"]["attention"].keys()
        assert names == {"q_proj", "k_proj", "v_proj"}
