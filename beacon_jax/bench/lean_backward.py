"""The lean backward pass against plain reverse mode, over the number of windows.

python -m beacon_jax.bench.lean_backward [--out=FOLDER]

At equal shapes on this machine: seconds per step (median and spread) and bytes of
temporaries, for every `remat`. Plain reverse mode needs a buffer per window; the lean
one needs one, so its line is flat but for the buffer itself. Writes lean_backward.json
and lean_backward.png.
"""

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from beacon_jax.bench.records import Row, write_result
from beacon_jax.bench.timing import compile_program, measure
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.net import Net
from beacon_jax.model.presets import get_preset
from beacon_jax.training.initial import random_variables

REMAT = ("lean", "lean-layer", "window", "none")
WINDOW = 128
MODEL = dataclasses.replace(
    get_preset("tiny"),
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_kv_heads=4,
    head_dim=64,
    max_position=8192,
    beacon=BeaconConfig(window=WINDOW, ratios=(2, 8)),
)


def measure_step(remat: str, windows: int, repeats: int) -> Row:
    """Measures the gradient of a text of so many windows, its ratios 2, 8, 2, ..."""
    variables = random_variables(MODEL, 0)
    shape = (windows, 1, WINDOW)
    tokens = np.random.default_rng(0).integers(3, 512, shape).astype(np.int32)
    batch = {
        "tokens": tokens,
        "labels": np.roll(tokens, -1, -1),
        "valid": np.full(shape[:2], WINDOW, np.int32),
    }
    plan = jnp.asarray([2, 8] * windows)[:windows]
    loss = lambda beacon, params: train_loss(
        Net(MODEL), beacon, params, batch, plan, LossConfig(remat=remat)
    )[0]
    arguments = variables["beacon"], variables["params"]
    step = compile_program(jax.value_and_grad(loss), *arguments)
    times = measure(lambda: step.run(*arguments), repeats=repeats)
    memory: Any = step.run.memory_analysis()
    return {
        "remat": remat,
        "windows": windows,
        "seconds": times.median_s,
        "spread": times.max_s - times.min_s,
        "compile_seconds": step.seconds,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def plot(rows: list[Row], path: Path) -> None:
    """Draws seconds and temporaries over the number of windows, a line per `remat`."""
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


def main(argv: list[str]) -> None:
    del argv
    rows = []
    for windows in map(int, flags.FLAGS.windows):
        for remat in REMAT:
            rows.append(measure_step(remat, windows, flags.FLAGS.repeats))
            print(json.dumps(rows[-1]), flush=True)
    file = write_result(
        flags.FLAGS.out,
        "lean_backward.json",
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        machine=platform.machine(),
        rows=rows,
    )
    plot(rows, file.with_suffix(".png"))


if __name__ == "__main__":
    flags.DEFINE_list("windows", ["4", "8", "16", "32"], "Numbers of windows.")
    flags.DEFINE_integer("repeats", 5, "Timed steps.")
    flags.DEFINE_string("out", "out/lean_backward", "Folder of the results.")
    app.run(main)
