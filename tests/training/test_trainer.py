"""Runs of a tiny model: they learn, resume bit for bit, and refuse what is wrong."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
from absl import flags

from beacon_jax import hf
from beacon_jax import train as command
from beacon_jax.training import trainer
from beacon_jax.training.trainer import train

SMALL = {
    "family": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 1,
    "num_heads": 1,
    "num_kv_heads": 1,
    "head_dim": 8,
    "max_position": 64,
    "eos_ids": (2,),
    "bos_ids": (1,),
}


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def weights(workdir):
    return (workdir / "export" / "model.safetensors").read_bytes()


def test_loss_falls(base):
    rows = losses(base)
    assert rows[25] < rows[5] - 0.5
    assert (base / "export" / "tokenizer.json").exists()
    assert hf.load(base / "export").config.beacon is None
    assert any((base / "tensorboard").iterdir())


def test_only_beacons_change(config, base, tmp_path):
    summary = train(config, tmp_path)
    before, after = hf.load(base / "export"), hf.load(tmp_path / "export")
    assert summary["base_hash_before"] == summary["base_hash_after"]
    assert before.base_hash == after.base_hash == summary["base_hash_after"]
    start = hf.load(base / "export", beacon=after.config.beacon)
    row = [c.variables["beacon"]["embed"]["embedding"] for c in (start, after)]
    assert np.abs(row[0] - row[1]).max() > 1e-4
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss_x2", "loss_x4"} & row.keys()


def test_a_frozen_base_that_changes_is_an_error(config, tmp_path, monkeypatch):
    hashes = iter(["before", "after"])
    monkeypatch.setattr(trainer.hf, "tree_hash", lambda tree: next(hashes))
    with pytest.raises(RuntimeError, match="base changed.*before.*after"):
        train(config, tmp_path)


def test_resume_after_sigterm_is_bit_identical(config, tmp_path, monkeypatch, capsys):
    train(config, tmp_path / "whole")
    draw = trainer._inputs

    def kill_in_step_3(config, model, batches, step, devices):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(config, model, batches, step, devices)

    monkeypatch.setattr(trainer, "_inputs", kill_in_step_3)
    with pytest.raises(SystemExit) as stopped:
        train(config, tmp_path / "parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert list(losses(tmp_path / "parts")) == [1, 2, 3]
    monkeypatch.undo()
    summary = train(config, tmp_path / "parts")
    assert summary["steps_of_this_process"] == 3
    assert "going on from step 3" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_uniform_plans_have_the_share_of_steps_that_was_asked_for(config):
    model = trainer.ModelConfig(**SMALL, beacon=trainer.BeaconConfig(32, (2, 4, 8)))
    for share in (0.0, 0.25, 1.0):
        config.uniform_plans = share
        plans = [trainer._plan(config, model, 9, 288, [0, i, 1]) for i in range(400)]
        uniform = np.mean([len(set(p.tolist())) == 1 for p in plans])
        assert abs(uniform - share) < 0.07  # three standard deviations


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_falls_back(config, tmp_path, capsys, damage):
    train(config, tmp_path)
    expected = weights(tmp_path)
    data_files = [*(tmp_path / "checkpoints/6/state").rglob("d/*")]
    assert data_files
    for path in data_files:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        if damage == "flip":
            path.write_bytes(data)
        elif damage == "truncate":
            path.write_bytes(data[:10])
    if damage == "remove":
        shutil.rmtree(tmp_path / "checkpoints/6/record")
    summary = train(config, tmp_path)
    assert "checkpoint of step 6 is damaged" in capsys.readouterr().out
    assert summary["steps_of_this_process"] == 2
    assert weights(tmp_path) == expected


def test_another_config_is_refused(config, tmp_path):
    train(config, tmp_path)
    config.optimizer.lr = 2e-3
    config.log_every = 3  # changes no number
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.001 -> 0\.002\nUse"):
        train(config, tmp_path)
    config.allow_config_change = True
    assert train(config, tmp_path)["steps_of_this_process"] == 0


def test_updates_that_are_not_finite_stop_the_run(config, tmp_path):
    config.optimizer.update({"lr": 1e38, "max_nonfinite": 3, "warmup": 0})
    with pytest.raises(FloatingPointError, match="the last 3 updates up to step"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainable", "base", "trainable='base' is unknown"),
        ("dtype", "float8", "dtype='float8' is unknown"),
        ("init_from", "", "init_from=''"),
        ("log_every", 0, "log_every=0 must be at least 1"),
        ("uniform_plans", 50.0, "uniform_plans=50.0 is a share of the steps"),
    ],
)
def test_a_wrong_setting_is_named(config, tmp_path, key, value, message):
    config[key] = value
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path)


def test_a_ratio_must_divide_the_window(config, tmp_path):
    config.beacon.ratios = (3,)
    with pytest.raises(ValueError, match="ratio=3 does not divide window=8"):
        train(config, tmp_path)


def test_an_empty_text_folder_is_an_error(config, tmp_path):
    (tmp_path / "text").mkdir()
    config.text.uri = str(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match="holds no text"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.sead=1", 'Did you mean "seed" instead of "sead"'),
        ("--config.optimizer.lrr=1", 'Did you mean "lr"'),
        ("--workdirr=x", "Did you mean: workdir"),
    ],
)
def test_a_typo_is_an_error_with_a_suggestion(monkeypatch, flag, message):
    argv = ["train", "--config=configs/quickstart.py:smoke", "--workdir=x", flag]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    command.define_flags(values)
    with pytest.raises(SystemExit) as stopped:
        command.parse(argv, values)
    assert message in str(stopped.value.code)
