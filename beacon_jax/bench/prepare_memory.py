"""Peak memory and speed of preparing data, and the speed of reading it back.

python -m beacon_jax.bench.prepare_memory [--megabytes=100,2000] [--workers=2]
  [--out=FOLDER]

Writes a text of each size as JSON lines (documents of 2 to 14 KB, lines of the standard
library in random order), prepares it with the tokenizer of assets/tiny-base in a
process of its own, and prints JSON: the peak RSS of the main process and of its largest
worker in MiB, tokens/s, and tokens/s of the batches that training would read from it,
made by one thread.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from beacon_jax.data.grouped import GroupConfig, GroupedBatches
from beacon_jax.data.prepared import Prepared
from beacon_jax.data.text import load_documents

LOADED_STEPS = 100


def write_text(path: Path, megabytes: int) -> int:
    """Writes JSON lines of about that size; returns the number of documents."""
    rng = np.random.default_rng(0)
    lines = "".join(load_documents("stdlib", "train")).splitlines(keepends=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < megabytes * 10**6:
            picked = rng.integers(0, len(lines), int(rng.integers(60, 400)))
            text = "".join(lines[i] for i in picked)
            file.write(json.dumps({"text": text}) + "\n")
            count += 1
    return count


def run(file: Path, folder: Path, workers: int) -> dict[str, float]:
    """Prepares in another process; returns its peak memory and its time."""
    command = [sys.executable, "-m", "beacon_jax.data.prepare", f"--out={folder}"]
    command += ["--config=llama2_7b_pretrain", f"--workers={workers}"]
    settings = {
        "init_from": "tiny-base",
        "data.sources": repr((str(file.absolute()),)),
        "data.min_length": 0,
        "data.tokens": 0,
    }
    command += [f"--config.{key}={value}" for key, value in settings.items()]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            peaks[pid] = max(peaks.get(pid, 0.0), peak(pid))
        time.sleep(0.5)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    others = [size for pid, size in peaks.items() if pid != process.pid]
    return {
        "main_mib": round(peaks[process.pid], 1),
        "worker_mib": round(max(others, default=0.0), 1),
        "seconds": time.monotonic() - began,
    }


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started (Linux)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def peak(pid: int) -> float:
    """Returns the most that a process ever held in memory, in MiB (Linux)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(found[0]) / 1024 if found else 0.0


def loader_speed(folder: Path) -> float:
    """Measures tokens/s of whole batches of eight rows."""
    batches = GroupedBatches(
        Prepared(folder), GroupConfig(1024, 8, epochs=0, steps=200)
    )
    began, tokens = time.perf_counter(), 0
    for step in range(LOADED_STEPS):
        tokens += int(batches.batch(step)["lengths"].sum())
    return tokens / (time.perf_counter() - began)


def main(argv: list[str]) -> None:
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    for size in flags.FLAGS.megabytes:
        file, folder = out / f"{size}.jsonl", out / f"{size}"
        shutil.rmtree(folder, ignore_errors=True)
        documents = write_text(file, int(size))
        result = run(file, folder, flags.FLAGS.workers)
        tokens = Prepared(folder).manifest["total"]["tokens"]
        result |= {
            "megabytes": file.stat().st_size / 1e6,
            "documents": documents,
            "workers": flags.FLAGS.workers,
            "tokens": tokens,
            "tokens_per_second": tokens / result["seconds"],
            "loader_tokens_per_second": loader_speed(folder),
            "load_average": os.getloadavg()[0],
        }
        file.unlink()
        shutil.rmtree(folder)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("megabytes", ["100", "2000"], "Sizes of the texts.")
    flags.DEFINE_integer("workers", 2, "Processes that tokenise.")
    flags.DEFINE_string("out", "out/prepare_memory", "Folder; emptied afterwards.")
    app.run(main)
