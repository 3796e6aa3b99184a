"""Traces of the steps that were asked for."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from beacon_jax.training.profile import Profiler, parse_steps


@pytest.fixture
def calls(monkeypatch):
    """What was asked of jax's profiler, in order."""
    log: list[object] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda f: log.append(("on", f)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: log.append("off"))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: log.append(x))
    return log


def run(folder, steps, start, stop, log):
    with Profiler(folder, steps) as profiler:
        for step in range(start, stop + 1):
            profiler.before(step, f"state {step - 1}")
            log.append(step)
            profiler.after(step, f"state {step}")


def test_a_trace_covers_its_steps_and_nothing_dispatched_before_or_after(
    tmp_path, calls, capsys
):
    run(tmp_path, (2, 3), 1, 5, calls)
    traced = [("on", tmp_path), 2, 3, "state 3", "off"]
    assert calls == [1, "state 1", *traced, 4, 5]
    assert capsys.readouterr().out == f"wrote a trace to {tmp_path}\n"


def test_no_steps_no_trace(tmp_path, calls):
    run(tmp_path, (), 1, 3, calls)
    assert calls == [1, 2, 3]


def test_a_resumed_run_traces_what_is_left_of_the_range(tmp_path, calls):
    run(tmp_path, (2, 6), 5, 7, calls)
    assert calls == ["state 4", ("on", tmp_path), 5, 6, "state 6", "off", 7]
    calls.clear()
    run(tmp_path, (2, 6), 8, 9, calls)
    assert calls == [8, 9]


def test_a_run_that_ends_inside_the_range_still_writes_its_trace(tmp_path, calls):
    run(tmp_path, (2, 9), 1, 3, calls)
    assert calls[-1] == "off" and calls.count("off") == 1
    calls.clear()
    with pytest.raises(KeyError), Profiler(tmp_path, (1, 9)) as profiler:
        profiler.before(1, "state 0")
        raise KeyError
    assert calls[-1] == "off"


def test_jax_writes_a_trace(tmp_path):
    double = jax.jit(lambda x: x + x)
    x = double(jnp.ones(8))
    with Profiler(tmp_path / "profile", "2") as profiler:
        for step in (1, 2, 3):
            profiler.before(step, x)
            x = double(x)
            profiler.after(step, x)
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ((), None),
        ("", None),
        ((10, 13), (10, 13)),
        ([10, 13], (10, 13)),
        ("10,13", (10, 13)),
        (" 10, 13 ", (10, 13)),
        ((7,), (7, 7)),
        ((3, 3), (3, 3)),
    ],
)
def test_a_range_of_steps_is_read(given, steps):
    assert parse_steps(given) == steps


@pytest.mark.parametrize(
    "given", [(0, 3), (5, 4), (1, 2, 3), ("a", 2), (1.5, 2), "10-13", "-1", (True, 2)]
)
def test_what_is_no_range_of_steps_is_refused(given):
    message = f"profile_steps={given!r} is no range of steps: give the first and the"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_steps(given)


@pytest.mark.parametrize(("text", "steps"), [("10,13", (10, 13)), ("10", (10, 10))])
def test_the_command_line_gives_a_range(monkeypatch, text, steps):
    argv = ["train", f"--config.profile_steps={text}"]
    monkeypatch.setattr(sys, "argv", argv)  # where the overrides are looked for
    values = flags.FlagValues()
    config = ConfigDict({"profile_steps": ()})
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    values(argv)
    assert parse_steps(config.profile_steps) == steps
