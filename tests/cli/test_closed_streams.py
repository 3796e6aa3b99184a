"""Streams that are closed or full, and disks that take no more: one line, a remedy."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from beacon_jax import paths
from beacon_jax.cli import ending
from beacon_jax.hf.writer import new_folder

ROOT = Path(__file__).parents[2]
FULL = "error: stdout cannot be written (No space left on device): make room"
needs_full = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no /dev/full"
)


def shell(words: str, *, unbuffered: bool = False) -> tuple[int, str, str]:
    """Runs `beacon-jax WORDS` with the shell's redirections."""
    ran = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m beacon_jax {words}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""},
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize("words", ["--version", "convert --help"])
@pytest.mark.parametrize("closed", ["2>&-", "<&-", "2>&- <&-"])
def test_closed_streams_stop_no_command(words, closed):
    code, out, err = shell(f"{words} {closed}")
    assert (code, err) == (0, "") and "beacon-jax" in out


@pytest.mark.parametrize("words", ["--version", "convert --help", "generate"])
def test_a_closed_stdout_is_named(words):
    code, _, err = shell(f"{words} >&- <&-")
    assert code == 1 and err.startswith("error: stdout is closed, and ")
    assert len(err.splitlines()) == 1


def test_an_error_with_closed_streams_has_its_code_alone():
    assert shell("convert --nothing >&- 2>&- <&-") == (1, "", "")


@needs_full
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("words", ["--help", "--version", "convert --help"])
def test_a_full_stdout_is_named(words, unbuffered):
    code, _, err = shell(f"{words} >/dev/full", unbuffered=unbuffered)
    assert code == 1 and err.startswith(FULL)
    assert len(err.splitlines()) == 1


@needs_full
def test_a_full_stderr_stops_no_command():
    code, out, _ = shell("--version 2>/dev/full")
    assert code == 0 and out.startswith("beacon-jax ")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    code = "import sys; from beacon_jax.cli.ending import ended\n"
    code += "with ended('x'), open(sys.argv[1], 'w') as file:\n"
    code += "    print('no', file=sys.stderr)\n    file.write(str(file.fileno()))"
    line = f'{sys.executable} -c "$1" "$2" 2>&- <&-'
    path = tmp_path / "file"
    subprocess.run(["bash", "-c", line, "bash", code, path], cwd=ROOT, check=True)
    assert int(path.read_text()) > 2


# --- disks -------------------------------------------------------------------------


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", paths.FULL)
def test_a_disk_that_takes_no_more_is_named_with_the_argument(number):
    said = r"^--out=a cannot be written \(.*: make room"
    with pytest.raises(OSError, match=said), paths.named_when_full("--out=a"):
        raise full(number)
    with pytest.raises(PermissionError) as kept, paths.named_when_full("--out=a"):
        raise PermissionError(errno.EACCES, "no")
    assert kept.value.errno == errno.EACCES


def test_a_file_and_a_folder_on_a_full_disk_are_named_and_not_there(tmp_path):
    file, folder = tmp_path / "a.beacon", tmp_path / "b"
    said = f"^--out={file} cannot be written"
    with pytest.raises(OSError, match=said), paths.new_file(file, "--out"):
        raise full()
    said = f"^--dst={folder} cannot be written"
    with pytest.raises(OSError, match=said), new_folder(folder, overwrite=False):
        raise full()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ending.OUTPUTS)
def test_a_full_disk_is_named_by_the_flag_of_what_is_written(flag):
    values = flags.FlagValues()
    flags.DEFINE_string(flag, "here", "", flag_values=values)
    with pytest.raises(SystemExit) as ended:
        ending.fail(full(), values)
    assert str(ended.value.code).startswith(f"error: --{flag}=here cannot be written (")


@pytest.mark.parametrize(
    ("given", "text", "said"),
    [
        ("m/a", "path=m/a has no x", "--model=m/a has no x"),
        ("m/a/", "path=m/a: y", "--model=m/a/: y"),
        ("m/a", "path=m/ab has no x", "m/ab has no x"),
        ("m/a", "path=m/a/b has no x", "m/a/b has no x"),
        ("m/a b", "path=m/a b has no x", "--model=m/a b has no x"),
    ],
)
def test_a_path_is_named_by_the_flag_that_has_it(given, text, said):
    values = flags.FlagValues()
    flags.DEFINE_string("other", "elsewhere", "", flag_values=values)
    flags.DEFINE_string("model", given, "", flag_values=values)
    assert ending.in_flags(ValueError(text), values) == said
