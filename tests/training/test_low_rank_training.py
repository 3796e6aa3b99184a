"""Training low-rank beacons: meshes, resuming, and what a run leaves."""

import dataclasses
import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import beacon_jax
from beacon_jax import hf
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from beacon_jax.model.partition import RULES
from beacon_jax.model.presets import get_preset
from beacon_jax.model.shapes import param_shapes
from beacon_jax.training import trainer
from beacon_jax.training.check import check_settings
from beacon_jax.training.checkpoint import CheckpointError, changes
from beacon_jax.training.config import default_config
from beacon_jax.training.memory import step_bytes
from beacon_jax.training.sharding import (
    make_placement,
    make_value_and_grad,
    map_named,
    put,
)
from beacon_jax.training.trainer import train
from tests.tiny import tiny
from tests.training.test_trainer import kill_after_step_3, losses, weights

N, B, W = 3, 8, 4
MODEL = tiny(
    vocab_size=14,
    max_position=64,
    beacon=BeaconConfig(window=W, ratios=(2, 4), param=("q", "k", "v", "o"), rank=3),
)


@functools.cache
def on_mesh(data, fsdp, tensor):
    """(loss, gradients, A of q) of a batch, everything where the placement wants it."""
    sizes = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    placement = make_placement(sizes, ConfigDict(RULES), (B,))
    params = nn.unbox(init_variables(MODEL, jax.random.key(0)))["params"]
    params = jax.tree.map(lambda x: np.asarray(2 * x), params)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = lambda x: np.asarray(x + 0.1 * jax.random.normal(next(keys), x.shape))
    trained = {"beacon": jax.tree.map(noise, init_beacon(params, MODEL))}
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 13, (N, B, W)).astype(np.int32)
    batch = {"tokens": tokens, "labels": tokens, "valid": np.full((N, B), W, np.int32)}

    def loss(trained, frozen, batch, plan, partition):
        return train_loss(
            Net(MODEL, partition=partition),
            trained["beacon"],
            frozen["params"],
            batch,
            plan,
            LossConfig(),
        )

    shardings = placement.trained(MODEL, trained)
    run = jax.jit(make_value_and_grad(loss, placement, shardings))
    trained = jax.tree.map(put, trained, shardings)
    frozen = {"params": params}
    frozen = jax.tree.map(put, frozen, placement.frozen(MODEL, frozen))
    plans = np.repeat(np.asarray([[2], [4], [2]], np.int32), placement.plans, axis=1)
    (value, _), gradients = run(
        trained, frozen, placement.batch(batch), placement.plan(plans)
    )
    a = trained["beacon"]["layers"]["attention"]["q_proj"]["lora_a"]
    return value, gradients, a.sharding.shard_shape(a.shape)


@pytest.mark.parametrize(
    ("mesh", "shard"),
    [
        pytest.param((8, 1, 1), (2, 2, 3), marks=pytest.mark.slow),
        ((2, 2, 2), (2, 8, 3)),
    ],
    ids=str,
)
def test_eight_devices_give_the_loss_and_gradients_of_one(mesh, shard):
    expected, theirs, _ = on_mesh(1, 1, 1)
    value, ours, a = on_mesh(*mesh)
    assert a == shard
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = float(jnp.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6 * scale)


@pytest.fixture
def low(config):
    """Six steps of low-rank beacons on the base."""
    config.beacon.rank = 4
    return config


def loss_of(model, tokens):
    """Of texts of three windows, the first two with beacons, at every ratio."""
    batch = {"tokens": tokens, "labels": tokens}
    batch["valid"] = np.full(tokens.shape[:2], 8, np.int32)
    beacon, params = model.variables["beacon"], model.variables["params"]
    settings = LossConfig(skip_first_window=True)
    found = [
        train_loss(Net(model.config), beacon, params, batch, np.asarray(p), settings)[0]
        for p in ((2, 2, 0), (4, 4, 0))
    ]
    return float(np.mean(found))


@pytest.mark.slow
def test_a_few_steps_lower_the_loss_and_leave_the_base(low, base, text, tmp_path):
    low.optimizer.update({"lr": 1e-2, "warmup": 0, "decay_start": 0.5})
    low.data.stages.stage1.update({"steps": 40, "batch_size": 8})
    low.log_every = 10
    summary = train(low, tmp_path)
    before, after = hf.load(base / "export"), hf.load(tmp_path / "export")
    assert summary["base_hash_before"] == summary["base_hash_after"]
    assert before.base_hash == after.base_hash == summary["base_hash_after"]
    assert after.config.beacon is not None and after.config.beacon.rank == 4
    # A row; of q and of k and v A (16, 4) and B (4, 16 or 8).
    assert summary["trained_parameters"] == 16 + 3 * 64 + 64 + 2 * 32
    own = after.variables["beacon"]["layers"]["attention"]
    # What a beacon asks in the last layer, the only one here, nobody reads.
    assert [bool(np.any(own[f"{p}_proj"]["lora_b"])) for p in "qkv"] == [0, 1, 1]
    tokenizer = hf.load_tokenizer(tmp_path / "export")
    ids = np.asarray(tokenizer.encode((text / "3.txt").read_text())[: 8 * 24])
    tokens = ids.reshape(8, 3, 8).swapaxes(0, 1).astype(np.int32)
    start = hf.load(base / "export", beacon=after.config.beacon)
    assert loss_of(after, tokens) < loss_of(start, tokens) - 0.01


@pytest.mark.slow
def test_resume_is_bit_identical_and_another_rank_is_refused(
    low, tmp_path, monkeypatch
):
    train(low, tmp_path / "whole")
    monkeypatch.setattr(trainer.Signals, "after", kill_after_step_3)
    with pytest.raises(SystemExit):
        train(low, tmp_path / "parts")
    monkeypatch.undo()
    low.beacon.rank = 2
    with pytest.raises(ValueError, match=r"config.beacon.rank: 4 -> 2\nUse another"):
        train(low, tmp_path / "parts")
    low.allow_config_change = True
    with pytest.raises(CheckpointError, match=r"lora_a.*\[1, 16, 4\].*\[1, 16, 2\]"):
        train(low, tmp_path / "parts")
    low.beacon.rank = 4
    low.allow_config_change = False
    assert train(low, tmp_path / "parts")["steps_of_this_process"] == 3
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_the_estimate_of_a_7b_step_is_that_of_the_docs():
    """One row of 8,192 tokens in bfloat16 on one device, in GiB (docs/training.md)."""
    config = default_config()
    config.dtype = "bfloat16"
    placement = make_placement(config.mesh, config.rules, [1], jax.devices()[:1])

    def estimate(rank):
        preset = get_preset("llama2-7b")
        assert preset.beacon is not None
        beacon = dataclasses.replace(preset.beacon, rank=rank)
        model = dataclasses.replace(preset, beacon=beacon)

        def arrays(part, dtype):
            def make(name, shape):
                own = part == "beacon"
                where = placement.variable(model, name, shape, trained=own)
                return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

            tree = {part: param_shapes(model)[part]}
            return map_named(make, tree, lambda x: isinstance(x, tuple))

        trees = arrays("beacon", jnp.float32), arrays("params", jnp.bfloat16)
        needs = step_bytes(config, model, placement, *trees, rows=1, windows=8)
        return [round(needs[remat] / 2**30, 1) for remat in ("lean", "lean-layer")]

    assert estimate(0) == [60.5, 51.4]
    assert estimate(64) == [31.7, 22.6]


def test_a_run_from_before_there_were_ranks_goes_on():
    record = lambda **beacon: {"config": {"beacon": {"window": 8, **beacon}}}
    assert not changes(record(), record(rank=0))
    assert changes(record(), record(rank=4)) == ["config.beacon.rank: 0 -> 4"]


def test_the_seed_of_a_run_draws_its_a(low, tmp_path):
    low.data.stages.stage1.steps = 1
    low.optimizer.lr = 1e-9
    found = []
    for seed in (0, 1):
        low.seed = seed
        train(low, tmp_path / str(seed))
        found.append(hf.load(tmp_path / str(seed) / "export").variables["beacon"])
    a, b = (x["layers"]["attention"]["q_proj"]["lora_a"] for x in found)
    assert np.abs(a - b).max() > 0.1


def test_all_parameters_and_a_rank_are_refused(low, tmp_path):
    low.trainable = "all"
    with pytest.raises(ValueError, match=r"beacon.rank=4 .*trainable='all'.*set beac"):
        check_settings(low, tmp_path)


def test_a_run_leaves_beacons_that_its_base_takes(low, base, tmp_path):
    """The checkpoint of a run becomes an adapter, too, and what the release reads."""
    train(low, tmp_path / "run")
    whole = beacon_jax.load(tmp_path / "run" / "export")
    alone = tmp_path / "run" / "adapter"
    model = beacon_jax.load(base / "export", beacons=alone)
    assert model.config == whole.config and model.identity == whole.identity
    prompt = np.arange(3, 40)
    options: dict = {"ratio": 2, "max_new_tokens": 4}
    assert model.generate(prompt, **options) == whole.generate(prompt, **options)
    for extra, name in (("--adapter", "again"), ("--noadapter", "release")):
        run = [sys.executable, "-m", "beacon_jax.convert", "to-hf", extra]
        run += [f"--src={tmp_path / 'run'}", f"--dst={tmp_path / name}"]
        said = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        assert ("W + A B in float32: KL per token" in said) == (name == "release")
    for path in alone.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    release = beacon_jax.load(tmp_path / "release")
    assert release.config.beacon is not None and release.config.beacon.rank == 0
    assert release.generate(prompt, **options) == whole.generate(prompt, **options)
