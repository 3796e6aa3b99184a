"""The wheel in an environment of its own, outside the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from beacon_jax import cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]
TEXT = "Boats left the harbour at dawn. " * 6


class Installed(NamedTuple):
    bin: Path
    cwd: Path

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
        env = {k: v for k, v in os.environ.items() if k not in hidden}
        return subprocess.run(
            [str(self.bin / "python"), *words],
            cwd=self.cwd,
            env=env | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def command(self, *words: str) -> str:
        """stdout of `beacon-jax WORDS`, which must succeed."""
        done = self.python(str(self.bin / "beacon-jax"), *words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, what: str) -> None:
        uv("pip", "install", "--python", str(self.bin / "python"), what)


def uv(*words: str) -> None:
    extra = ["--constraint", "constraints.txt"] if words[0] == "pip" else []
    command = [sys.executable, "-m", "uv", *words, *extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    uv("build", "--out-dir", str(out))  # the wheel from the sdist, which is complete
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The plain install; later tests add the extras."""
    folder = tmp_path_factory.mktemp("environment")
    venv = [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")]
    subprocess.run(venv, check=True)
    made = Installed(folder / "venv" / "bin", folder / "work")
    made.cwd.mkdir()
    (made.cwd / "context.txt").write_text(TEXT)
    made.install(str(wheel))
    return made


def test_every_command_has_help_in_all_three_spellings(installed):
    assert installed.command() == cli.overview() + "\n"
    for name in cli.COMMANDS:
        shown = installed.command(name, "--help")
        assert f"beacon-jax {name}" in shown
        for module in (["beacon_jax", name], [f"beacon_jax.{name}"]):
            again = installed.python("-m", *module, "--help")
            assert again.stdout == shown, again.stderr


def test_a_plain_install_names_the_extra_that_a_command_needs(installed):
    script = str(installed.bin / "beacon-jax")
    done = installed.python(script, "evaluate", "--model=tiny-beacon", "--out=x")
    assert done.returncode == 1
    assert done.stderr.strip().endswith('pip install "beacon_jax[plots]".')
    done = installed.python(script, "lm_eval", "--tasks", "x")
    assert done.stderr.strip().endswith('pip install "beacon_jax[lm-eval]".')


def test_the_model_of_the_package_compresses_and_answers(installed):
    common = ("--model=tiny-beacon", "--ratio=4")
    installed.command(
        "compress", *common, "--context=context.txt", "--out=context.beacon"
    )
    out = installed.command(
        *("generate", *common, "--load_memory=context.beacon", "--json"),
        *("--prompt=Boats left", "--max_new_tokens=4"),
    )
    made = json.loads(out)
    assert len(made["tokens"]) == 4 and made["memory"]["slots"] > 0
    code = (
        "import beacon_jax, pathlib\n"
        "folder = pathlib.Path(beacon_jax.__file__).parent\n"
        "assert (folder / 'py.typed').exists()\n"
        "assert (folder / 'launch' / 'colab_evaluate.ipynb').exists()\n"
        "model = beacon_jax.load('tiny-beacon')\n"
        "print(model.config.beacon.ratios)"
    )
    done = installed.python("-c", code)
    assert done.stdout == "(2, 4, 8)\n", done.stderr


def test_a_config_is_trained_by_name_exported_and_measured(installed, wheel):
    installed.command("train", "--config=quickstart:smoke", "--workdir=run")
    run = installed.cwd / "run"
    assert (run / "metrics.jsonl").is_file() and not (run / "tensorboard").exists()
    installed.command("convert", "to-hf", "--src=run", "--dst=exported")
    installed.command("convert", "from-hf", "--src=exported", "--dst=converted")
    installed.install(f"{wheel}[all]")
    installed.command(
        *("evaluate", "--model=converted", "--tasks=passkey", "--methods=beacon"),
        *("--ratios=4", "--lengths=128", "--samples=2", "--depths=1", "--out=report"),
    )
    assert "Passkey" in (installed.cwd / "report" / "report.md").read_text()


def test_rows_of_the_package_are_prepared_and_inspected(installed, wheel):
    installed.install(f"{wheel}[all]")
    config = "--config=llama2_7b_finetune:smoke"
    out = installed.command("prepare", config, "--out=prepared/data")
    assert "examples" in out
    installed.command("inspect", config, "--out=prepared")
    assert (installed.cwd / "prepared" / "lengths.png").is_file()
    shutil.rmtree(installed.cwd / "prepared")
