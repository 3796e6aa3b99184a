"""The interpreter finder, with fake interpreters in a PATH and a HOME of its own; and
the extras that users are told to install."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

FINDER = Path(__file__).parents[1] / "launch" / "find_python.sh"
BASH = shutil.which("bash") or "bash"
SHIM = "echo 'pyenv: python3.12: command not found' >&2; echo >&2; echo Try it >&2"

# Runs the finder's own check in a real interpreter that claims another version and
# another place.
CLAIM = """
import sys
sys.version_info = {version}
sys._base_executable = {path!r}
exec(sys.argv[1])
"""


def add_python(path: Path, version: tuple[int, ...]) -> str:
    """An executable at `path` that behaves as a working Python of that version."""
    claim = path.with_name(path.name + "-claim.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text(CLAIM.format(version=version, path=str(path)))
    return add_script(path, f'exec "{sys.executable}" "{claim}" "$2"')


def add_script(path: Path, body: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def find(tmp_path):
    """Runs the finder with `tmp_path/{bin,bin2}` as PATH and `tmp_path` as HOME."""

    def run(**environ: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}/bin:{tmp_path}/bin2", "HOME": str(tmp_path)}
        return subprocess.run(
            [BASH, str(FINDER)], env=env | environ, capture_output=True, text=True
        )

    return run


def test_a_python_on_path_is_found(find, tmp_path):
    path = add_python(tmp_path / "bin/python3.13", (3, 13, 0))
    assert find().stdout.strip() == path


def test_the_version_that_the_results_ran_with_comes_first(find, tmp_path):
    add_python(tmp_path / "bin/python3.14", (3, 14, 0))
    path = add_python(tmp_path / "bin2/python3.12", (3, 12, 1))
    assert find().stdout.strip() == path


def test_a_shim_that_fails_does_not_hide_a_python_further_down_path(find, tmp_path):
    add_script(tmp_path / "bin/python3.12", SHIM + "; exit 127")
    path = add_python(tmp_path / "bin2/python3.12", (3, 12, 1))
    assert find().stdout.strip() == path


def test_versions_under_pyenv_root_are_found_behind_a_failing_shim(find, tmp_path):
    root = tmp_path / "elsewhere"
    add_script(tmp_path / "bin/python3.12", SHIM + "; exit 127")
    add_script(tmp_path / "bin/pyenv", f'[[ $1 == root ]] && echo "{root}"')
    add_python(root / "versions/3.11.7/bin/python", (3, 11, 7))
    path = add_python(root / "versions/3.12.1/bin/python", (3, 12, 1))
    assert find().stdout.strip() == path


def test_versions_under_home_are_found_without_a_pyenv_command(find, tmp_path):
    path = add_python(tmp_path / ".pyenv/versions/3.12.1/bin/python", (3, 12, 1))
    assert find().stdout.strip() == path


def test_a_python_that_uv_manages_is_found(find, tmp_path):
    managed = tmp_path / ".local/share/uv/python/cpython-3.13.1-linux"
    path = add_python(managed / "bin/python3", (3, 13, 1))
    assert find().stdout.strip() == path


def test_an_interpreter_asked_for_is_used_before_all_others(find, tmp_path):
    add_python(tmp_path / "bin/python3.12", (3, 12, 1))
    path = add_python(tmp_path / "mine/python", (3, 14, 0))
    assert find(PYTHON=path).stdout.strip() == path


def test_an_interpreter_asked_for_that_fails_is_an_error_not_replaced(find, tmp_path):
    add_python(tmp_path / "bin/python3.12", (3, 12, 1))
    path = add_python(tmp_path / "mine/python", (3, 11, 7))
    result = find(PYTHON=path)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{path}: is Python 3.11" in result.stderr


def test_the_failure_says_all_that_was_tried_and_how_to_point_to_one(find, tmp_path):
    shim = add_script(tmp_path / "bin/python3.12", SHIM + "; exit 127")
    old = add_python(tmp_path / "bin/python3", (3, 11, 7))
    new = add_python(tmp_path / ".pyenv/versions/3.15.0/bin/python", (3, 15, 0))
    result = find()
    assert (result.returncode, result.stdout) == (1, "")
    for line in (
        f"{shim}: pyenv: python3.12: command not found",
        "python3.13: not on PATH",
        f"{old}: is Python 3.11",
        f"{new}: is Python 3.15",
        "versions/*/bin/python under $(pyenv root), $PYENV_ROOT and ~/.pyenv",
        "make setup PYTHON=/path/to/python3.12",
    ):
        assert line in result.stderr


def test_a_python_that_cannot_make_an_environment_is_passed_over(find, tmp_path):
    # Debian without python3-venv: the interpreter runs, ensurepip is missing.
    bare = add_python(tmp_path / "bin/python3.12", (3, 12, 1))
    claim = tmp_path / "bin/python3.12-claim.py"
    missing = "import sys\nsys.modules['ensurepip'] = None\n"
    claim.write_text(missing + claim.read_text())
    path = add_python(tmp_path / "bin/python3", (3, 12, 2))
    assert find().stdout.strip() == path
    Path(path).unlink()
    assert f"{bare}: ModuleNotFoundError: import of ensurepip" in find().stderr


def test_every_extra_that_a_user_is_told_to_install_is_there():
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    folders = ("beacon_jax", "launch", "configs")
    files = [f for name in folders for f in (root / name).rglob("*.*") if f.is_file()]
    texts = [f.read_text("utf-8") for f in files if f.suffix in (".py", ".sh")]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    texts += [page.read_text(encoding="utf-8") for page in pages]
    told = [re.findall(r"beacon_jax\[([a-z0-9,-]+)\]", text) for text in texts]
    named = {extra for found in told for group in found for extra in group.split(",")}
    assert {"aot", "tokamax", "lm-eval"} <= named
    assert named <= set(project["project"]["optional-dependencies"])
