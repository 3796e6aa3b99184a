"""`python -m beacon_jax.generate` from the outside."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beacon_jax.generate", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        input=stdin,
        capture_output=True,
        text=True,
    )


def test_a_file_or_stdin_becomes_memory_and_text(folder, model, tmp_path):
    text = "Boats left the harbour at dawn. " * 6
    (tmp_path / "context.txt").write_text(text)
    options = (f"--model={folder}", "--prompt=At dawn", "--ratio=4")
    first = run(*options, f"--context={tmp_path}/context.txt", "--max_new_tokens=9")
    assert first.returncode == 0, first.stderr
    expected = model.generate("At dawn", context=text, ratio=4, max_new_tokens=9)
    assert first.stdout == expected + "\n"
    tokens = len(text) + len("At dawn") + 9
    slots = tokens // 8 * 2
    assert f"row 0: {tokens} tokens -> {slots} memory slots" in first.stderr
    assert re.search(r"buffer: \d+ slots per row, [\d.]+ MiB", first.stderr)
    assert re.search(r"prefill 199 tokens, [\d.]+ tokens/s", first.stderr)
    assert re.search(r"decode 9 tokens, [\d.]+ tokens/s", first.stderr)
    again = run(*options, "--context=-", "--max_new_tokens=9", stdin=text)
    assert again.stdout == first.stdout, again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context=gone.txt"], "--context=gone.txt: no such file"),
        (["--context=-"], "--context=- is empty"),
        (["--ratio=many"], "--ratio=many: use 8"),
        (["--ratio=3"], "ratio=3 does not divide window=8: use one of 1, 2, 4, 8"),
        (["--prompt="], "prompt has shape [0], 0 tokens"),
        (["--model=nowhere"], "path=nowhere is not a model folder"),
    ],
)
def test_bad_input_ends_with_one_line_that_names_it(folder, arguments, message):
    result = run(f"--model={folder}", "--prompt=x", *arguments)
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.stderr


def test_importing_the_package_loads_neither_jax_nor_transformers():
    code = "import sys, beacon_jax; print({'jax', 'transformers'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr
