"""Hashes of weights: one definition for every format, computed when asked for."""

import gc
import os
import weakref

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from beacon_jax.hf import Identity, checkpoint, identify, identity, load
from beacon_jax.hf.conversion import from_hf
from beacon_jax.hf.hashing import tree_hash
from beacon_jax.model.config import BeaconConfig


@pytest.fixture
def both(tmp_path, make_checkpoint, config_of, beacon_fields):
    """The same model as an HF folder and as a converted one."""
    src = make_checkpoint(config_of("qwen2", **beacon_fields), shards=2)
    from_hf(src, tmp_path / "ours")
    return src, tmp_path / "ours"


def hashes(checkpoint):
    variables = checkpoint.variables
    return Identity(tree_hash(variables["params"]), tree_hash(variables["beacon"]))


def test_every_form_of_a_model_has_the_same_identity(
    tmp_path, both, make_checkpoint, config_of, beacon_fields
):
    one_file = make_checkpoint(config_of("qwen2", **beacon_fields), name="one file")
    expected = hashes(load(both[0]))
    assert expected.base and expected.beacon
    for path in (*both, one_file):
        assert identity(path) == identity(str(path)) == expected
        assert identity(load(path)) == expected


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"beacon": BeaconConfig(window=32, param=("q", "k", "v", "o"))},
        {
            "place": lambda config, name, shape: (
                SingleDeviceSharding(jax.devices()[0]),
                np.dtype("float16" if name.startswith("beacon") else "float32"),
            )
        },
    ],
    ids=["cast", "more beacons", "placed"],
)
def test_a_loaded_model_s_identity_is_of_the_variables_it_has(both, converted, options):
    found = load(both[converted], **options)
    assert found.identity == hashes(found)
    assert found.identity.base == found.base_hash
    assert found.identity.beacon == found.beacon_hash
    if "place" not in options:
        assert found.identity != identity(both[converted])


def test_a_base_has_no_beacon_hash_and_fresh_beacons_have_one(
    tmp_path, make_checkpoint, config_of
):
    path = make_checkpoint(config_of("llama"))
    from_hf(path, tmp_path / "ours")
    for folder in (path, tmp_path / "ours"):
        assert identity(folder).beacon is None
        assert load(folder).identity == identity(folder)
        fresh = load(folder, beacon=BeaconConfig(window=16, ratios=(4,)))
        assert fresh.identity == hashes(fresh)
        assert fresh.identity.base == identity(folder).base


def test_nothing_is_hashed_until_it_is_asked_for_and_then_once(both, monkeypatch):
    made = []
    real = identify.TreeHash
    monkeypatch.setattr(identify, "TreeHash", lambda: made.append(1) or real())
    identify._folder_hash.cache_clear()
    for found in (load(both[1]).identity, identity(both[1])):
        assert found.base and found.beacon and not made  # stored at conversion
    first, second = load(both[0]).identity, identity(load(both[0]))
    assert "not computed yet" in repr(first) and not made
    assert first.base and first.base and second.base == first.base
    assert len(made) == 1
    assert first.base[:16] in repr(first)
    assert "beacon=(not computed yet)" in repr(first)


def test_an_identity_keeps_no_weights_alive(both):
    found = load(both[0])
    kept = weakref.ref(found.variables["params"]["embed"]["embedding"])
    known = found.identity
    del found
    gc.collect()
    assert kept() is None
    assert known == identity(both[0])


def test_weights_that_changed_since_they_were_loaded_are_not_hashed(both):
    found = load(both[0]).identity
    file = sorted(both[0].glob("*.safetensors"))[0]
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match="changed since they were loaded.*load the"):
        _ = found.base


def test_a_changed_weight_changes_the_hash_of_its_part_only(tmp_path, both):
    model = load(both[1])
    beacon = model.variables["beacon"]["embed"]["embedding"]
    beacon[0, 0] += 1
    checkpoint.save_hf(tmp_path / "changed", model.config, model.variables, both[0])
    other = identity(tmp_path / "changed")
    assert other.base == identity(both[0]).base
    assert other.beacon != identity(both[0]).beacon
    assert other != identity(both[0]) and len({other, identity(both[0])}) == 2
