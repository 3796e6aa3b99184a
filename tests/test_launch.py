"""The launch scripts: they parse, stay short, and pass their arguments on unharmed."""

import gzip
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from absl import flags

from beacon_jax.cli import serve
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.tasks import make_tasks

LAUNCH = Path(__file__).parents[1] / "launch"
SETUP = ("setup.sh", "find_python.sh")  # tested in test_setup.py
CHECK, CORPUS = "gpu_check.sh", "corpus.sh"
QUICKSTART = "quickstart.sh"  # tested in test_quickstart.py
SMOLLM2 = "smollm2.sh"
SERVE = "gke_serve.sh"
OTHERS = (*SETUP, CHECK, CORPUS, QUICKSTART, SMOLLM2, SERVE)
SCRIPTS = sorted(f.name for f in LAUNCH.glob("*.sh") if f.name not in OTHERS)
PARTS = ("parity", "kernels", "prefill", "decode", "train")
BASH = shutil.which("bash") or "bash"
COMMAND = "python -m beacon_jax.train --config="

# What stands in front of the command: a program of its own, faked below.
REMOTE = {
    "slurm.sh": ("srun", {"SLURM_GPUS_ON_NODE": "4"}),
    "tpu_vm.sh": ("gcloud", {"TPU": "name", "ZONE": "zone"}),
    "gke_xpk.sh": ("xpk", {"CLUSTER": "c", "DEVICE": "v5p-16", "IMAGE": "image"}),
}


def source(name):
    return (LAUNCH / name).read_text(encoding="utf-8")


def run(name, *arguments, env=None):
    return subprocess.run(
        [BASH, str(LAUNCH / name), *arguments],
        env=env or os.environ,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def remote(tmp_path):
    """Runs a script with a fake cluster program that prints its arguments by line."""

    def call(name, *arguments):
        program, variables = REMOTE[name]
        fake = tmp_path / program
        fake.write_text(
            f'#!{BASH}\nprintf "%s\\n" "$@"\necho "ids=${{JAX_LOCAL_DEVICE_IDS:-}}"\n'
        )
        fake.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        result = run(name, *arguments, env=os.environ | variables | {"PATH": path})
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return call


def test_there_is_a_script_for_every_kind_of_machine():
    assert set(SCRIPTS) >= {"local_8gpu.sh", *REMOTE}


@pytest.mark.parametrize("name", [*SCRIPTS, *OTHERS])
def test_a_script_parses(name):
    result = subprocess.run(
        [BASH, "-n", str(LAUNCH / name)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert os.access(LAUNCH / name, os.X_OK)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_strict_and_runs_the_one_command(name):
    lines = source(name).splitlines()
    assert len(lines) <= 25
    assert lines[0] == "#!/usr/bin/env bash"
    code = [line for line in lines if line and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    joined = re.sub(r"\s*\\\n\s*", " ", source(name))
    assert COMMAND in joined
    assert '"${@:3}"' in joined


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not here")
def test_shellcheck_finds_nothing():
    files = [str(LAUNCH / name) for name in (*SCRIPTS, *OTHERS)]
    result = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_workdir_is_an_error_with_the_usage(name):
    result = run(name, "configs/quickstart.py")
    assert result.returncode != 0
    assert "CONFIG WORKDIR [--config.key=value ...]" in result.stderr


def test_slurm_shows_all_gpus_of_a_node_to_its_one_process(remote):
    assert "#SBATCH" in source("slurm.sh")
    assert "--ntasks-per-node=1 " in source("slurm.sh")
    words = remote("slurm.sh", "configs/x.py", "a folder", "--config.data.sources=b c")
    assert words[-1] == "ids=0,1,2,3"
    assert words[-5:-1] == [
        "--config=configs/x.py",
        "--workdir=a folder",
        "--distributed",
        "--config.data.sources=b c",
    ]


@pytest.mark.parametrize("name", ["tpu_vm.sh", "gke_xpk.sh"])
def test_the_command_survives_the_shell_of_the_other_machine(name, remote):
    words = remote(name, "configs/x.py", "a folder", "--config.data.sources=b 'c'")
    (line,) = [w for w in words if w.startswith("--command=")]
    sent = line.removeprefix("--command=").split("&& ")[-1]
    other = subprocess.run(
        [BASH, "-c", f'printf "%s\\n" {sent}'], capture_output=True, text=True
    )
    assert other.stdout.splitlines()[-6:] == [
        "-m",
        "beacon_jax.train",
        "--config=configs/x.py",
        "--workdir=a folder",
        "--distributed",
        "--config.data.sources=b 'c'",
    ]


@pytest.fixture
def check(tmp_path):
    """Runs gpu_check.sh with a fake Python that notes its arguments, and fails where
    one of them is in `broken`; returns its result and the noted lines."""

    def call(*parts, broken=""):
        fake, log = tmp_path / "python", tmp_path / "log"
        fake.write_text(
            f'#!{BASH}\necho "$JAX_PLATFORMS $*" >>"{log}"\n'
            f'[[ -z "{broken}" || "$*" != *"{broken}"* ]]\n'
        )
        fake.chmod(0o755)
        log.write_text("")
        env = {"PYTHON": str(fake), "OUT": str(tmp_path / "out")}
        kept = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
        result = run(CHECK, *parts, env=kept | env)
        return result, log.read_text().splitlines()

    return call


def test_the_gpu_check_is_short_and_its_parts_end_within_9_minutes():
    text = source(CHECK)
    assert len(text.splitlines()) <= 40 and "\nset -euo pipefail\n" in text
    seconds = re.findall(r"(?:timeout -k 5|bench) (\d+) ", text)
    assert len(seconds) == len(PARTS) + 1 and sum(map(int, seconds)) < 540


def test_the_gpu_check_runs_every_part_on_the_gpu_and_skips_what_is_done(check):
    result, lines = check()
    assert result.returncode == 0, result.stderr
    assert all(line.startswith("cuda,cpu -m ") for line in lines)
    assert "pytest" in lines[1] and "tests/attention" in lines[1]
    del lines[1]
    for line, option in zip(lines, ("parity", "--kernels", *PARTS[2:]), strict=True):
        assert "beacon_jax.bench --preset=llama2-7b" in line and option in line
    result, lines = check()
    assert result.returncode == 0 and lines == []
    assert result.stdout.splitlines() == [f"{part}: done before" for part in PARTS]


def test_a_failed_part_of_the_gpu_check_costs_only_itself_and_is_run_again(check):
    result, lines = check("prefill", "train", broken="--parts=prefill")
    assert result.returncode == 1 and len(lines) == 2
    assert "not done: prefill: exit 1" in result.stderr
    result, lines = check("prefill", "train")
    assert result.returncode == 0
    assert len(lines) == 1 and "--parts=prefill" in lines[0]


def test_an_unknown_part_of_the_gpu_check_is_named(check):
    result, lines = check("prefil")
    assert result.returncode == 1 and lines == []
    assert "prefil: exit 2" in result.stderr and "use parity" in result.stderr


def test_smollm2_trains_then_measures_the_methods_that_exist(tmp_path):
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text(f'#!{BASH}\necho "$*" >>"{log}"\n')
    fake.chmod(0o755)
    given = {"PYTHON": str(fake), "MODEL": "m.gguf", "CORPUS": "corpus", "BATCH": "50"}
    given |= {"CONFIG": "configs/smollm2.py:gpu", "OUT": str(tmp_path / "out")}
    result = run(SMOLLM2, env=os.environ | given)
    assert result.returncode == 0, result.stderr
    train, *measured = log.read_text().splitlines()
    assert "--config=configs/smollm2.py:gpu " in train and "init_from=m.gguf" in train
    assert len(measured) == 3
    for line in measured:
        options = dict(x[2:].split("=", 1) for x in line.split() if "=" in x)
        assert make_tasks(options["tasks"].split(","))
        assert len(make_methods(options["methods"].split(","), [2, 4, 8])) == 26
        assert options["beacons"] == f"{tmp_path}/out/train/adapter"
        assert options["batch_size"] == "50"
    result = run(SMOLLM2, "txt", env=os.environ | given)
    assert result.returncode == 2 and "unknown part txt: use train" in result.stderr
    del given["MODEL"]
    kept = {k: v for k, v in os.environ.items() if k != "MODEL"}
    assert "MODEL: names the GGUF file" in run(SMOLLM2, env=kept | given).stderr


def test_a_corpus_of_own_folders_holds_their_long_documents_by_name(tmp_path):
    own, out = tmp_path / "own", tmp_path / "corpus"
    long = "a line of some words\n" * 500
    (own / "a").mkdir(parents=True)
    (own / "long.txt").write_text(long)
    (own / "copy.md").write_text(long)  # before long.txt in order
    (own / "short.txt").write_text("short\n")
    (own / "picture.png").write_bytes(b"x" * 9000)
    (own / "a" / "page.html").write_text(
        f"<head><title>no</title></head><p>One\ntwo</p><pre>{long}</pre>"
    )
    pod = f"=head1 Name\n\nC<code>, C<< a->[0] >>, L<text|page> E<gt>\n\n{long}"
    (own / "a" / "p.pod.gz").write_bytes(gzip.compress(pod.encode()))
    (own / "a" / "r.rst").write_text(f".. _label:\n\n:ref:`words <label>`\n\n{long}")
    result = run(CORPUS, str(out), str(own))
    assert result.returncode == 0, result.stderr
    files = {f.name: f.read_text() for f in out.iterdir()}
    assert sorted(files) == [f"own-{n}.txt" for n in ("a-p", "a-page", "a-r", "copy")]
    assert files["own-a-page.txt"].startswith("One two\n\na line of some words\na line")
    assert files["own-a-p.txt"].startswith("Name\n\ncode, a->[0], text >\n\na line")
    assert files["own-a-r.txt"].startswith("words\n\na line")
    assert "4 documents" in result.stdout and "1 short, 1 copies" in result.stdout
    again = run(CORPUS, str(out), str(own))
    assert again.returncode == 1 and f"DIR={out} exists" in again.stderr


def test_a_corpus_without_apt_says_so_in_one_line(tmp_path):
    names = ("bash", "dirname", "realpath")
    for name in names:
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    result = run(CORPUS, str(tmp_path / "corpus"), env={"PATH": str(tmp_path)})
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "apt-get and dpkg are not here" in line and "FOLDER" in line


def test_a_corpus_without_network_names_what_is_missing_and_the_remedy(tmp_path):
    fake = tmp_path / "apt-get"
    fake.write_text(f'#!{BASH}\necho "E: no route" >&2\nexit 100\n')
    fake.chmod(0o755)
    (tmp_path / "dpkg").symlink_to(fake)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    out = tmp_path / "corpus"
    result = run(CORPUS, str(out), env=os.environ | {"PATH": path})
    assert result.returncode == 1 and not out.exists()
    assert "left out: anarchism: E: no route" in result.stdout
    (line,) = result.stderr.splitlines()
    assert "name folders of your own text" in line


def test_the_deployment_of_servers_is_one_with_a_shared_store():
    given = {"IMAGE": "an/image:1", "MODEL": "/store/my model", "STORE": "claim"}
    result = run(SERVE, "--rows=16", "--ratio=it's", env=os.environ | given)
    assert result.returncode == 0, result.stderr
    deployment, service = yaml.safe_load_all(result.stdout)
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    assert deployment["spec"]["replicas"] == 2
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][0] == "--model=/store/my model"
    assert container["args"][-2:] == ["--rows=16", "--ratio=it's"]
    values = flags.FlagValues()
    serve.define_flags(values)
    for word in container["args"]:
        assert word.removeprefix("--").split("=")[0] in values
    (volume,) = pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == "claim"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert run(SERVE, env={"PATH": os.environ["PATH"]}).returncode != 0
