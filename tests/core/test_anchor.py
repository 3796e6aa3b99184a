"""Anchored beacons: changes of the keys and values of the token in front of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.flops import window
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from tests.core.test_low_rank import (
    B,
    W,
    batch,
    check_lean_modes,
    low_rank,
    variables,
)

pytestmark = pytest.mark.optimized


def anchored(**changes) -> ModelConfig:
    config = low_rank(**changes)
    assert config.beacon is not None
    beacon = dataclasses.replace(config.beacon, anchor="last")
    return dataclasses.replace(config, beacon=beacon)


CONFIG = anchored(family="qwen2", sink=2)


def entries(config, variables, ratio=4):
    """Keys and values [L, B, T, K, H] of a window, not rotated, and its layout."""
    layout = Layout(W // ratio, ratio, 1)
    model = Decoder(Net(config), layout, tuple(range(layout.length)))
    shape = (config.num_layers, B, 64, config.num_kv_heads, config.head_dim)
    buffer, tokens = jnp.zeros(shape), jnp.asarray(batch()["tokens"][0])
    _, kept, *_ = apply(
        model, variables, tokens, buffer, buffer, jnp.zeros((B,), jnp.int32)
    )
    return kept, layout


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("param", [("q", "k", "v"), ("q", "o")])
def test_fresh_beacons_are_copies_of_the_tokens_in_front_of_them(param, family):
    config = anchored(family=family, param=param)
    params = variables(config)["params"]
    fresh = {"params": params, "beacon": init_beacon(params, config)}
    kept, layout = entries(config, fresh)
    for x in kept:
        beacons = x[:, :, layout.beacon_index]
        np.testing.assert_array_equal(beacons, x[:, :, layout.beacon_index - 1])
    changed, _ = entries(config, variables(config))
    same = [np.allclose(x[:, :, 4], x[:, :, 3], atol=1e-3) for x in changed]
    assert same == [param == ("q", "o")] * 2  # what is not in param stays a copy


def test_a_beacons_key_is_its_anchors_projection_changed_and_then_normalised():
    """In the first layer, where the anchor's row is the token's embedding."""
    config = anchored(family="qwen3")
    weights = variables(config)
    kept, layout = entries(config, weights)
    params, own = (weights[name]["layers"]["attention"] for name in weights)
    layer = weights["params"]["layers"]
    rms = lambda x: np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
    table = np.asarray(weights["params"]["embed"]["embedding"], float)
    raw = table[batch()["tokens"][0][:, 3::4]]
    beacon = np.asarray(weights["beacon"]["embed"]["embedding"], float)
    x, row = (y / rms(y) * layer["input_norm"]["scale"][0] for y in (raw, beacon))
    a, b = (np.asarray(own["k_proj"][f"lora_{z}"][0], float) for z in "ab")
    k = np.tensordot(x, params["k_proj"]["kernel"][0], 1) + np.tensordot(row @ a, b, 1)
    expected = k / rms(k) * params["k_norm"]["scale"][0]
    found = kept.k[0][:, layout.beacon_index]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_text_read_as_a_whole_in_pieces_or_token_by_token_is_one():
    tokens = np.random.default_rng(1).integers(3, 31, (B, 3 * W + 6)).astype(np.int32)
    plan, net = np.asarray([2, 4], np.int32), Net(CONFIG)
    weights = variables(CONFIG)

    def read(memory, part):
        lengths = jnp.full(B, part.shape[1])
        out, memory = feed(
            net, weights, memory, jnp.asarray(part), lengths, plan, outputs="logits"
        )
        assert out.logits is not None
        return np.asarray(out.logits)[:, -1], memory

    whole, memory = read(init_memory(CONFIG, B, 64), tokens)
    pieces = init_memory(CONFIG, B, 64)
    for part in np.split(tokens, [5, 7, 19], axis=1):
        found, pieces = read(pieces, part)
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * whole.std())
    single = init_memory(CONFIG, B, 64)
    for token in tokens.T:
        found, single = decode_step(
            net, weights, single, jnp.asarray(token), plan, static=(2, 4)
        )
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5 * whole.std())
    slots = int(memory.slots[0])
    assert isinstance(single.k, jax.Array) and isinstance(memory.k, jax.Array)
    np.testing.assert_allclose(
        single.k[:, :, :slots], memory.k[:, :, :slots], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "kind", [pytest.param("labels", marks=pytest.mark.slow), "distil"]
)
def test_both_lean_modes_have_the_bits_of_plain_reverse_mode(kind):
    check_lean_modes(CONFIG, kind=kind)


def test_an_anchor_saves_the_products_of_beacons_with_k_and_v():
    plain = low_rank(family="qwen2", sink=2)
    saved = window(plain, 4, 0).base - window(CONFIG, 4, 0).base
    width = CONFIG.num_kv_heads * CONFIG.head_dim
    weights = 2 * CONFIG.num_layers * CONFIG.hidden_size * width
    assert saved == 2 * (W // 4) * weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"anchor": "first"}, "anchor='first' is unknown"),
        ({"rank": 0}, "anchor='last' with rank=0"),
        ({"placement": "append"}, "anchor='last' with placement='append'"),
    ],
)
def test_what_cannot_be_anchored_is_refused(changes, words):
    assert CONFIG.beacon is not None
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG.beacon, **changes)


def test_config_json_has_the_anchor_where_there_is_one():
    assert CONFIG.beacon is not None
    hf = CONFIG.beacon.to_hf()
    assert hf["beacon_anchor"] == "last"
    assert BeaconConfig.from_hf(hf) == CONFIG.beacon
    assert not {"beacon_anchor", "beacon_rank"} & set(BeaconConfig().to_hf())
