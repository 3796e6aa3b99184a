"""Compiles whole training steps for eight accelerators that are not here.

python -m beacon_jax.bench.aot [--cases=NAME,...] [--search] [--out=FOLDER]

XLA's own compilers for CUDA and TPU run without hardware: what comes out is the program
that would run there, and `memory_analysis()` says what it needs on each device. Prints
a table, writes aot.json, and ends with 1 if a case that has a budget exceeds it. A
program too large for its chip is a result, not a failure. The longest text that fits is
an estimate; --search compiles other lengths until it lies between one that fits and one
that does not.

Needs the `aot` extra: pip install "beacon_jax[aot]".
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to share

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from beacon_jax import resources
from beacon_jax.bench.records import provenance
from beacon_jax.core.plan import memory_slots
from beacon_jax.evaluation.report import table
from beacon_jax.model.config import param_shapes
from beacon_jax.model.presets import get_preset
from beacon_jax.training.config import default_config
from beacon_jax.training.memory import step_bytes
from beacon_jax.training.optim import make_optimizer
from beacon_jax.training.sharding import Placement, make_placement
from beacon_jax.training.trainer import make_update

GIB = 2**30
# Bytes of a chip that a program can have: 95 % (XLA_CLIENT_MEM_FRACTION in launch/).
USABLE = {"a100_80gb": 0.95 * 80e9, "h200": 0.95 * 141e9, "v5p": 95e9, "v5e": 16e9}
TARGETS = resources.folder("benchmarks") / "targets"


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to compile.

    target: a file of `targets` without .txtpb (8 GPUs), or a TPU topology.
    slots: memory slots per row; 0: what the lowest ratio needs in every window.
    budget: GiB per device that the peak must not exceed; 0: no budget.
    attention: its implementation; "": the chip's kernels.
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


CASES = {
    "llama2-7b-20k-a100": Case("llama2-7b", "a100_80gb", 20480, budget=26.0),
    "llama2-7b-20k-a100-fast": Case(
        "llama2-7b", "a100_80gb", 20480, mesh=(8, 1, 1), budget=80.0
    ),
    "llama2-7b-20k-x2-a100": Case("llama2-7b", "a100_80gb", 20480, ratios=(2,)),
    "qwen2-7b-20k-a100": Case("qwen2-7b", "a100_80gb", 20480, budget=80.0),
    "llama2-7b-128k-x8-a100": Case(
        "llama2-7b", "a100_80gb", 131072, ratios=(8,), budget=45.0
    ),
    "llama2-7b-128k-x8-a100-offload": Case(
        "llama2-7b", "a100_80gb", 131072, ratios=(8,), offload=True
    ),
    "llama2-7b-128k-a100": Case(
        "llama2-7b", "a100_80gb", 131072, slots=32768, budget=80.0
    ),
    "llama2-7b-20k-v5p": Case("llama2-7b", "v5p:2x2x2", 20480),
    "qwen2-7b-20k-v5p": Case("qwen2-7b", "v5p:2x2x2", 20480),
    "llama2-7b-20k-x2-v5p": Case("llama2-7b", "v5p:2x2x2", 20480, ratios=(2,)),
    "qwen2-7b-20k-x2-v5p": Case("qwen2-7b", "v5p:2x2x2", 20480, ratios=(2,)),
    "llama2-7b-4k-v5e": Case("llama2-7b", "v5e:2x4", 4096),
    "llama2-7b-8k-x2-v5e": Case("llama2-7b", "v5e:2x4", 8192, ratios=(2,)),
    "qwen2-7b-8k-x2-v5e": Case("qwen2-7b", "v5e:2x4", 8192, ratios=(2,)),
}
# What the kernels save: the same steps with attention in XLA.
CASES |= {
    f"{name}-{attention}": dataclasses.replace(
        CASES[name], attention=attention, budget=0.0
    )
    for name in ("llama2-7b-20k-a100", "qwen2-7b-20k-a100", "llama2-7b-128k-x8-a100")
    for attention in ("blockwise", "reference")
}


def devices(target: str) -> Any:
    """The eight devices of a target, none of which is here."""
    if target == "cpu":  # eight virtual ones, to try this script itself
        return jax.devices()
    file = TARGETS / f"{target}.txtpb"
    if file.exists():
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology="1x1x8",
            target_config=file.read_text(),
        ).devices
    return topologies.get_topology_desc(platform="tpu", topology_name=target).devices


def abstract_step(case: Case) -> tuple[Any, tuple[Any, ...], float]:
    """The jitted step, its arguments as shapes with shardings, and the estimate of
    `training.memory`, GiB per device."""
    model = get_preset(case.model)
    assert model.beacon is not None
    beacon = dataclasses.replace(model.beacon, ratios=case.ratios)
    model = dataclasses.replace(model, beacon=beacon)
    config = default_config()
    config.dtype = "bfloat16"
    config.memory_slots, config.offload = case.slots, case.offload
    config.attention = case.attention
    for name, size in zip(("data", "fsdp", "tensor"), case.mesh, strict=True):
        config.mesh[name] = size
    rows = case.mesh[0] * case.mesh[1]
    placement = make_placement(config.mesh, config.rules, [rows], devices(case.target))
    windows = -(-case.length // beacon.window)
    shapes = param_shapes(model)
    is_shape = lambda x: isinstance(x, tuple)
    arrays = lambda tree, dtype: jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=is_shape
    )
    trained = arrays({"beacon": shapes["beacon"]}, jnp.float32)
    frozen = arrays({"params": shapes["params"]}, jnp.bfloat16)
    trained = _placed(trained, placement.trained(model, trained))
    frozen = _placed(frozen, placement.frozen(model, frozen))
    optimizer = make_optimizer(config.optimizer, 1000)
    fresh = jax.eval_shape(optimizer.init, trained)
    where = jax.tree.map(lambda x: x.sharding, trained)
    state = {
        "trained": trained,
        "optimizer": _placed(fresh, placement.optimizer(fresh, where)),
        "step": _on(placement.everywhere, (), jnp.int32),
    }
    update = make_update(config, model, optimizer, placement, state, case.remat)
    need = step_bytes(
        model,
        placement,
        trained,
        frozen,
        rows=1,
        windows=windows,
        slots=case.slots or memory_slots(model, windows),
        dtype=jnp.bfloat16,
        offload=case.offload,
    )
    inputs = _inputs(placement, windows, rows, beacon.window)
    return update, (state, frozen, *inputs), need[case.remat] / GIB


def _inputs(placement: Placement, windows: int, rows: int, window: int):
    split = placement.partition.sharding((None, "batch"))
    shape = (windows, rows, window)
    batch = {
        "tokens": _on(split, shape, jnp.int32),
        "labels": _on(split, shape, jnp.int32),
        "valid": _on(split, shape[:2], jnp.int32),
        "weights": _on(split, shape, jnp.float32),
    }
    columns = placement.plan_sharding
    return batch, _on(columns, (windows, placement.plans), jnp.int32)


def _on(sharding, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _placed(tree, shardings):
    return jax.tree.map(lambda x, s: _on(s, x.shape, x.dtype), tree, shardings)


def measure(name: str, case: Case) -> dict[str, Any]:
    """Compiles a case; GiB per device, or why there is none."""
    result: dict[str, Any] = {"case": name, **dataclasses.asdict(case)}
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


def fits_chip(case: Case, result: dict[str, Any]) -> bool:
    """The TPU compiler fits a program into its chip, or refuses; that for GPUs does
    not know the chip's memory."""
    if "overflow" in result:
        return False
    return ":" in case.target or result["total_gib"] * GIB <= USABLE[case.target]


def search(name: str, case: Case, fits: int) -> dict[str, Any]:
    """The longest text that fits, to within a tenth, by compiling other lengths than
    the case's, and what each of them needs. `fits`: a length that does, or 0."""
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


def longest(case: Case, scale: float) -> int:
    """Tokens up to which the estimate, scaled to what was compiled, fits the chip."""
    beacon = get_preset(case.model).beacon
    assert beacon is not None
    window, limit = beacon.window, USABLE[case.target.split(":")[0]]
    low, high = 1, 2**24 // window
    while low < high:
        middle = (low + high + 1) // 2
        tried = dataclasses.replace(case, length=middle * window, slots=0)
        if abstract_step(tried)[2] * scale * GIB <= limit:
            low = middle
        else:
            high = middle - 1
    return low * window


def main(argv):
    del argv
    names = flags.FLAGS.cases or list(CASES)
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results, missed = [], []
    for name in names:
        result = measure(name, CASES[name])
        if flags.FLAGS.search:
            fits = CASES[name].length * fits_chip(CASES[name], result)
            result["searched"] = search(name, CASES[name], fits)
        results.append(result)
        print(json.dumps(result), flush=True)
        budget = CASES[name].budget
        if budget and not result.get("total_gib", np.inf) <= budget:
            missed.append(name)
        record = provenance() | {"results": results}
        (out / "aot.json").write_text(json.dumps(record, indent=2) + "\n")
    print(_table(results))
    if missed:
        sys.exit(f"error: over budget: {', '.join(missed)}")


def _table(results: list[dict[str, Any]]) -> str:
    heads = [
        "case",
        "arguments",
        "temp",
        "total GiB",
        "peak",
        "estimate",
        "budget",
        "longest tokens",
        "compile s",
    ]
    rows = [
        [
            r["case"],
            *(str(r.get(f"{k}_gib", "-")) for k in ("arguments", "temp")),
            str(r.get("total_gib", "does not fit: " + r.get("overflow", "")[:60])),
            *(str(r.get(f"{k}_gib", "-")) for k in ("peak", "estimate")),
            str(r["budget"] or "-"),
            f"{r['longest']:,}" if "longest" in r else "-",
            str(r.get("compile_s", "-")),
        ]
        for r in results
    ]
    return table(heads, rows)


if __name__ == "__main__":
    flags.DEFINE_list("cases", None, f"Of {', '.join(CASES)}; all by default.")
    flags.DEFINE_bool("search", False, "Compile until the longest text is known.")
    flags.DEFINE_string("out", "out/aot", "Folder of aot.json.")
    app.run(main)
