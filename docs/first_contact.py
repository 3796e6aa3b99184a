"""Plays a new user's first half hour, and writes what was typed and printed.

python docs/first_contact.py            # with the package that is installed here
python docs/first_contact.py --install  # from a wheel, in a fresh environment: minutes
python docs/first_contact.py --write    # into docs/first-contact.md

It asks the small model that comes with the package, trains beacons for the small base
on a folder of text for 20 steps, stops in the middle with Ctrl-C, goes on, and
evaluates. Every command has to end as it should, or the script fails.
"""

import argparse
import dataclasses
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-contact.md"
BEGIN, END = "<!-- transcript:begin -->", "<!-- transcript:end -->"
SECONDS = 900  # for one command
TRAIN = """\
beacon-jax train --config=own --workdir=out/own --config.init_from=tiny-base \\
  --config.data.sources=texts --config.data.stages.stage1.steps=20"""


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the transcript.

    Attributes:
      title: what the user wants.
      command: as it is typed.
      code: the exit code that it should end with.
      interrupt: a line of the output at which Ctrl-C is pressed; "": never.
      shows: expressions that the output must contain.
    """

    title: str
    command: str
    code: int = 0
    interrupt: str = ""
    shows: tuple[str, ...] = ()


STEPS = (
    Step(
        "See which commands there are",
        "beacon-jax --help",
        shows=("generate", "train", "evaluate"),
    ),
    Step(
        "Ask the small model about a text",
        "beacon-jax generate --model=tiny-beacon --context=note.txt --ratio=4 \\\n"
        '  --prompt="What is the pass key? The pass key is " --max_new_tokens=5',
        shows=("71492",),
    ),
    Step(
        "Train beacons on a folder of text, and press Ctrl-C",
        TRAIN,
        code=130,
        interrupt=r"^step +[1-9]",
        shows=("SIGINT",),
    ),
    Step(
        "Go on with the same command",
        TRAIN,
        shows=("out/own/export", "20"),
    ),
    Step(
        "Evaluate what was trained",
        "beacon-jax evaluate --model=out/own/export --tasks=perplexity --ratios=4 \\\n"
        "  --methods=beacon,full,window --limit=4 --out=out/report",
        shows=("beacon_x4", "window"),
    ),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("--install", action="store_true")
    arguments.add_argument("--write", action="store_true")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = transcript(Path(folder), install=given.install)
    if given.write:
        old = PAGE.read_text("utf-8")
        before, after = old.split(BEGIN)[0], old.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")
    else:
        print(text)


def transcript(folder: Path, *, install: bool = False) -> str:
    """Runs all steps in `folder` and returns them as Markdown.

    Raises:
      RuntimeError: a command ended or printed otherwise than its step says.
    """
    make_texts(folder)
    parts = []
    binaries = Path(sys.executable).parent
    if install:
        parts.append(_install(folder))
        binaries = folder / ".venv" / "bin"
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(folder)}
    environment.setdefault("JAX_PLATFORMS", "cpu")
    for step in STEPS:
        print(f"first_contact: {step.title}", file=sys.stderr, flush=True)
        code, output = _play(step, folder, environment)
        if code != step.code:
            raise RuntimeError(f"{step.command}: exit code {code}:\n{output}")
        for shown in step.shows:
            if not re.search(shown, output, re.MULTILINE):
                raise RuntimeError(f"{step.command}: no {shown!r} in:\n{output}")
        parts.append(_section(step.title, step.command, output))
    text = "\n\n".join(parts)
    return text.replace(str(folder), "~").replace(str(binaries), "bin")


def make_texts(folder: Path) -> None:
    """Writes texts/ (seven files of the standard library) and note.txt, with a key."""
    (folder / "texts").mkdir()
    for module in (argparse, inspect, subprocess, tempfile, dataclasses, json, signal):
        name = f"{module.__name__}.txt"
        (folder / "texts" / name).write_text(inspect.getsource(module), "utf-8")
    doc = inspect.getdoc(argparse) or ""
    key = "\nThe pass key is 71492. Remember it. 71492 is the pass key.\n"
    (folder / "note.txt").write_text(f"{doc[:300]}{key}{doc[300:600]}", "utf-8")


def _install(folder: Path) -> str:
    """Builds a wheel and installs it into a fresh environment."""
    wheel = [sys.executable, "-m", "uv", "build", "--wheel", "--quiet"]
    subprocess.run([*wheel, "--out-dir", str(folder), str(ROOT)], check=True)
    name = next(folder.glob("*.whl")).name
    command = f"python3 -m venv .venv\n.venv/bin/pip install '{name}[plots]'"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", ".venv"], cwd=folder, check=True)
    python = str(folder / ".venv" / "bin" / "python")
    install = ["pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([python, "-m", *install, f"{name}[plots]"], cwd=folder, check=True)
    seconds = time.perf_counter() - began
    size = sum(f.stat().st_size for f in (folder / ".venv").rglob("*") if f.is_file())
    told = f"(installed in {seconds:.0f} s, {size / 2**30:.1f} GiB)"
    return _section("Install", f"{command}\nsource .venv/bin/activate", told)


def _section(title: str, command: str, output: str) -> str:
    return f"## {title}\n\n```sh\n{command}\n```\n\n```text\n{output.rstrip()}\n```"


def _play(step: Step, folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Runs a command with stdout and stderr in one; (exit code, output)."""
    process = subprocess.Popen(
        step.command,
        shell=True,
        executable="/bin/bash",
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C goes to the whole group, as from a terminal
    )
    assert process.stdout is not None
    output, pressed, began = [], not step.interrupt, time.monotonic()
    for line in process.stdout:
        output.append(line)
        if not pressed and re.search(step.interrupt, line):
            output.append("^C\n")
            os.killpg(process.pid, signal.SIGINT)
            pressed = True
        if time.monotonic() - began > SECONDS:
            os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"{step.command}: more than {SECONDS} s:\n{output}")
    return process.wait(), "".join(output)


if __name__ == "__main__":
    main()
