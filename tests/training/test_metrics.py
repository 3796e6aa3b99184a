"""What a report says, and the table of peaks behind its utilisation."""

import json
import re
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from beacon_jax.training import metrics as module
from beacon_jax.training.hardware import CHIPS, find_chip, memory_gib, peak_flops
from beacon_jax.training.metrics import Metrics

PLANS = np.asarray([[2], [4], [2]])
VALUES = {
    "loss": np.float32(2.0),
    "grad_norm": np.float32(0.5),
    "window_loss": np.asarray([[9.0], [6.0], [8.0]]),
    "window_count": np.asarray([[3.0], [3.0], [2.0]]),
}


class Device(SimpleNamespace):
    """`device_kind` and what `memory_stats` returns."""

    def memory_stats(self):
        return self.stats


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


def report(metrics, step, extra):
    """Writes and shows a line, as the trainer does."""
    result = metrics.write(step, extra)
    metrics.show()
    return result


def lines(workdir):
    file = workdir / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def test_a_trainer_that_knows_nothing_of_flops_gets_the_plain_line(
    tmp_path, clock, capsys
):
    metrics = Metrics(tmp_path, 0, 10)
    metrics.add(PLANS, 64, VALUES)
    clock.now += 2
    report(metrics, 1, {"lr": 1e-3, "skipped": 0})
    metrics.close()
    assert lines(tmp_path) == [
        {
            "step": 1,
            "loss": 2.0,
            "loss_x2": 2.0,
            "loss_x4": 4.0,
            "grad_norm": 0.5,
            "tokens_per_second": 32.0,
            "seconds": 2.0,
            "lr": 1e-3,
            "skipped": 0,
        }
    ]
    expected = "step 1/10  loss 2.000 (x2 2.000 x4 4.000)  32 tok/s  2.0 s/step  "
    assert capsys.readouterr().out == expected + "ETA 0:18\n"
    assert any((tmp_path / "tensorboard").iterdir())


def test_utilisation_is_flops_by_time_and_peak(tmp_path, clock, capsys):
    metrics = Metrics(tmp_path, 0, 10, peak=8e15, devices=[])
    for _ in range(2):
        metrics.add(PLANS, 64, VALUES, flops=4.1e15)
    clock.now += 4
    result = report(metrics, 2, {"skipped": 3})
    assert result["flops_per_second"] == 2.05e15
    assert result["mfu"] == 2.05 / 8
    out = capsys.readouterr().out
    assert "2.05 PFLOP/s (MFU 25.6%)  skipped 3  ETA" in out
    # The next report starts from nothing.
    metrics.add(PLANS, 64, VALUES, flops=1e12)
    clock.now += 1
    assert report(metrics, 3, {})["flops_per_second"] == 1e12
    metrics.close()


def test_compiling_is_said_once_and_is_part_of_no_speed(tmp_path, clock, capsys):
    metrics = Metrics(tmp_path, 0, 10)
    with metrics.timing("data"):
        clock.now += 1
    clock.now += 30
    metrics.compiled(30.0)
    metrics.add(PLANS, 64, VALUES)
    clock.now += 3
    assert metrics.due()
    metrics.progress(1)
    line = "step 1/10  loss 2.000  4.0 s/step  compiled in 30.0 s  ETA 0:36\n"
    assert capsys.readouterr().out == line
    result = report(metrics, 1, {})
    assert result["compile_seconds"] == 30 and result["tokens_per_second"] == 16
    assert result["time_data"] == 0.25
    assert "compiled" not in capsys.readouterr().out
    assert "compile_seconds" not in metrics_after_one_more_step(metrics, clock)
    metrics.close()


def metrics_after_one_more_step(metrics, clock):
    metrics.add(PLANS, 64, VALUES)
    clock.now += 1
    return report(metrics, 2, {})


def test_the_console_is_never_silent_for_longer_than_15_seconds(tmp_path, clock):
    metrics = Metrics(tmp_path, 0, 10)
    assert metrics.due()  # the first step, at once
    for step, seconds, due in ((1, 1, False), (2, 13, False), (3, 1, True)):
        metrics.add(PLANS, 64, VALUES)
        if step == 1:
            clock.now += 1
            metrics.progress(1)
        clock.now += seconds
        assert metrics.due() is due
    metrics.progress(3)
    assert not metrics.due()
    # These lines are for the eye: the files have their own steps.
    assert lines(tmp_path) == []
    metrics.add(PLANS, 64, VALUES)
    clock.now += 1
    report(metrics, 4, {})
    assert [line["step"] for line in lines(tmp_path)] == [4]
    metrics.close()


def test_no_peak_no_mfu_and_no_flops_of_a_part_of_the_steps(tmp_path, clock):
    metrics = Metrics(tmp_path, 0, 10)
    metrics.add(PLANS, 64, VALUES, flops=1e9)
    clock.now += 1
    result = report(metrics, 1, {})
    assert result["flops_per_second"] == 1e9 and "mfu" not in result
    metrics.add(PLANS, 64, VALUES, flops=1e9)
    metrics.add(PLANS, 64, VALUES)
    clock.now += 1
    assert "flops_per_second" not in report(metrics, 3, {})
    metrics.close()


def test_time_is_split_into_shares_that_add_up_to_one(tmp_path, clock, capsys):
    metrics = Metrics(tmp_path, 0, 10)
    for _ in range(2):
        with metrics.timing("data"):
            clock.now += 1
        with metrics.timing("step"):
            clock.now += 4
        metrics.add(PLANS, 64, VALUES)
    with metrics.timing("checkpoint"):
        clock.now += 8
    clock.now += 2
    result = report(metrics, 2, {})
    shares = {k: v for k, v in result.items() if k.startswith("time_")}
    assert shares == pytest.approx(
        {"time_data": 0.1, "time_step": 0.4, "time_checkpoint": 0.4, "time_other": 0.1}
    )
    assert "data 10%" in capsys.readouterr().out
    metrics.close()


def test_waiting_for_the_devices_in_a_report_is_part_of_the_step(
    tmp_path, clock, monkeypatch
):
    def slow(tree):
        clock.now += 3
        return tree

    metrics = Metrics(tmp_path, 0, 10)
    with metrics.timing("data"):
        clock.now += 1
    metrics.add(PLANS, 64, VALUES)
    monkeypatch.setattr(module.jax, "device_get", slow)
    result = report(metrics, 1, {})
    assert result["time_step"] == 0.75 and result["time_other"] == 0
    metrics.close()


def test_timing_counts_a_body_that_fails(tmp_path):
    metrics = Metrics(tmp_path, 0, 10)
    with pytest.raises(KeyError), metrics.timing("data"):
        time.sleep(0.02)
        raise KeyError
    metrics.add(PLANS, 64, VALUES)
    assert report(metrics, 1, {})["time_data"] > 0.1
    metrics.close()


def test_memory_is_that_of_the_fullest_device(tmp_path, clock, capsys):
    stats = {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30}
    devices = [
        Device(stats={**stats, "bytes_limit": 80 * 2**30}),
        Device(stats={**stats, "peak_bytes_in_use": 5 * 2**30, "num_allocs": 7}),
        Device(stats=None),
    ]
    metrics = Metrics(tmp_path, 0, 10, devices=devices)
    metrics.add(PLANS, 64, VALUES)
    clock.now += 1
    result = report(metrics, 1, {})
    memory = {k: v for k, v in result.items() if k.startswith("memory")}
    assert memory == {"memory_gib": 1, "memory_peak_gib": 5, "memory_limit_gib": 80}
    assert "5.0/80.0 GiB" in capsys.readouterr().out
    metrics.close()


def test_a_cpu_has_neither_memory_nor_a_peak():
    assert memory_gib(jax.local_devices()) == {}
    assert peak_flops(jax.local_devices()) is None


def test_a_resumed_run_says_every_step_once(tmp_path, clock):
    metrics = Metrics(tmp_path, 0, 4)
    for step in (1, 2, 3):
        metrics.add(PLANS, 64, VALUES)
        clock.now += 1
        report(metrics, step, {})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill while it was written
    metrics = Metrics(tmp_path, 2, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    metrics.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00 "), (12.34, "12.3 "), (999.6e9, "1.00 T"), (4.123e14, "412 T")],
)
def test_numbers_have_three_digits_and_a_prefix(value, text):
    assert module._si(value) == text


@pytest.mark.parametrize(
    ("kind", "tflops", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 80),
        ("NVIDIA A100-SXM4-40GB", 312, 40),
        ("NVIDIA A800 80GB PCIe", 312, 80),
        ("NVIDIA H100 80GB HBM3", 989.5, 80),
        ("NVIDIA H100 PCIe", 756, 80),
        ("NVIDIA H200", 989.5, 141),
        ("NVIDIA H20", 148, 96),
        ("NVIDIA L4", 121, 24),
        ("NVIDIA L40S", 362, 48),
        ("Tesla T4", 65, 16),
        ("Tesla V100-PCIE-16GB", 112, 16),
        ("NVIDIA GeForce RTX 4090", 165.2, 24),
        ("TPU v3", 61.5, 16),
        ("TPU v4", 275, 32),
        ("TPU v5 lite", 197, 16),
        ("TPU v5p", 459, 95),
        ("TPU v5", 459, 95),
        ("TPU v6 lite", 918, 32),
    ],
)
def test_a_device_kind_is_found(kind, tflops, memory):
    chip = find_chip(kind)
    assert chip is not None and (chip.tflops, chip.memory) == (tflops, memory)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA A10G",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "TPU v4 lite",
        "NVIDIA B2000",
    ],
)
def test_a_namesake_is_not_taken_for_the_chip(kind):
    assert find_chip(kind) is None


def test_no_name_hides_one_below_it():
    for name, chip in CHIPS:
        assert find_chip(name) == chip, name


def test_the_peak_of_several_devices_is_their_sum_and_can_be_given():
    devices = [Device(device_kind="TPU v4")] * 4
    assert peak_flops(devices) == 4 * 275e12
    assert peak_flops(devices, 100.0) == 4e14
    unknown = [*devices, Device(device_kind="TPU v99")]
    assert peak_flops(unknown) is None
    assert peak_flops(unknown, 100.0) == 5e14
    with pytest.raises(ValueError, match=re.escape("peak_tflops=-1 must not be")):
        peak_flops(devices, -1)
