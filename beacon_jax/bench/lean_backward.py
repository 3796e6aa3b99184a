"""The lean backward pass against plain reverse mode, over the number of windows.

python -m beacon_jax.bench.lean_backward [--out=FOLDER]

At equal shapes on this machine: seconds per step (median and spread) and bytes of
temporaries, for every `remat`. Plain reverse mode needs a buffer per window; the lean
one needs one, so its line is flat but for the buffer itself. Writes lean_backward.json
and lean_backward.png.
"""

import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from beacon_jax.bench.records import provenance
from beacon_jax.core.train_loss import train_loss
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.net import Net
from beacon_jax.training.initial import random_variables

REMAT = ("lean", "lean-layer", "window", "none")
MODEL = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    max_position=8192,
    eos_ids=(2,),
    bos_ids=(1,),
    beacon=BeaconConfig(window=128, ratios=(2, 8)),
)


def measure(remat: str, windows: int, repeats: int) -> dict[str, object]:
    assert MODEL.beacon is not None
    variables = random_variables(MODEL, 0)
    shape = (windows, 1, MODEL.beacon.window)
    tokens = np.random.default_rng(0).integers(3, 512, shape).astype(np.int32)
    batch = {
        "tokens": tokens,
        "labels": np.roll(tokens, -1, -1),
        "valid": np.full(shape[:2], shape[2], np.int32),
    }
    plan = jnp.asarray([2, 8] * windows)[:windows]
    loss = lambda beacon, params: train_loss(
        Net(MODEL), beacon, params, batch, plan, remat=remat
    )[0]
    arguments = variables["beacon"], variables["params"]
    start = time.perf_counter()
    step = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
    compiled = time.perf_counter() - start
    jax.block_until_ready(step(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
    memory: Any = step.memory_analysis()
    return {
        "remat": remat,
        "windows": windows,
        "seconds": float(np.median(times)),
        "spread": float(np.max(times) - np.min(times)),
        "compile_seconds": compiled,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def plot(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for remat in REMAT:
        mine = [r for r in rows if r["remat"] == remat]
        windows = [r["windows"] for r in mine]
        panels[0].plot(windows, [r["seconds"] for r in mine], "o-", label=remat)
        sizes = [r["temp_bytes"] / 2**20 for r in mine]
        panels[1].plot(windows, sizes, "o-", label=remat)
    for panel, label in zip(panels, ("s per step", "MiB of temporaries"), strict=True):
        panel.set(xlabel="windows of 128 tokens", ylabel=label, xscale="log")
        panel.set_yscale("log")
        panel.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def main(argv):
    del argv
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for windows in map(int, flags.FLAGS.windows):
        for remat in REMAT:
            rows.append(measure(remat, windows, flags.FLAGS.repeats))
            print(json.dumps(rows[-1]), flush=True)
    record = provenance() | {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "machine": platform.machine(),
        "rows": rows,
    }
    (out / "lean_backward.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(rows, out / "lean_backward.png")


if __name__ == "__main__":
    flags.DEFINE_list("windows", ["4", "8", "16", "32"], "Numbers of windows.")
    flags.DEFINE_integer("repeats", 5, "Timed steps.")
    flags.DEFINE_string("out", "out/lean_backward", "Folder of the results.")
    app.run(main)
