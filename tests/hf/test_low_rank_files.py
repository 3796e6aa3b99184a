"""Low-rank beacons in files: key names, round trips, and what is refused."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from beacon_jax.hf import identity, load, save_hf, tree_hash
from beacon_jax.hf.conversion import from_hf
from beacon_jax.model.config import BeaconConfig

RANK = 3
BEACON = BeaconConfig(window=16, ratios=(2, 4), param=("q", "o"), rank=RANK)


def trained(folder):
    """The base in a folder with low-rank beacons that are not zero."""
    fresh = load(folder, beacon=BEACON, seed=1)
    rng = np.random.default_rng(2)
    for part in fresh.variables["beacon"]["layers"]["attention"].values():
        for name, x in part.items():
            part[name] = x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype)
    return fresh


@pytest.fixture
def base(make_checkpoint, config_of):
    return make_checkpoint(config_of("qwen2", tie_word_embeddings=True))


def test_a_and_b_have_names_of_their_own_and_lie_as_linear_layers(base, tmp_path):
    model = trained(base)
    save_hf(tmp_path / "low", model.config, model.variables, base)
    found = load_file(tmp_path / "low" / "model.safetensors")
    layer = "model.layers.2.self_attn.beacon_{}_proj.lora_{}.weight"
    own = model.variables["beacon"]["layers"]["attention"]
    shapes = {("q", "A"): (RANK, 16), ("q", "B"): (24, RANK), ("o", "A"): (RANK, 24)}
    for (p, end), shape in ({**shapes, ("o", "B"): (16, RANK)}).items():
        tensor = found[layer.format(p, end)]
        ours = own[f"{p}_proj"][f"lora_{end.lower()}"][2]
        assert tensor.shape == shape
        np.testing.assert_array_equal(tensor.T.reshape(-1), ours.reshape(-1))
    names = [k for k in found if "beacon" in k]
    assert len(names) == 3 * 4 + 1
    # x A B of HF's layout: B @ (A @ x).
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    low = np.einsum("d,dr->r", x, own["q_proj"]["lora_a"][2])
    ours = np.einsum("r,rnh->nh", low, own["q_proj"]["lora_b"][2]).reshape(-1)
    a, b = (found[layer.format("q", end)] for end in "AB")
    np.testing.assert_allclose(ours, b @ (a @ x), rtol=1e-5, atol=1e-6)


def test_what_is_written_is_read_again_in_both_formats(base, tmp_path):
    model = trained(base)
    save_hf(tmp_path / "low", model.config, model.variables, base)
    from_hf(tmp_path / "low", tmp_path / "ours")
    expected = tree_hash(model.variables["beacon"])
    for folder in (tmp_path / "low", tmp_path / "ours"):
        again = load(folder)
        assert again.config == model.config and not again.untrained
        assert again.beacon_hash == again.identity.beacon == expected
        assert identity(folder) == again.identity
        assert again.base_hash == load(base).base_hash


def test_fresh_ones_follow_from_the_seed_and_are_known_by_their_hash(base, tmp_path):
    from_hf(base, tmp_path / "ours")
    one = load(base, beacon=BEACON)
    assert one.untrained
    hashes = [
        load(folder, beacon=BEACON, seed=seed).identity.beacon
        for folder in (base, tmp_path / "ours")
        for seed in (0, 1)
    ]
    assert hashes[0] == hashes[2] == one.identity.beacon == one.beacon_hash
    assert hashes[1] == hashes[3] != hashes[0]


def test_another_rank_or_form_is_refused(
    base, tmp_path, make_checkpoint, config_of, beacon_fields
):
    model = trained(base)
    save_hf(tmp_path / "low", model.config, model.variables, base)
    from_hf(tmp_path / "low", tmp_path / "ours")
    replace = dataclasses.replace
    for folder in (tmp_path / "low", tmp_path / "ours"):
        with pytest.raises(ValueError, match="wrong shape: .*lora_"):
            load(folder, beacon=replace(BEACON, rank=4))
        with pytest.raises(ValueError, match="beacon_rank=0: .*give the rank"):
            load(folder, beacon=replace(BEACON, rank=0))
    whole = make_checkpoint(config_of("llama", **beacon_fields), name="whole")
    from_hf(whole, tmp_path / "whole-ours")
    for folder in (whole, tmp_path / "whole-ours"):
        with pytest.raises(ValueError, match=r"beacon_rank=3: .*have beacon_rank=0"):
            load(folder, beacon=replace(BEACON, param=("q", "k", "v")))


def test_a_rank_without_its_tensors_is_not_converted(
    tmp_path, make_checkpoint, config_of, tensors_of, beacon_fields
):
    hf = config_of("llama", **beacon_fields, beacon_rank=RANK)
    src = make_checkpoint(hf, tensors_of(config_of("llama")))
    with pytest.raises(ValueError, match=r"beacon_rank=3.*no .*lora_A.*remove"):
        from_hf(src, tmp_path / "ours")
