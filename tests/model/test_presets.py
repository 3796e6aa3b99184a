"""Presets have the published sizes; fresh beacons have the declared shapes."""

import dataclasses

import jax
import numpy as np
import pytest

from beacon_jax.hf.keys import flatten
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.presets import PARAMETERS, PRESETS, count_params, get_preset
from beacon_jax.model.shapes import param_shapes


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name):
    base, beacon = count_params(get_preset(name))
    assert base == PARAMETERS[name]
    assert beacon > 0
    plain = dataclasses.replace(PRESETS[name], beacon=None)
    assert count_params(plain) == (base, 0)


@pytest.mark.parametrize(
    ("name", "billions"), [("llama2-7b", 1.611), ("qwen2-7b", 0.463)]
)
def test_beacons_add_what_the_paper_says(name, billions):
    assert round(count_params(PRESETS[name])[1] / 1e9, 3) == billions


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_config_json(name):
    assert ModelConfig.from_hf(PRESETS[name].to_hf()) == PRESETS[name]


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(
        ValueError, match=r"preset='gpt2' is unknown: use tiny, smollm2"
    ):
        get_preset("gpt2")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("param", [(), ("k",), ("q", "k", "v", "o")])
def test_fresh_beacons_have_the_declared_shapes(name, param):
    changes = {"param": param} | ({} if param else {"rank": 0, "anchor": "none"})
    beacon = dataclasses.replace(PRESETS[name].beacon or BeaconConfig(), **changes)
    config = dataclasses.replace(PRESETS[name], beacon=beacon)
    shapes = param_shapes(config)
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "bfloat16"),
        shapes["params"],
        is_leaf=lambda x: isinstance(x, tuple),
    )
    fresh = jax.eval_shape(lambda p: init_beacon(p, config), params)
    assert {k: x.shape for k, x in flatten(fresh)} == dict(flatten(shapes["beacon"]))
    assert {x.dtype.name for _, x in flatten(fresh)} == {"bfloat16"}


@pytest.mark.parametrize(("embed_init", "token"), [("eos", 2), ("bos", 1)])
def test_a_fresh_beacon_is_the_named_token_and_copies_of_the_base(embed_init, token):
    beacon = BeaconConfig(window=32, param=("q", "o"), embed_init=embed_init)
    config = dataclasses.replace(PRESETS["tiny"], beacon=beacon, eos_ids=(2, 7))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        param_shapes(config)["params"],
        is_leaf=lambda x: isinstance(x, tuple),
    )
    fresh = init_beacon(params, config)
    row = params["embed"]["embedding"][token : token + 1]
    np.testing.assert_array_equal(fresh["embed"]["embedding"], row)
    base = params["layers"]["attention"]
    for name in ("q_proj", "o_proj"):
        copy = fresh["layers"]["attention"][name]["kernel"]
        np.testing.assert_array_equal(copy, base[name]["kernel"])
        assert not np.shares_memory(copy, base[name]["kernel"])


@pytest.mark.parametrize("ids", [(), (1024,)])
def test_a_beacon_needs_the_token_it_starts_from(ids):
    config = dataclasses.replace(PRESETS["tiny"], eos_ids=ids)
    with pytest.raises(ValueError, match=r"embed_init='eos' needs eos_token_id"):
        init_beacon({}, config)
    with pytest.raises(ValueError, match="give a BeaconConfig"):
        init_beacon({}, dataclasses.replace(config, beacon=None))
