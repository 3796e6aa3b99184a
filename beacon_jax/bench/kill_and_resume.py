"""Kills a training run with SIGKILL again and again; it must end as if it never were.

python -m beacon_jax.bench.kill_and_resume [--kills=10] [--out=FOLDER]

Trains the quickstart's beacons for a few dozen steps, once undisturbed and once killed
at random moments, also while a checkpoint is written. The exports have to be equal
byte for byte; ends with 1 if they are not.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

SETTINGS = {
    "data.stages.stage1.steps": 30,
    "data.stages.stage2.steps": 30,
    "data.stages.stage3.steps": 30,
    "save_every": 3,
    "log_every": 1,
}


def command(workdir: Path) -> list[str]:
    """Returns the command line of a run of ninety steps."""
    options = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    module = [sys.executable, "-m", "beacon_jax.train"]
    config = ["--config=quickstart:smoke", f"--workdir={workdir}"]
    return [*module, *config, *options]


def steps_done(workdir: Path) -> int:
    """Returns the last step that metrics.jsonl has, 0 without one."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue  # cut off by the kill
    return 0


def killed_run(workdir: Path, kills: int, rng: random.Random) -> int:
    """Kills `kills` times, then lets the run end; returns how many kills hit."""
    total = sum(v for k, v in SETTINGS.items() if k.endswith("steps"))
    hit = 0
    for i in range(kills):
        process = subprocess.Popen(command(workdir), stdout=subprocess.DEVNULL)
        goal = rng.randrange(total * i // kills, total * (i + 1) // kills)
        while process.poll() is None and steps_done(workdir) <= goal:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.3))  # somewhere in a step, or in a checkpoint
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit += 1
        process.wait()
        print(f"kill {i + 1}: after step {steps_done(workdir)}", flush=True)
    subprocess.run(command(workdir), check=True, stdout=subprocess.DEVNULL)
    return hit


def digest(workdir: Path) -> str:
    """Returns the SHA-256 of the exported weights."""
    weights = (workdir / "export" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()


def main(argv):
    del argv
    out = Path(flags.FLAGS.out)
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(command(out / "whole"), check=True, stdout=subprocess.DEVNULL)
    hit = killed_run(out / "killed", flags.FLAGS.kills, random.Random(flags.FLAGS.seed))
    hashes = digest(out / "whole"), digest(out / "killed")
    print(f"{hit} kills; undisturbed {hashes[0][:16]}, killed {hashes[1][:16]}")
    if hashes[0] != hashes[1]:
        sys.exit("error: the killed run ended with other weights")


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 10, "How often.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_string("out", "out/kill", "Folder of both runs; emptied first.")
    app.run(main)
