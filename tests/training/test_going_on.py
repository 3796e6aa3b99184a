"""A run that begins with the beacons of another one, and goes on in its data."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

import beacon_jax
from beacon_jax import hf
from beacon_jax.data.batches import BatchConfig, Batches
from beacon_jax.training.check import check_settings
from beacon_jax.training.checkpoint import BEFORE, changes
from beacon_jax.training.config import default_config
from beacon_jax.training.inputs import Inputs
from beacon_jax.training.trainer import export_checkpoint, train
from tests.training.test_trainer import losses


@pytest.fixture(scope="module")
def first(six_steps, tmp_path_factory):
    """Six steps of low-rank beacons, in float32 and in bfloat16."""
    workdir = tmp_path_factory.mktemp("first")
    config: Any = ConfigDict(six_steps.to_dict())
    config.beacon.rank = 4
    config.optimizer.lr = 1e-2
    train(config, workdir / "float32")
    config.dtype = "bfloat16"
    train(config, workdir / "bfloat16")
    return workdir


@pytest.fixture
def on(config, first):
    """Two steps on from there."""
    config.beacon.rank = 4
    config.beacons_from = str(first / "float32" / "adapter")
    config.data.stages.stage1.steps = 2
    config.data.first_step = 6
    return config


def beacons(folder, base, dtype=None):
    model = beacon_jax.load(base / "export", beacons=folder, dtype=dtype)
    return model.variables["beacon"]["layers"]["attention"]


def test_beacons_start_where_the_adapter_ended(on, base, first, tmp_path):
    on.optimizer.update({"lr": 1e-12, "warmup": 0})
    summary = train(on, tmp_path)
    assert summary["steps_of_this_process"] == 2
    before, after = (
        beacons(w / "adapter", base) for w in (first / "float32", tmp_path)
    )
    for name in ("k_proj", "v_proj"):
        b = np.asarray(before[name]["lora_b"])
        assert np.abs(b).max() > 1e-3  # fresh ones are zero
        np.testing.assert_allclose(after[name]["lora_b"], b, atol=1e-9)


def test_a_run_that_goes_on_is_exported_without_the_adapter(on, tmp_path, first):
    adapter = tmp_path / "adapter"
    shutil.copytree(first / "float32" / "adapter", adapter)
    on.beacons_from = str(adapter)
    train(on, tmp_path / "run")
    shutil.rmtree(adapter)
    assert export_checkpoint(tmp_path / "run", tmp_path / "again") == 2
    one, other = (hf.load(tmp_path / n) for n in ("run/export", "again"))
    assert one.beacon_hash == other.beacon_hash


def test_the_data_goes_on_at_the_step(config, first, text):
    tokenizer = hf.load_tokenizer(first / "float32" / "export")
    stream = np.arange(2000, dtype=np.int32) % 250
    model = hf.load(first / "float32" / "export").config
    config.uniform_plans = 0.5
    config.data.stages.stage1.mix.update({"passkey": 1.0})
    config.data.stages.stage1.length = 96
    model = dataclasses.replace(model, max_position=200)

    def inputs(first_step):
        config.data.first_step = first_step
        batches = Batches(stream, tokenizer, BatchConfig.of(config))
        return Inputs(config, model, batches, count=2)

    whole, on = inputs(0), inputs(3)
    config.data.first_step = 0
    expected = [whole[step] for step in range(6)]
    config.data.first_step = 3
    for step in range(3):
        found = on[step]
        np.testing.assert_array_equal(found.plans, expected[step + 3].plans)
        for key, value in found.batch.items():
            np.testing.assert_array_equal(value, expected[step + 3].batch[key])
    assert any((on[i].plans != expected[i].plans).any() for i in range(3))


def test_an_adapter_of_a_16_bit_run_has_16_bits_and_its_base_takes_it(base, first):
    adapter = first / "bfloat16" / "adapter"
    small = (adapter / "beacons.safetensors").stat().st_size
    assert (
        small < (first / "float32" / "adapter" / "beacons.safetensors").stat().st_size
    )
    whole = hf.load(first / "bfloat16" / "export", dtype="bfloat16").variables["beacon"]
    same = beacons(adapter, base, "bfloat16")
    for name, own in beacons(adapter, base).items():
        theirs = whole["layers"]["attention"][name]["lora_b"]
        assert own["lora_b"].dtype == np.float32  # as the base
        np.testing.assert_array_equal(same[name]["lora_b"], theirs)
        np.testing.assert_array_equal(own["lora_b"], theirs.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"beacon.rank": 2},
            r"has rank=4, beacon.rank is 2: set beacon.rank to theirs",
        ),
        (
            {"beacon.param": ("k", "v")},
            r"has param=.*, beacon.param is .*: set beacon.p",
        ),
        ({"beacons_from": "/nope"}, "beacons_from=/nope"),
        ({"beacon.use": False, "trainable": "all"}, "and beacon.use=False: name the b"),
        ({"data.first_step": -1}, "data.first_step=-1 must not be negative"),
    ],
)
def test_what_cannot_go_on_is_an_error_with_its_key(on, tmp_path, changes, message):
    on.beacon.rank = 4
    if not changes.get("beacon.use", True):
        on.beacon.rank = 0
    on.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_settings(on, tmp_path)


def test_beacons_of_another_base_are_refused(on, base, text, tmp_path):
    other = tmp_path / "other"
    checkpoint = hf.load(base / "export")
    params = {**checkpoint.variables["params"]}
    params["final_norm"] = {"scale": params["final_norm"]["scale"] * 2}
    hf.save_hf(
        other, checkpoint.config, {"params": params, "beacon": {}}, base / "export"
    )
    on.init_from = str(other)
    with pytest.raises(ValueError, match=r"another base than .*: set init_from to the"):
        train(on, tmp_path / "run")
    assert not losses_of(tmp_path / "run")


def losses_of(workdir):
    return (workdir / "metrics.jsonl").exists() and losses(workdir)


def test_first_step_is_for_stages(on, tmp_path):
    on.data.stages = ConfigDict()
    with pytest.raises(ValueError, match="data.first_step=6: without effect"):
        check_settings(on, tmp_path)


def test_runs_from_before_a_setting_go_on():
    now = {"config": default_config().to_dict()}
    old = json.loads(json.dumps(now))
    for key in BEFORE:
        *path, name = key.split(".")
        tree = functools.reduce(dict.__getitem__, path, old)
        assert name in tree, key  # a setting of today
        del tree[name]
    assert changes(old, now) == []
