"""What the README prints can be run as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(
    not (ROOT / "assets" / "tiny-beacon").exists(), reason="needs assets/tiny-beacon"
)
def test_the_snippet_runs_as_printed_and_finds_the_pass_key():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "memory slots" in result.stdout
    assert result.stdout.rstrip().endswith("71492")


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
