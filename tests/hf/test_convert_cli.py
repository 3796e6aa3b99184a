"""The command line, and what it costs in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from beacon_jax.cli import convert

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_there_and_back_on_the_command_line(
    tmp_path, make_checkpoint, config_of, beacon_fields
):
    src = make_checkpoint(config_of("qwen2", **beacon_fields))
    ours, back = tmp_path / "ours", tmp_path / "back"
    convert = "-m", "beacon_jax.convert"
    result = run(*convert, "from-hf", f"--src={src}", f"--dst={ours}", "--verify")
    assert result.returncode == 0, result.stderr
    assert "ok: KL per token" in result.stdout
    result = run(*convert, "to-hf", f"--src={ours}", f"--dst={back}")
    assert result.returncode == 0, result.stderr
    name = "model.safetensors"
    assert (back / name).read_bytes() == (src / name).read_bytes()
    result = run(*convert, "from-hf", f"--src={src}", f"--dst={ours}")
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]  # a slow machine says before that it starts
    assert said.startswith("error: --dst=") and "--overwrite" in said
    result = run(*convert, "upside-down", f"--src={src}", f"--dst={ours}")
    assert result.returncode == 1 and "use from-hf, from-gguf or to-hf" in result.stderr


@pytest.mark.slow
def test_memory_stays_at_the_largest_tensor_plus_a_constant(tmp_path):
    """319 MB in 363 tensors, the largest 33 MB; the limit leaves 4 blocks of 17 MB."""
    script = ROOT / "tests" / "hf" / "synthetic_checkpoint.py"
    result = run(script, f"--dir={tmp_path}", "--hidden=512", "--layers=40")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["identical"] and report["checkpoint_mb"] > 300
    for direction in ("from-hf", "to-hf"):
        used = report[direction]["peak_mb"] - report["imports"]["peak_mb"]
        assert used < report["largest_tensor_mb"] + 70


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        ("from-hf", "--dst=", "--dst= is empty"),
        ("to-hf", "--dst= ", "--dst=  is empty"),
        ("from-hf", "--adapter", "--adapter is not for from-hf, only for to-hf"),
        ("to-hf", "--dtype=float16", "--dtype=float16 is not for to-hf, only for from"),
        ("to-hf", "--strip_prefix=", "--strip_prefix= is not for to-hf"),
        ("to-hf", "--verify", "--verify is not for to-hf"),
    ],
)
def test_flags_that_a_command_does_not_read_are_refused(
    make_checkpoint, config_of, tmp_path, monkeypatch, command, flag, said
):
    src, here = make_checkpoint(config_of("llama")), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    values = flags.FlagValues()
    convert.define_flags(values)
    values(["convert", f"--src={src}", f"--dst={tmp_path / 'new'}", flag])
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit, match=said):
        convert.main(["convert", command])
    assert not any(here.iterdir()) and not (tmp_path / "new").exists()
