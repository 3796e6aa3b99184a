"""Two processes of four devices train as one process of eight."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from beacon_jax import hf
from beacon_jax.training import inputs, trainer
from tests.training import one_process


def run(configs, workdir, *, devices, environment=()):
    """Runs one process per config, all of them in one workdir; their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    running = []
    for i, config in enumerate(configs):
        file = workdir.parent / f"{workdir.name}{i}.json"
        file.write_text(json.dumps(config.to_dict()))
        environ = {
            **os.environ,
            **dict(environment),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if len(configs) > 1:
            environ |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(len(configs)),
                "JAX_PROCESS_ID": str(i),
            }
        command = [sys.executable, "-m", "tests.training.one_process", file, workdir]
        running.append(
            subprocess.Popen(
                command,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:  # none goes on when another one hangs
            process.kill()
    return [process.returncode for process in running], outputs


@pytest.mark.slow
@pytest.mark.timeout(900)  # three programs of 30 s each on a quiet core
@pytest.mark.parametrize("plans", ["drawn", "adversarial"])
@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 4, 1)], ids=["fast", "lean"])
def test_two_processes_train_as_one(config, tmp_path, monkeypatch, mesh, plans):
    environment = {}
    if plans == "adversarial":
        environment = {"ADVERSARIAL_PLANS": "1"}
        draw = one_process.adversarial(inputs.draw_plans)
        for module in (inputs, trainer):
            monkeypatch.setattr(module, "draw_plans", draw)
        config.beacon.ratios = (0, 2, 4)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    config.data.stages.stage1.update({"batch_size": 8, "steps": 4})
    trainer.train(config, tmp_path / "one")  # this process has eight devices too
    config.compilation_cache = "off"
    codes, outputs = run(
        [config] * 2, tmp_path / "two", devices=4, environment=environment
    )
    assert codes == [0, 0], outputs
    assert "step 4/4" not in outputs[1]
    weights = []
    for name in ("one", "two"):
        weights.append(hf.load(tmp_path / name / "export").variables["beacon"])
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    for path in ("embed/embedding", "layers/attention/k_proj/kernel"):
        leaves = weights
        for key in path.split("/"):
            leaves = [leaf[key] for leaf in leaves]
        np.testing.assert_allclose(leaves[0], leaves[1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_never_was(config, tmp_path):
    """beacon_jax/bench/kill_and_resume.py does this ten times, at random moments."""
    config.data.stages.stage1.steps = 40
    config.save_every = 3
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "tests.training.one_process", file]
    subprocess.run([*command, tmp_path / "whole"], check=True, timeout=240)
    process = subprocess.Popen([*command, tmp_path / "killed"])
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 7):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "export").exists()
    subprocess.run([*command, tmp_path / "killed"], check=True, timeout=240)
    read = lambda name: (tmp_path / name / "export/model.safetensors").read_bytes()
    assert read("killed") == read("whole")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))


@pytest.mark.slow
def test_processes_that_differ_are_refused(config, tmp_path):
    config.data.stages.stage1.update({"batch_size": 8, "steps": 2})
    config.compilation_cache = "off"
    other = config.copy_and_resolve_references()
    other.seed = 7
    codes, outputs = run([config, other], tmp_path / "two", devices=4)
    assert all(codes)
    for output in outputs:
        assert "processes [1] have another config, step or ratio plan" in output
