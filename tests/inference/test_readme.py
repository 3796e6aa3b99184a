"""What the README prints can be run as printed."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    not (ROOT / "assets" / "tiny-beacon").exists(), reason="needs assets/tiny-beacon"
)
def test_the_snippets_run_as_printed_and_find_the_pass_key(tmp_path):
    # Like cells of a notebook: the later ones use what the earlier ones made.
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    (tmp_path / "assets").symlink_to(ROOT / "assets")  # they write files
    result = subprocess.run(
        [sys.executable, "-c", "".join(snippets)],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "memory slots" in lines[0] and "buffer" in lines[1]
    assert lines[2] == "71492" and lines[3].startswith("71492 ")
    assert lines[4].startswith("budget of 64 slots") and lines[5].startswith("lossless")
    assert lines[-1] == "71492"


def test_its_commands_of_inference_have_the_flags_that_it_names():
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^PY -m beacon_jax\.(compress|generate) (.*)$", text, re.M)
    assert len(lines) >= 8
    for name, rest in lines:
        command = importlib.import_module(f"beacon_jax.cli.{name}")
        values = flags.FlagValues()
        command.define_flags(values)
        arguments = shlex.split(re.split(r" <|  +#", rest)[0], comments=True)
        assert values(["command", *arguments]) == ["command"], rest


def test_every_command_and_folder_it_names_exists():
    modules = set(re.findall(r"-m ((?:beacon_jax|tests)(?:\.\w+)+)", README))
    assert {"beacon_jax.train", "beacon_jax.generate"} <= modules
    for module in modules:
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
    tree = README.split("## What is where")[1].split("```")[1]
    rooms = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    assert len(rooms) > 5
    for room in rooms:
        assert (ROOT / "beacon_jax" / room).is_dir(), room
