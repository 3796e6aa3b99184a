"""Adapter folders: beacons alone, on the base they were trained on and no other."""

import dataclasses
import json
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import beacon_jax
from beacon_jax.hf import load, save_hf, tree_hash
from beacon_jax.hf.adapter import (
    materialised,
    open_adapter,
    write_adapter,
)
from beacon_jax.hf.conversion import from_hf
from beacon_jax.hf.hub import needed_files
from beacon_jax.hf.identify import base_values_hash
from beacon_jax.inference.merging import beacon_kl, merge
from beacon_jax.model.config import BeaconConfig

BEACON = BeaconConfig(window=16, ratios=(2, 4), param=("q", "k", "v"), rank=3)


def trained(folder, beacon=BEACON):
    """A base with beacons that are not what they start as."""
    fresh = load(folder, beacon=beacon, quiet=True)
    rng = np.random.default_rng(2)
    noise = lambda x: (x + 0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
    own = fresh.variables["beacon"]["layers"]["attention"]
    for part in own.values():
        part.update({name: noise(x) for name, x in part.items()})
    return fresh


@pytest.fixture
def base(make_checkpoint, config_of):
    """In bfloat16, without a tokenizer that could be loaded."""
    folder = make_checkpoint(config_of("qwen2"), dtype=ml_dtypes.bfloat16)
    (folder / "tokenizer.json").unlink()
    return folder


@pytest.fixture
def whole(base, tmp_path):
    """The base with beacons, as a run exports it."""
    model = trained(base)
    save_hf(tmp_path / "whole", model.config, model.variables, base)
    return tmp_path / "whole"


@pytest.fixture
def adapter(whole, tmp_path):
    write_adapter(whole, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_has_the_beacons_and_the_hash_of_the_base_and_nothing_else(
    base, whole, adapter
):
    assert {p.name for p in adapter.iterdir()} == {"beacons.safetensors", "config.json"}
    every = load_file(whole / "model.safetensors")
    found = load_file(adapter / "beacons.safetensors")
    expected = {k: x for k, x in every.items() if "beacon" in k}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name].view(np.uint8), x.view(np.uint8))
    hf = json.loads((adapter / "config.json").read_text())
    stored = load(base).base_hash
    expected = {"values": base_values_hash(base), "stored": stored}
    assert hf["beacon_rank"] == 3 and hf["beacon_base"] == expected


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_on_the_base_it_is_the_whole_model_with_its_identity(
    base, whole, adapter, tmp_path, dtype
):
    from_hf(base, tmp_path / "ours")
    expected = beacon_jax.load(whole, dtype=dtype)
    for folder in (base, tmp_path / "ours", whole):
        found = beacon_jax.load(folder, dtype=dtype, beacons=adapter)
        assert found.config == expected.config
        for part in ("params", "beacon"):
            hashes = [tree_hash(m.variables[part]) for m in (found, expected)]
            assert hashes[0] == hashes[1]
        assert found.identity == expected.identity


def test_a_mesh_and_other_settings_are_as_with_a_whole_model(base, adapter):
    beacon = dataclasses.replace(BEACON, ratios=(8,))
    found = beacon_jax.load(base, beacons=adapter, beacon=beacon, mesh="tensor:2")
    assert found.config.beacon == beacon
    b = found.variables["beacon"]["layers"]["attention"]["k_proj"]["lora_b"]
    assert b.sharding.shard_shape(b.shape) == (3, 3, 1, 6)
    expected = load_file(adapter / "beacons.safetensors")
    name = "model.layers.1.self_attn.beacon_k_proj.lora_B.weight"
    ours = np.asarray(b)[1].reshape(3, 12).T
    np.testing.assert_array_equal(ours, expected[name])
    with pytest.raises(ValueError, match="wrong shape: .*lora_A"):
        beacon_jax.load(
            base, beacons=adapter, beacon=dataclasses.replace(beacon, rank=2)
        )


def test_the_same_values_are_the_same_base_in_any_format_and_dtype(
    base, adapter, tmp_path, monkeypatch
):
    expected = open_adapter(adapter).values
    from_hf(base, tmp_path / "float32", dtype="float32")
    from_hf(base, tmp_path / "bfloat16")
    assert {base_values_hash(tmp_path / n) for n in ("float32", "bfloat16")} == {
        expected
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beacon_jax.load(tmp_path / "float32", beacons=adapter)
    # A folder that was converted without a cast knows its hash: nothing is read.
    monkeypatch.setattr("beacon_jax.hf.adapter.base_values_hash", lambda *_: "read")
    config = load(base).config
    found = open_adapter(adapter)
    assert found.other_base(tmp_path / "bfloat16", config) == ""
    assert "read here" in found.other_base(tmp_path / "float32", config)


def test_another_base_of_the_same_shapes_needs_to_be_allowed(base, adapter):
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"beacons=.*another base.*allow_other_base"):
        beacon_jax.load(base, beacons=adapter)
    with pytest.warns(UserWarning, match=r"another base than .*hf \(hash"):
        beacon_jax.load(base, beacons=adapter, allow_other_base=True)


def test_a_base_with_other_settings_is_another_one(base, adapter):
    hf = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(hf | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match="rms_norm_eps=1e-05 there, 1e-06 here"):
        beacon_jax.load(base, beacons=adapter)


def test_other_shapes_are_refused_even_if_allowed(adapter, make_checkpoint, config_of):
    hf = config_of("qwen2", intermediate_size=32)
    tensors = {}
    small = make_checkpoint(hf, tensors, name="small")
    with pytest.raises(ValueError, match="intermediate_size=24 there, 32 here"):
        beacon_jax.load(small, beacons=adapter, allow_other_base=True)


def test_folders_in_the_wrong_place_are_named_with_the_remedy(base, whole, adapter):
    with pytest.raises(FileNotFoundError, match="has beacons alone: load the base"):
        beacon_jax.load(adapter)
    with pytest.raises(FileNotFoundError, match=r"no beacons.safetensors: give a fol"):
        beacon_jax.load(base, beacons=whole)
    with pytest.raises(FileNotFoundError, match=r"beacons=.*nowhere"):
        beacon_jax.load(base, beacons=str(base / "nowhere"))
    with pytest.raises(TypeError, match="beacons=5 .*give an adapter folder"):
        beacon_jax.load(base, beacons=5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no trained beacons"):
        write_adapter(base, base.with_name("new"))
    names = ["config.json", "beacons.safetensors", "README.md"]
    assert needed_files(names) == names[:2]


def test_beacons_of_their_own_fit_into_an_adapter_folder_too(base, tmp_path):
    model = trained(base, dataclasses.replace(BEACON, rank=0))
    save_hf(tmp_path / "release", model.config, model.variables, base)
    write_adapter(tmp_path / "release", tmp_path / "adapter")
    found = beacon_jax.load(base, beacons=tmp_path / "adapter")
    assert tree_hash(found.variables["beacon"]) == tree_hash(model.variables["beacon"])


def test_merging_keeps_biases_and_says_how_far_it_is(whole, tmp_path):
    said = merge(whole, tmp_path / "merged")
    low, merged = load(whole), load(tmp_path / "merged")
    assert merged.config.beacon == dataclasses.replace(BEACON, rank=0)
    hf = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "beacon_rank" not in hf
    kl = beacon_kl((low.config, low.variables), (merged.config, merged.variables))
    assert f"mean {kl.mean():.2e}, max {kl.max():.2e}" in said
    q = low.variables["params"]["layers"]["attention"]["q_proj"]
    own = merged.variables["beacon"]["layers"]["attention"]["q_proj"]
    np.testing.assert_array_equal(own["bias"], q["bias"])
    low = low.variables["beacon"]["layers"]["attention"]["q_proj"]
    a, b = (low[x].astype(np.float32) for x in ("lora_a", "lora_b"))
    expected = q["kernel"].astype(np.float32) + np.einsum("ldr,lrnh->ldnh", a, b)
    assert np.abs(own["kernel"] - expected).max() < 0.01 * np.abs(expected).max()


def test_the_dtype_is_that_of_the_base_only_where_little_is_lost(whole, tmp_path):
    # Logits 64 times as far apart: what bfloat16 rounds away shows.
    for factor, kind in ((1, "bfloat16"), (64, "float32")):
        model = load(whole)
        head = model.variables["params"]["lm_head"]
        head["kernel"] = head["kernel"] * np.asarray(factor, ml_dtypes.bfloat16)
        folder = tmp_path / kind
        save_hf(folder, model.config, model.variables, whole)
        said = merge(folder, tmp_path / f"merged-{kind}")
        assert said.startswith(f"W + A B in {kind}: KL per token against rank 3 mean")
        made = load(tmp_path / f"merged-{kind}").variables["beacon"]
        assert made["layers"]["attention"]["q_proj"]["kernel"].dtype.name == kind
    with pytest.raises(ValueError, match="no low-rank beacons"):
        merge(tmp_path / "merged-float32", tmp_path / "again")


def test_the_kl_of_the_exact_sum_is_nothing(whole):
    low = load(whole, dtype="float32")
    exact = materialised(low.config, low.variables)
    assert beacon_kl((low.config, low.variables), exact).max() < 1e-9
    fresh = trained(whole.with_name("hf"))
    moved = beacon_kl((low.config, low.variables), (fresh.config, fresh.variables))
    assert moved.max() < 1e-12  # the same noise
    other = low.variables["beacon"] | {"embed": {"embedding": np.zeros((1, 16))}}
    apart = {**low.variables, "beacon": other}
    assert beacon_kl((low.config, low.variables), (low.config, apart)).max() > 1e-3
