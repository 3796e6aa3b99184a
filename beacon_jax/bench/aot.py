"""Compiles whole training steps for eight accelerators that are not here.

python -m beacon_jax.bench.aot [--cases=NAME,...] [--search] [--out=FOLDER]

`memory_analysis()` of the program that would run there (`bench.targets`) says what it
needs on each device. Prints a table, writes aot.json, and ends with 1 if a case that
has a budget exceeds it. A program too large for its chip is a result, not a failure.
The longest text that fits is an estimate; --search compiles other lengths until it lies
between one that fits and one that does not.

Needs the `aot` extra: pip install "beacon_jax[aot]".
"""

import bisect
import dataclasses
import json
import time
from typing import Any

import numpy as np
from absl import flags

from beacon_jax.bench import targets  # before jax

# isort: split
import jax
import jax.numpy as jnp

from beacon_jax.bench.records import Row
from beacon_jax.bench.report import by_column
from beacon_jax.bench.sizes import GIB
from beacon_jax.bench.training import abstract, placed
from beacon_jax.core.plan import memory_slots
from beacon_jax.model.presets import get_preset
from beacon_jax.training.config import default_config
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.trainer import make_update

# Bytes of a chip that a program can have: 95 % (XLA_CLIENT_MEM_FRACTION in launch/).
USABLE = {"a100_80gb": 0.95 * 80e9, "h200": 0.95 * 141e9, "v5p": 95e9, "v5e": 16e9}


@dataclasses.dataclass(frozen=True)
class StepCase:
    """Names one step to compile.

    target: of `targets.devices`.
    slots: memory slots per row; 0: what the lowest ratio needs in every window.
    budget: GiB per device that the peak must not exceed; 0: no budget.
    attention: its implementation; "": the chip's kernels.
    loss: its kind, "labels" or "distil".
    rank: of the beacons' changes; 0: weights of their own.
    """

    model: str
    target: str
    length: int
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    mesh: tuple[int, int, int] = (1, 8, 1)
    slots: int = 0
    budget: float = 0.0
    remat: str = "lean-layer"
    offload: bool = False
    attention: str = ""
    loss: str = "labels"
    rank: int = 0


CASES = {
    "llama2-7b-20k-a100": StepCase("llama2-7b", "a100_80gb", 20480, budget=26.0),
    "llama2-7b-20k-a100-fast": StepCase(
        "llama2-7b", "a100_80gb", 20480, mesh=(8, 1, 1), budget=80.0
    ),
    "llama2-7b-20k-x2-a100": StepCase("llama2-7b", "a100_80gb", 20480, ratios=(2,)),
    "llama2-7b-20k-distil-a100": StepCase(
        "llama2-7b", "a100_80gb", 20480, loss="distil"
    ),
    "llama2-7b-20k-r64-a100": StepCase("llama2-7b", "a100_80gb", 20480, rank=64),
    "qwen2-7b-20k-a100": StepCase("qwen2-7b", "a100_80gb", 20480, budget=80.0),
    "llama2-7b-128k-x8-a100": StepCase(
        "llama2-7b", "a100_80gb", 131072, ratios=(8,), budget=45.0
    ),
    "llama2-7b-128k-x8-a100-offload": StepCase(
        "llama2-7b", "a100_80gb", 131072, ratios=(8,), offload=True
    ),
    "llama2-7b-128k-a100": StepCase(
        "llama2-7b", "a100_80gb", 131072, slots=32768, budget=80.0
    ),
    "llama2-7b-20k-v5p": StepCase("llama2-7b", "v5p:2x2x2", 20480),
    "qwen2-7b-20k-v5p": StepCase("qwen2-7b", "v5p:2x2x2", 20480),
    "llama2-7b-20k-x2-v5p": StepCase("llama2-7b", "v5p:2x2x2", 20480, ratios=(2,)),
    "qwen2-7b-20k-x2-v5p": StepCase("qwen2-7b", "v5p:2x2x2", 20480, ratios=(2,)),
    "llama2-7b-4k-v5e": StepCase("llama2-7b", "v5e:2x4", 4096),
    "llama2-7b-8k-x2-v5e": StepCase("llama2-7b", "v5e:2x4", 8192, ratios=(2,)),
    "qwen2-7b-8k-x2-v5e": StepCase("qwen2-7b", "v5e:2x4", 8192, ratios=(2,)),
}
# What the kernels save: the same steps with attention in XLA.
CASES |= {
    f"{name}-{attention}": dataclasses.replace(
        CASES[name], attention=attention, budget=0.0
    )
    for name in ("llama2-7b-20k-a100", "qwen2-7b-20k-a100", "llama2-7b-128k-x8-a100")
    for attention in ("blockwise", "reference")
}


def abstract_step(case: StepCase) -> tuple[Any, tuple[Any, ...], float]:
    """Makes a step of the trainer without arrays.

    Returns:
      The jitted step, its arguments as shapes with shardings, and the estimate of
      `training.memory` in GiB per device.
    """
    model = get_preset(case.model)
    assert model.beacon is not None
    beacon = dataclasses.replace(model.beacon, ratios=case.ratios, rank=case.rank)
    model = dataclasses.replace(model, beacon=beacon)
    config = default_config()
    config.dtype = "bfloat16"
    config.memory_slots, config.offload = case.slots, case.offload
    config.attention, config.loss.kind = case.attention, case.loss
    for name, size in zip(("data", "fsdp", "tensor"), case.mesh, strict=True):
        config.mesh[name] = size
    rows = case.mesh[0] * case.mesh[1]
    windows = -(-case.length // beacon.window)
    slots = case.slots or memory_slots(model, windows)
    devices = targets.devices(case.target)
    placement, trained, frozen, need = abstract(
        model, config, devices, rows, windows, slots
    )
    optimizer = make_optimizer(config.optimizer, 1000)
    fresh = jax.eval_shape(optimizer.init, trained)
    where = jax.tree.map(lambda x: x.sharding, trained)
    on = lambda sharding, shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
        shape, dtype, sharding=sharding
    )
    state = {
        "trained": trained,
        "optimizer": placed(fresh, placement.optimizer(fresh, where)),
        "step": on(placement.everywhere, ()),
    }
    update = make_update(config, model, optimizer, placement, state, case.remat)
    split = placement.partition.sharding((None, "batch"))
    shape = (windows, rows, beacon.window)
    batch = {
        "tokens": on(split, shape),
        "labels": on(split, shape),
        "valid": on(split, shape[:2]),
        "weights": on(split, shape, jnp.float32),
    }
    plans = on(placement.plan_sharding, (windows, placement.plans))
    return update, (state, frozen, batch, plans), need[case.remat] / GIB


def measure(name: str, case: StepCase) -> Row:
    """Compiles a case; returns GiB per device, or why there is none."""
    result: Row = {"case": name, **dataclasses.asdict(case)}
    start = time.perf_counter()
    try:
        step, arguments, estimate = abstract_step(case)
        result["estimate_gib"] = round(estimate, 2)
        lowered = step.lower(*arguments)
        result["lower_s"] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        memory: Any = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = [line for line in str(error).splitlines() if "Used" in line]
        return result | {"overflow": (lines or str(error).splitlines())[0][:200]}
    result["compile_s"] = round(time.perf_counter() - start, 1)
    for key, value in (
        ("arguments", memory.argument_size_in_bytes),
        ("temp", memory.temp_size_in_bytes),
        ("output", memory.output_size_in_bytes - memory.alias_size_in_bytes),
        ("peak", getattr(memory, "peak_memory_in_bytes", 0)),
    ):
        result[f"{key}_gib"] = round(value / GIB, 2)
    total = result["arguments_gib"] + result["temp_gib"] + result["output_gib"]
    result["total_gib"] = round(total, 2)
    result["longest"] = longest(case, total / estimate)
    return result


def fits_chip(case: StepCase, result: Row) -> bool:
    """Tells whether a compiled case fits its chip.

    The TPU compiler fits a program into its chip, or refuses; that for GPUs does not
    know the chip's memory.
    """
    if "overflow" in result:
        return False
    return ":" in case.target or result["total_gib"] * GIB <= USABLE[case.target]


def search(name: str, case: StepCase, fits: int) -> Row:
    """Compiles other lengths, until the longest that fits is known to within a tenth.

    Args:
      fits: a length that does, or 0.

    Returns:
      The length that fits, one that does not, and the GiB of each that was tried.
    """
    beacon = get_preset(case.model).beacon
    assert beacon is not None
    too_long, tried = 0 if fits else case.length, {}
    length = int(1.4 * fits or case.length / 2) // beacon.window * beacon.window
    while length > fits and length != too_long:
        result = measure(name, dataclasses.replace(case, length=length))
        tried[length] = result.get("total_gib", "does not fit")
        print(json.dumps({"case": name, "length": length, "gib": tried[length]}))
        if fits_chip(case, result):
            fits = length
        else:
            too_long = length
        if too_long and too_long - fits <= max(0.1 * fits, beacon.window):
            break
        goal = (fits + too_long) / 2 if too_long else 1.4 * fits
        length = int(goal / beacon.window + 0.5) * beacon.window
    return {"fits": fits, "too_long": too_long, "tried": tried}


def longest(case: StepCase, scale: float) -> int:
    """Returns the tokens up to which the estimate fits the chip.

    `scale` is what was compiled over what was estimated.
    """
    beacon = get_preset(case.model).beacon
    assert beacon is not None
    window, limit = beacon.window, USABLE[case.target.split(":")[0]]

    def needed(windows: int) -> float:
        tried = dataclasses.replace(case, length=windows * window, slots=0)
        return abstract_step(tried)[2] * scale * GIB

    fitting = bisect.bisect(range(1, 2**24 // window + 1), limit, key=needed)
    return max(fitting, 1) * window


def measure_named(name: str) -> Row:
    """Compiles the case of a name, and with --search others of other lengths."""
    case = CASES[name]
    result = measure(name, case)
    if flags.FLAGS.search:
        fits = case.length * fits_chip(case, result)
        result["searched"] = search(name, case, fits)
    return result


def _table(results: list[Row]) -> str:
    gib = lambda key: lambda r: r.get(f"{key}_gib", "-")
    too_large = lambda r: "does not fit: " + r.get("overflow", "")[:60]
    columns = {
        "case": lambda r: r["case"],
        "arguments": gib("arguments"),
        "temp": gib("temp"),
        "total GiB": lambda r: r.get("total_gib") or too_large(r),
        "peak": gib("peak"),
        "estimate": gib("estimate"),
        "budget": lambda r: r["budget"] or "-",
        "longest tokens": lambda r: f"{r['longest']:,}" if "longest" in r else "-",
        "compile s": lambda r: r.get("compile_s", "-"),
    }
    return by_column(columns, results)


if __name__ == "__main__":
    flags.DEFINE_bool("search", False, "Compile until the longest text is known.")
    targets.compile_all(
        CASES,
        measure_named,
        file="aot.json",
        text=_table,
        fault="over budget",
        wrong=lambda r: r["budget"] and not r.get("total_gib", np.inf) <= r["budget"],
    )
