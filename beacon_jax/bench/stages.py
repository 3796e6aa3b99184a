"""Says what a pipeline over layers costs beside tensor parallelism, for eight devices.

python -m beacon_jax.bench.stages [--out=FOLDER] [--measure]

Prefill of one row of Llama-2-7B at x8 in bfloat16, with mesh tensor:8 and stage:8. What
is sent is counted in the programs that XLA compiles for eight chips of each kind
(`bench.hlo`), none of which is here. What it takes is predicted:

  tensor   sum over windows of F / (8 u P)  +  N (sent / B + count * LATENCY)
  stage    the same sum * (N + 7) / N       +  (N + 7) (sent / B + count * LATENCY)

F are a window's FLOPs (`beacon_jax.flops`), P the chip's peak, u = UTILISATION, B the
links' bytes per second of a device in one direction, N the windows. An all-reduce of n
bytes among D devices sends 2 (D - 1) / D n from each. Nothing of it is measured on such
chips.

--measure runs the same formula against this machine's processor: two devices of one
core each, at two lengths. Writes stages.json.

Needs the `aot` extra: pip install "beacon_jax[aot]".
"""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # else the devices are those of whoever imports this
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # for --measure
    os.environ.setdefault("PJRT_NPROC", "4")  # two launches on each (`runtime`)

from beacon_jax.bench import targets  # before jax

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from beacon_jax import flops
from beacon_jax.bench.device import random_variables
from beacon_jax.bench.hlo import Sent, sent
from beacon_jax.bench.records import provenance, write_json
from beacon_jax.bench.report import by_column
from beacon_jax.core.feed import feed_jit
from beacon_jax.core.memory import init_memory
from beacon_jax.core.plan import capacity
from beacon_jax.inference import leaves
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import variable_axes
from beacon_jax.model.net import Net
from beacon_jax.model.partition import Partition, make_partition
from beacon_jax.model.presets import get_preset
from beacon_jax.model.shapes import param_shapes
from beacon_jax.training.hardware import find_chip

PRESET, RATIO, DEVICES = "llama2-7b", 8, 8
LENGTHS = (32768, 131072, 1048576)
TARGETS = {"A100 80GB": "a100_80gb", "H200": "h200", "TPU v5p": "v5p:2x2x2"}
# GB/s of a device's links in one direction: NVIDIA's data sheets (NVLink 3: 600 both
# ways, NVLink 4: 900), Google Cloud's TPU documentation (v5p: 4,800 Gbit/s of ICI).
LINKS = {"A100 80GB": 300.0, "H200": 450.0, "TPU v5p": 600.0}
UTILISATION = 0.6  # of the peak, in matrix products of a window
LATENCY = 10e-6  # seconds that a collective takes besides its bytes
WINDOWS = 16  # of the program that is compiled


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a mesh sends between two windows, per device."""

    mesh: str
    count: float
    bytes: float


def abstract(config: ModelConfig, partition: Partition) -> dict[str, Any]:
    """Describes bfloat16 variables that are split over devices."""
    axes = variable_axes(config)
    is_shape = lambda x: isinstance(x, tuple)

    def one(shape: tuple[int, ...], names: tuple[Any, ...]) -> Any:
        where = partition.sharding(names, shape)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where)

    return jax.tree.map(one, param_shapes(config), axes, is_leaf=is_shape)


def prefill(config: ModelConfig, mesh: str, windows: int, devices: Any) -> str:
    """Compiles the prefill of some windows for eight devices; returns its HLO."""
    assert config.beacon is not None
    partition, w = make_partition(mesh, devices), config.beacon.window
    net = Net(config, "bfloat16", partition=partition)
    size = capacity(config, np.full(windows, RATIO))
    memory = jax.eval_shape(lambda: init_memory(config, 1, size, jnp.bfloat16))
    where = leaves.shardings(partition, memory)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    memory = jax.tree.map(place, memory, where)
    ids = jax.ShapeDtypeStruct((1, windows * w), jnp.int32)
    one = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    given = (net, abstract(config, partition), memory, ids, one(1), one(1, 1), None)
    lowered = feed_jit.lower(*given, static=(RATIO,), outputs="last")
    return lowered.compile().as_text() or ""


def cost(config: ModelConfig, axis: str, devices: Any) -> Cost:
    """Counts what a window costs: the difference of programs of N and 2 N windows.

    So what is sent once per text (the last token's hidden state) is left out.
    """
    mesh = f"{axis}:{DEVICES}"
    text = lambda windows: prefill(config, mesh, windows, devices)
    few, many = (sent(text(n)) for n in (WINDOWS, 2 * WINDOWS))
    if not (few.loops and many.loops):
        raise ValueError(f"mesh={mesh}: a loop that sends does not say how often.")
    moved = [_moved(x) for x in (few, many)]
    count = [sum(x.counts.values()) for x in (few, many)]
    each = lambda pair: (pair[1] - pair[0]) / WINDOWS
    return Cost(mesh, each(count), each(moved))


def _moved(found: Sent, devices: int = DEVICES) -> float:
    """Returns the bytes that leave a device."""
    share = (devices - 1) / devices
    factors = {"all-reduce": 2 * share, "all-gather": share, "all-to-all": share}
    return sum(n * factors.get(kind, 1.0) for kind, n in found.bytes.items())


def predict(
    config: ModelConfig, length: int, chip: str, tensor: Cost, stage: Cost
) -> dict[str, Any]:
    """Predicts the seconds of a prefill on eight chips with both meshes."""
    found, link = find_chip(chip), LINKS[chip] * 1e9
    assert found is not None and config.beacon is not None
    n = -(-length // config.beacon.window)
    work = flops.prefill(config, length, RATIO).total
    busy = work / (DEVICES * UTILISATION * found.tflops * 1e12)
    wire = lambda cost: cost.bytes / link + cost.count * LATENCY
    split, ticks = busy + n * wire(tensor), n + DEVICES - 1
    piped = busy * ticks / n + ticks * wire(stage)
    return {
        "chip": chip,
        "length": length,
        "tensor_s": split,
        "stage_s": piped,
        "speed_up": split / piped,
        "products_s": busy,
        "tensor_bytes_per_token": tensor.bytes * n / length,
        "stage_bytes_per_token": stage.bytes * ticks / length,
    }


# --- two devices of one core each -----------------------------------------------------

SMALL = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=65536,
    eos_ids=(2,),
    bos_ids=(1,),
    beacon=BeaconConfig(window=256, ratios=(RATIO,)),
)
POINTS = (4, 16)  # windows


def measure(repeats: int = 5) -> list[dict[str, Any]]:
    """Times one core, and two as stages, against (N + 1) / (2 N) of one core's time.

    Raises:
      ValueError: there are not two cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError("--measure needs two cores.")
    rows = []
    for n in POINTS:
        one = functools.partial(_seconds, n, None)
        two = functools.partial(_seconds, n, "stage:2")
        alone, piped = [], []
        for _ in range(repeats):  # in turn: what else runs meets both
            _pin(cores[:1])
            alone.append(one())
            _pin(cores[:2])
            piped.append(two())
        a, b = float(np.median(alone)), float(np.median(piped))
        wanted = a * (n + 1) / (2 * n)
        rows.append(
            {
                "windows": n,
                "one_core_s": a,
                "two_stages_s": b,
                "predicted_s": wanted,
                "error": b / wanted - 1,
            }
        )
    return rows


def _pin(cores: list[int]) -> None:
    """Lets all threads of this process run on some cores only."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


@functools.cache
def _made(windows: int, mesh: str | None) -> Any:
    config, w = SMALL, 256
    partition = make_partition(mesh) if mesh else None
    net = Net(config, "float32", partition=partition)
    variables = random_variables(config, jnp.float32)
    size = capacity(config, np.full(windows, RATIO))
    memory = init_memory(config, 1, size, jnp.float32)
    if partition is not None:
        axes = variable_axes(config)
        put = lambda x, names: jax.device_put(x, partition.sharding(names, x.shape))
        variables = jax.tree.map(put, variables, axes)
        memory = jax.device_put(memory, leaves.shardings(partition, memory))
    ids = np.random.default_rng(0).integers(0, 512, (1, windows * w), dtype=np.int32)
    return net, variables, memory, ids


def _seconds(windows: int, mesh: str | None) -> float:
    net, variables, memory, ids = _made(windows, mesh)
    given = (ids, np.full(1, ids.size, np.int32), np.full((1, 1), RATIO, np.int32))

    def run() -> float:
        copy = jax.block_until_ready(memory.copy())
        begin = time.perf_counter()
        out, _ = feed_jit(
            net, variables, copy, *given, None, static=(RATIO,), outputs="last"
        )
        jax.block_until_ready(out.last_logits)
        return time.perf_counter() - begin

    run()
    return min(run() for _ in range(2))


# --- the command ----------------------------------------------------------------------

COLUMNS = {
    "8 ×": lambda r: r["chip"],
    "tokens": lambda r: f"{r['length']:,}",
    "`tensor:8` s": lambda r: f"{r['tensor_s']:.2f}",
    "`stage:8` s": lambda r: f"{r['stage_s']:.2f}",
    "speed-up": lambda r: f"{r['speed_up']:.2f}",
    "sent per token, tensor": lambda r: f"{r['tensor_bytes_per_token'] / 1e3:,.0f} KB",
    "stage": lambda r: f"{r['stage_bytes_per_token'] / 1e3:,.1f} KB",
}
POINT = {
    "windows": lambda r: str(r["windows"]),
    "one core s": lambda r: f"{r['one_core_s']:.2f}",
    "`stage:2` s": lambda r: f"{r['two_stages_s']:.2f}",
    "predicted s": lambda r: f"{r['predicted_s']:.2f}",
    "error": lambda r: f"{100 * r['error']:+.0f} %",
}


def main(_: list[str]) -> None:
    """Runs the command."""
    config = get_preset(PRESET)
    assert config.beacon is not None
    beacon = dataclasses.replace(config.beacon, ratios=(RATIO,))
    config = dataclasses.replace(config, beacon=beacon)
    costs, rows = [], []
    for chip, target in TARGETS.items():
        devices = targets.devices(target)
        found = [cost(config, axis, devices) for axis in ("tensor", "stage")]
        for each in found:
            per = f"{each.count:.0f} collectives, {each.bytes / 1e6:,.1f} MB"
            print(f"{chip}, {each.mesh}: {per} per device and window", flush=True)
            costs.append({"chip": chip} | dataclasses.asdict(each))
        rows += [predict(config, n, chip, *found) for n in LENGTHS]
    print(by_column(COLUMNS, rows))
    points = measure() if flags.FLAGS.measure else []
    if points:
        print(by_column(POINT, points))
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    assumed = {"utilisation": UTILISATION, "latency_s": LATENCY, "links_gbs": LINKS}
    result = {"assumed": assumed, "costs": costs, "rows": rows, "points": points}
    write_json(out / "stages.json", provenance() | result)


if __name__ == "__main__":
    flags.DEFINE_string("out", "out/stages", "Folder of stages.json.")
    flags.DEFINE_bool("measure", False, "Times this machine's processor, too.")
    app.run(main)
