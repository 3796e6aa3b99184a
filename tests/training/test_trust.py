"""Whatever happens to a run, nothing that it has learned is lost."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from beacon_jax import hf
from beacon_jax.progress import Progress
from beacon_jax.training import trainer
from beacon_jax.training.checkpoint import CheckpointError, Checkpoints
from beacon_jax.training.console import OutputClosed
from beacon_jax.training.signals import Signals
from beacon_jax.training.trainer import export_checkpoint, train


@pytest.fixture
def workdir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def weights(workdir):
    return (workdir / "export" / "model.safetensors").read_bytes()


def files(folder):
    """Every file under a folder, with its bytes, links as what they point to."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def at_step(monkeypatch, step, action):
    """Calls `action` when step `step` is on its way."""
    after = Signals.after

    def hooked(signals, done):
        if done == step:
            action()
        return after(signals, done)

    monkeypatch.setattr(trainer.Signals, "after", hooked)


def test_one_that_reads_back_with_another_hash_is_moved_aside(
    config, finished, workdir, capsys, monkeypatch
):
    stages, stage = [], Progress.stage

    def noted(progress, doing, *arguments, **options):
        stages.append(doing)
        return stage(progress, doing, *arguments, **options)

    monkeypatch.setattr(Progress, "stage", noted)
    state = workdir / "checkpoints" / "6" / "state"
    shutil.rmtree(state)
    shutil.copytree(workdir / "checkpoints" / "4" / "state", state)  # whole, but other
    damaged = files(workdir / "checkpoints" / "6")
    summary = train(config, workdir)
    out = capsys.readouterr().out
    target = workdir / "checkpoints-damaged" / "6"
    assert re.search(rf"step 6 is damaged \(.*hash\): moved to {target}, using", out)
    assert "start from the base model" not in out
    assert files(target) == damaged
    assert summary["steps_of_this_process"] == 2
    assert weights(workdir) == weights(finished)
    # Whatever takes long says so.
    every = "choosing checking reading making restoring compiling computing saving"
    found = [name.split()[0] for name in dict.fromkeys(stages)]
    assert [name for name in found if name in every.split()] == every.split()
    assert "fetching" in found
    # The place is taken: the next one gets another.
    shutil.rmtree(state)
    shutil.copytree(workdir / "checkpoints" / "4" / "state", state)
    train(config, workdir)
    assert files(target) == damaged
    assert (target.parent / "6.1" / "state").is_dir()


def test_an_export_leaves_a_damaged_one_where_it_is(workdir, tmp_path, capsys):
    state = workdir / "checkpoints" / "6" / "state"
    shutil.rmtree(state)
    shutil.copytree(workdir / "checkpoints" / "4" / "state", state)
    before = files(workdir)
    assert export_checkpoint(workdir, tmp_path / "hf") == 4
    assert "step 6 is damaged" in capsys.readouterr().out
    assert files(workdir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat16"}, "(?s)config.json is not that of.*dtype: .float32. -> "),
        (
            {"beacon": {"use": True, "window": 4, "ratios": [2]}},
            "(?s)beacon.window: 8 ",
        ),
        ({"beacon": 7}, "config.beacon is 7, not an object.*use another --workdir"),
        ({"rules": {"vocab": [[1]]}}, "config.rules.vocab is .*, not a text or a list"),
        (None, "config.json is not there"),
    ],
)
def test_an_export_wants_the_settings_of_its_checkpoint(
    workdir, tmp_path, change, message
):
    file = workdir / "config.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        export_checkpoint(workdir, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_wants_the_base_of_its_checkpoint(workdir, base, tmp_path):
    other = shutil.copytree(base / "export", tmp_path / "base")
    file = workdir / "config.json"
    settings = json.loads(file.read_text()) | {"init_from": str(other)}
    file.write_text(json.dumps(settings))
    assert export_checkpoint(workdir, tmp_path / "hf") == 6  # the same, elsewhere
    tensors = safetensors.load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    safetensors.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is another model than the run began with"):
        export_checkpoint(workdir, tmp_path / "again")


def test_metadata_of_a_checkpoint_that_are_none_are_named(config, workdir):
    file = workdir / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": [1]}))
    before = files(workdir)
    with pytest.raises(
        CheckpointError, match="checkpoints cannot be used: .*--workdir"
    ):
        train(config, workdir)
    assert files(workdir) == before


@pytest.mark.parametrize(
    "damage",
    ["truncated", "missing", "link", "no manifest", "no hash", "no object", "too deep"],
)
def test_one_that_cannot_be_read_stops_the_run_and_every_file_stays(
    config, workdir, damage
):
    step = workdir / "checkpoints" / "6"
    if damage == "too deep":  # TensorStore's reader of JSON ends the process
        (step / "state" / "_sharding").write_text('{"a": ' + "[" * 100_000)
    elif damage == "truncated":
        for path in (step / "state").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:10])
    elif damage == "missing":
        shutil.rmtree(step / "record")
    elif damage == "no manifest":
        (step / "state" / "manifest.ocdbt").unlink()
    elif damage == "no hash":
        (step / "record" / "metadata").write_text('{"config": {}}')
    elif damage == "no object":
        (step / "record" / "metadata").write_text("[]")
    else:  # what cannot be opened, even by root
        (step / "record" / "metadata").unlink()
        (step / "record" / "metadata").symlink_to("metadata")
    before = files(workdir / "checkpoints")
    with pytest.raises(CheckpointError) as stopped:
        train(config, workdir)
    assert "the checkpoint of step 6 cannot be read: " in str(stopped.value)
    assert "move it away to go on from step 4" in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1
    assert files(workdir / "checkpoints") == before


def test_a_tree_that_differs_stops_the_run_and_every_file_stays(config, workdir):
    config.beacon.param = ("q", "k")
    config.allow_config_change = True
    before = files(workdir / "checkpoints")
    with pytest.raises(CheckpointError) as stopped:
        train(config, workdir)
    for text in (
        "the checkpoint of step 6 has other parameters than this run",
        "['v_proj']['kernel']",
        "config.beacon.param: ['q', 'k', 'v'] -> ['q', 'k']",
        "No file was changed. Use another --workdir",
    ):
        assert text in str(stopped.value)
    assert files(workdir / "checkpoints") == before


@pytest.mark.slow
def test_another_optimiser_keeps_what_was_trained_and_starts_anew(
    config, workdir, capsys
):
    shutil.rmtree(workdir / "checkpoints" / "6")
    older = files(workdir / "checkpoints" / "4")
    config.optimizer.update({"name": "muon", "adam_lr": 1e-3})
    with pytest.raises(ValueError, match=r"optimizer.name: 'adamw' -> 'muon'\nUse"):
        train(config, workdir)
    config.allow_config_change = True
    given = []
    update = trainer.Programs.__call__

    def keep(programs, state, *args):
        given.append(jax.tree.map(np.asarray, state))
        return update(programs, state, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Programs, "__call__", keep)
        assert train(config, workdir)["steps_of_this_process"] == 2
    out = capsys.readouterr().out
    assert "another optimiser than in the checkpoint: it starts anew at step 4" in out
    assert "going on from step 4" in out
    state = given[0]
    counts = {
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"])
        if "count" in jax.tree_util.keystr(path[-1:]) and leaf.ndim == 0
    }
    assert counts == {0, 4}  # moments from nothing, learning rates of step 4
    beacon = given[0]["trained"]["beacon"]["embed"]["embedding"]
    start = hf.load(config.init_from, beacon=None).variables["params"]["embed"]
    assert not np.isin(beacon, start["embedding"]).all()
    assert files(workdir / "checkpoints" / "4") == older
    config.allow_config_change = False
    assert train(config, workdir)["steps_of_this_process"] == 0


def test_a_run_whose_updates_were_all_skipped_fails_and_exports_nothing(
    config, tmp_path
):
    """Fewer steps than optimizer.max_nonfinite allows in a row."""
    base = shutil.copytree(config.init_from, tmp_path / "base")
    tensors = dict(safetensors.load_file(base / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.nan
    safetensors.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config.init_from = str(base)
    assert config.optimizer.max_nonfinite > 6
    for _ in range(2):  # the same command does not pass either
        with pytest.raises(FloatingPointError, match="all 6 updates were not finite"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "export").exists()


def test_a_closed_stdout_ends_the_run_with_its_state_saved(
    config, finished, tmp_path, monkeypatch
):
    reader, writer = os.pipe()

    def head():
        with os.fdopen(reader) as lines:
            for line in lines:
                if line.startswith("step 2/"):
                    return

    thread = threading.Thread(target=head)
    thread.start()
    with monkeypatch.context() as patch:
        stdout = os.fdopen(writer, "w")
        patch.setattr(sys, "stdout", stdout)
        at_step(patch, 3, thread.join)
        with pytest.raises(OSError, match=r"stdout.*Broken pipe.*; step 4 is saved"):
            train(config, tmp_path)
        with pytest.raises(OutputClosed):  # of step 4
            trainer.say("nobody")
        with contextlib.suppress(BrokenPipeError):
            stdout.close()
    assert not (tmp_path / "export").exists()
    assert train(config, tmp_path)["steps_of_this_process"] == 2
    assert weights(tmp_path) == weights(finished)


def test_a_full_disk_at_a_save_leaves_the_one_before(
    config, finished, tmp_path, monkeypatch
):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    config.keep = 1

    def fill():
        while not (tmp_path / "checkpoints" / "2").exists():
            time.sleep(0.01)  # it is written in the background
        # Files of the state are larger than 4,096 bytes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))

    with monkeypatch.context() as patch:
        at_step(patch, 4, fill)
        patch.setattr(trainer.Metrics, "write", lambda *_: {})  # they fit
        patch.setattr(trainer.Metrics, "show", lambda *_: None)
        try:
            with pytest.raises(CheckpointError) as stopped:
                train(config, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    text = str(stopped.value)
    assert "the checkpoint of step 4 could not be written" in text
    assert "File too large" in text and "That of step 2 is whole" in text
    assert os.listdir(tmp_path / "checkpoints") == ["2"]
    assert train(config, tmp_path)["steps_of_this_process"] == 4
    assert weights(tmp_path) == weights(finished)


@pytest.mark.slow
def test_a_full_disk_at_the_metrics_ends_the_run_with_its_state_saved(
    config, finished, tmp_path, monkeypatch
):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    lower = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    with monkeypatch.context() as patch:
        write = trainer.Metrics.write

        def full(metrics, step, extra):
            if step == 3:
                # A thread may still write that of step 2, which the limit is not for.
                while not (tmp_path / "checkpoints" / "2").is_dir():
                    time.sleep(0.05)
                lower()
            try:
                return write(metrics, step, extra)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

        patch.setattr(trainer.Metrics, "write", full)
        with pytest.raises(OSError, match=r"File too large.*step 4 is saved"):
            train(config, tmp_path)
    assert train(config, tmp_path)["steps_of_this_process"] == 2
    assert weights(tmp_path) == weights(finished)


@pytest.mark.slow
def test_a_full_disk_at_the_export_leaves_the_state(
    config, finished, tmp_path, monkeypatch
):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limit[1]))
        try:
            export(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    export = trainer.export
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "export", full)
        with pytest.raises(OSError, match="the export could not be .*step 6 is saved"):
            train(config, tmp_path)
    assert not (tmp_path / "export").exists()
    assert train(config, tmp_path)["steps_of_this_process"] == 0
    assert weights(tmp_path) == weights(finished)


def test_sigint_twice_stops_without_saving_and_loses_nothing(
    config, finished, tmp_path, monkeypatch, capfd
):
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
    before, save = signal.getsignal(signal.SIGINT), Checkpoints.save

    def interrupted(checkpoints, step, *args):
        save(checkpoints, step, *args)
        if step == 3:
            interrupt()

    with monkeypatch.context() as patch:
        at_step(patch, 3, interrupt)
        patch.setattr(Checkpoints, "save", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train(config, tmp_path)
    assert stopped.value.code == 128 + signal.SIGINT
    err = capfd.readouterr().err
    assert "SIGINT: finishing step 3, then saving; again to stop without saving" in err
    assert re.search("SIGINT: stopped without saving; the same command goes on f", err)
    assert signal.getsignal(signal.SIGINT) is before
    assert train(config, tmp_path)["steps_of_this_process"] in (3, 4)
    assert weights(tmp_path) == weights(finished)


SLEEPER = """
import gc, hashlib, time
from beacon_jax.training.signals import Signals
with Signals(lambda: 7) as signals:
    {body}
    time.sleep(60)
"""
DEAF = {
    "in C": """
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as deaf as a compilation
""",
    # jax has such a callback, and Python ignores exceptions there.
    "in a callback": """
    def slow(*_):
        print("ready", flush=True)
        time.sleep(1)
    gc.callbacks.append(slow)
    gc.collect()
    gc.callbacks.remove(slow)
""",
}


@pytest.mark.parametrize("where", DEAF)
def test_a_signal_is_answered_while_python_is_not_listening(where):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER.format(body=DEAF[where].strip())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err == "SIGTERM: stopped; the same command goes on from step 7.\n"
    assert process.returncode == 128 + signal.SIGTERM
