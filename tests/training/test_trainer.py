"""Runs of a tiny model: they learn, resume bit for bit, and refuse what is wrong."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from beacon_jax import hf
from beacon_jax.cli import options
from beacon_jax.cli import train as command
from beacon_jax.core.plan import memory_slots, plan_slots
from beacon_jax.data.batches import BatchConfig, Batches, BatchStage
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.training import inputs, trainer
from beacon_jax.training.steps import Programs
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


def kill_after_step_3(signals, step, after=trainer.Signals.after):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return after(signals, step)


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


def test_a_run_reports_its_speed_and_traces_the_steps_asked_for(config, tmp_path):
    config.profile_steps = (2, 3)
    config.peak_tflops = 1.0
    config.save_every = 4
    train(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        # Two rows, so two devices, of one TFLOP/s each.
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / 2e12)
        shares = [value for key, value in row.items() if key.startswith("time_")]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]
    # None of this is part of what a run computes: it goes on without.
    config.profile_steps, config.peak_tflops = (), 0.0
    assert train(config, tmp_path)["steps_of_this_process"] == 0


def test_a_frozen_base_that_changes_is_an_error(config, tmp_path, monkeypatch):
    hashes = iter(["before", "after"])
    monkeypatch.setattr(trainer.hf, "tree_hash", lambda tree: next(hashes))
    with pytest.raises(RuntimeError, match="base changed.*before.*after"):
        train(config, tmp_path)


def test_resume_after_sigterm_is_bit_identical(config, tmp_path, monkeypatch, capsys):
    train(config, tmp_path / "whole")
    monkeypatch.setattr(trainer.Signals, "after", kill_after_step_3)
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


@pytest.mark.slow
def test_distillation_is_trained_and_resumed_like_labels(config, tmp_path, monkeypatch):
    config.loss.update({"kind": "distil", "label_weight": 0.1, "attention_weight": 0.1})
    config.accumulate = 2
    train(config, tmp_path / "whole")
    monkeypatch.setattr(trainer.Signals, "after", kill_after_step_3)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    summary = train(config, tmp_path / "parts")
    assert summary["base_hash_before"] == summary["base_hash_after"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    # Beacons start as an end token: far from full attention, but not as far as labels.
    config.loss.attention_weight = 0.0
    train(config, tmp_path / "without")
    first = losses(tmp_path / "without")[1]
    assert first < losses(tmp_path / "whole")[1]
    config.loss.update({"kind": "labels", "label_weight": 0.0})
    train(config, tmp_path / "labels")
    assert 0 < first < losses(tmp_path / "labels")[1]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(config, tmp_path, monkeypatch):
    """Everything split, so that all meshes draw the same plans."""
    config.data.stages.stage1.batch_size = 4
    config.mesh.update({"data": 2, "fsdp": 2})
    train(config, tmp_path / "whole")
    monkeypatch.setattr(trainer.Signals, "after", kill_after_step_3)
    with pytest.raises(SystemExit):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    config.mesh.update({"data": 1, "fsdp": 4})
    with pytest.raises(ValueError, match=r"config.mesh.fsdp: 2 -> 4"):
        train(config, tmp_path / "parts")
    config.allow_config_change = True
    train(config, tmp_path / "parts")
    ours = hf.load(tmp_path / "parts" / "export").variables["beacon"]
    whole = hf.load(tmp_path / "whole" / "export").variables["beacon"]
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_stages_of_any_length_and_all_plans_share_one_compiled_step(
    config, tmp_path, monkeypatch
):
    config.data.stages.stage1 = {**config.data.stages.stage1, "length": 48, "steps": 3}
    config.data.stages.stage2 = {**config.data.stages.stage1, "length": 20}
    config.data.stages.stage3 = {**config.data.stages.stage1, "length": 33}
    made, plans, draw = [], [], inputs.draw_plans

    def keep_plans(*args):
        plans.append(draw(*args))
        return plans[-1]

    monkeypatch.setattr(inputs, "draw_plans", keep_plans)
    monkeypatch.setattr(
        trainer, "Programs", lambda *a: made.append(Programs(*a)) or made[0]
    )
    train(config, tmp_path)
    assert {len(plan) for plan in plans} == {6, 3, 5}
    assert len({plan.tobytes() for plan in plans}) > 5
    assert [len(programs) for programs in made] == [1]


@pytest.mark.slow
def test_a_checkpoint_can_be_exported_before_the_run_ends(config, tmp_path):
    train(config, tmp_path)
    command = [sys.executable, "-m", "beacon_jax.convert", "to-hf", f"--src={tmp_path}"]
    out = tmp_path / "newest"
    subprocess.run([*command, f"--dst={out}"], check=True)
    expected = weights(tmp_path)
    assert (out / "model.safetensors").read_bytes() == expected
    assert (out / "tokenizer.json").exists()
    again = subprocess.run([*command, f"--dst={out}"], capture_output=True, text=True)
    assert again.returncode == 1 and "pass --overwrite" in again.stderr


def drawn(config, steps, **beacon):
    """Plans [steps, N] of nine windows."""
    beacon = BeaconConfig(32, (2, 4, 8), **beacon)
    model = ModelConfig(**SMALL, beacon=beacon)
    batches = Batches(np.zeros(999), None, BatchConfig((BatchStage(steps, 288, 1),)))
    draw = inputs.draw_plans
    plans = [draw(config, model, batches, i, 1)[:, 0] for i in range(steps)]
    return model, np.stack(plans)


def test_uniform_plans_have_the_share_of_steps_that_was_asked_for(config):
    for share in (0.0, 0.25, 1.0):
        config.uniform_plans = share
        _, plans = drawn(config, 400)
        uniform = np.mean([len(set(p)) == 1 for p in plans.tolist()])
        assert abs(uniform - share) < 0.07  # three standard deviations


def test_plans_that_do_not_fit_the_memory_are_drawn_again(config):
    config.memory_slots = 70
    model, plans = drawn(config, 300)
    assert max(plan_slots(model, p) for p in plans) <= 70
    config.memory_slots = 0
    _, free = drawn(config, 300)
    room = memory_slots(model, 9, likely=True)
    assert 70 < max(plan_slots(model, p) for p in free) <= room < memory_slots(model, 9)
    kept = [i for i in range(300) if plan_slots(model, free[i]) <= 70]
    np.testing.assert_array_equal(plans[kept], free[kept])
    config.memory_slots = 10
    with pytest.raises(ValueError, match="memory_slots=10: no plan of 9 windows"):
        drawn(config, 1)


def test_a_finished_run_leaves_its_export_as_the_user_has_it(config, tmp_path, capsys):
    train(config, tmp_path)
    note, edited = tmp_path / "export/NOTES.txt", tmp_path / "export/config.json"
    note.write_text("mine")
    edited.write_text(edited.read_text() + "\n")
    files = {p: p.read_bytes() for p in (note, edited, tmp_path / "summary.json")}
    train(config, tmp_path)
    assert "stays as it is" in capsys.readouterr().out
    assert files == {p: p.read_bytes() for p in files}
    # As if the export of these parameters had been interrupted, an older one there.
    (tmp_path / "summary.json").write_text('{"trained_hash": "older"}')
    train(config, tmp_path)
    assert note.read_text() == "mine" and edited.read_bytes() != files[edited]


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


def test_an_empty_text_folder_is_an_error(config, tmp_path):
    (tmp_path / "text").mkdir()
    config.data.sources = (str(tmp_path / "text"),)
    with pytest.raises(FileNotFoundError, match="holds no text"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.sead=1", "--config.sead: no such key; did you mean --config.seed?"),
        ("--config.optimizer.lrr=1", "did you mean --config.optimizer.lr?"),
        ("--workdirr=x", "did you mean --workdir?"),
    ],
)
def test_a_typo_is_an_error_with_a_suggestion(monkeypatch, flag, message):
    argv = ["train", "--config=configs/quickstart.py:smoke", "--workdir=x", flag]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    command.define_flags(values)
    with pytest.raises(SystemExit) as stopped:
        options.parse(argv, values)
    assert message in str(stopped.value.code)
