"""Compiles the attention kernels for accelerators that are not here.

python -m benchmarks.aot_kernels [--cases=NAME,...] [--out=FOLDER]

At the shapes of real models, with what each kernel takes of its chip: registers, spills
and shared memory per program on GPU (from ptxas), VMEM on TPU. A kernel that does not
compile, for lack of shared memory say, ends the script with 1.

Needs the `aot` extra: pip install "beacon_jax[aot]".
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beacon_jax.attention import prefix_attention
from beacon_jax.attention.device import Target
from beacon_jax.benchmark.records import provenance
from beacon_jax.evaluation.report import table
from beacon_jax.model.presets import get_preset
from beacon_jax.model.rotary import inverse_frequencies

TARGETS = Path(__file__).parent / "targets"
GPUS = ("a100_80gb", "h200")
TPUS = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")
MEMORY = 16384  # slots
ARCHITECTURES = {"a100_80gb": "sm_80", "h200": "sm_90a"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile.

    target: a file of `targets` without .txtpb, or a TPU topology.
    queries: T, a window of T / 1.5 tokens with its beacons at ratio 2.
    backward: forward and backward on one layer's buffer, as in training; otherwise
      forward on a layer of the stacked buffer, as in inference.
    rows: B; above one of two layers only: 32 would not fit.
    int8: of a memory with scales per slot.
    mean: whose keys lack their mean.
    """

    model: str
    target: str
    queries: int
    backward: bool
    implementation: str
    rows: int = 1
    int8: bool = False
    mean: bool = False

    @property
    def name(self) -> str:
        way = "backward" if self.backward else "decode" if self.rows > 1 else "forward"
        kind = "-int8" * self.int8 + "-mean" * self.mean
        return f"{self.model}-{self.queries}-{way}{kind}-{self.target.split(':')[0]}"


CASES = {
    case.name: case
    for target in (*GPUS, *TPUS)
    for model in ("llama2-7b", "qwen2-7b")
    for queries in (1536, 3072)
    for backward in (False, True)
    for case in [
        Case(
            model,
            target,
            queries,
            backward,
            "pallas_gpu" if target in GPUS else "pallas_tpu",
        )
    ]
}


# A token, and a window's beacons at ratio 8, for eight rows.
CASES |= {
    case.name: case
    for target in (*GPUS, *TPUS)
    for model in ("llama2-7b", "qwen2-7b")
    for queries, int8, mean in (
        (1, False, False),
        (128, False, False),
        (1, True, False),
        (1, True, True),
    )
    for on_tpu in ["decode_tpu" if queries == 1 and not int8 else "pallas_tpu"]
    for kernel in ["decode_gpu" if target in GPUS else on_tpu]
    for case in [
        Case(model, target, queries, False, kernel, rows=8, int8=int8, mean=mean)
    ]
}


def device_mesh(target: str) -> Mesh:
    """Of one device of the target, which is not here."""
    file = TARGETS / f"{target}.txtpb"
    if file.exists():
        where: Any = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology="1x1x8",
            target_config=file.read_text(),
        )
    else:
        where = topologies.get_topology_desc(platform="tpu", topology_name=target)
    return Mesh(np.asarray(where.devices[:1]), ("all",))


def program(case: Case, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """A function and its arguments as shapes on the mesh's device."""
    config = get_preset(case.model)
    t, s = case.queries, MEMORY + case.queries
    here = NamedSharding(mesh, PartitionSpec())
    on = functools.partial(jax.ShapeDtypeStruct, sharding=here)
    b, heads = case.rows, config.num_kv_heads
    stack = () if case.backward else (config.num_layers if b == 1 else 2,)
    q = on((b, t, config.num_heads, config.head_dim), jnp.bfloat16)
    dtype = jnp.int8 if case.int8 else jnp.bfloat16
    keys = on((*stack, b, s, heads, config.head_dim), dtype)
    arguments = (q, keys, keys, on((b,), jnp.int32))
    attend = functools.partial(
        prefix_attention,
        implementation=case.implementation,
        target=Target.of(mesh.devices.flat[0]),
    )
    if not case.backward:
        names = ("layer", "k_scale", "v_scale", "k_mean")
        scale = on((*stack, b, heads, s), jnp.float32)
        more = (on((), jnp.int32), *[scale] * (2 if case.int8 else 0))
        if case.mean:
            more += (on((*stack, b, heads, config.head_dim), jnp.float32),)
            attend = functools.partial(attend, frequencies=inverse_frequencies(config))
        layered = lambda q, k, v, prefix, *more: attend(
            q, k, v, prefix, **dict(zip(names, more, strict=False))
        )
        return layered, (*arguments, *more)

    def gradients(q, k, v, prefix, d_out):
        return jax.vjp(lambda q, k, v: attend(q, k, v, prefix), q, k, v)[1](d_out)

    return gradients, (*arguments, q)


def compiled(function, arguments, mesh: Mesh, **options) -> Any:
    """For the mesh's device. options: of the compiler."""
    # Pallas itself wants to know the chip, too, and asks the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile(compiler_options=options)


def gpu_kernels(function, arguments, mesh: Mesh, architecture: str) -> list[dict]:
    """What each kernel of ours takes of a program: registers per thread, bytes spilled
    per thread, bytes of shared memory and threads per block."""
    with tempfile.TemporaryDirectory() as folder:
        compiled(
            function, arguments, mesh, xla_dump_to=folder, xla_dump_emitter_re="ptx"
        )
        sequence = next(Path(folder).glob("*thunk_sequence.txt")).read_text()
        kernels = {}
        for file in Path(folder).glob("*.ptx"):
            if match := re.search(r"\.entry (prefix_\w+)", file.read_text()):
                kernels[match[1]] = registers(file, architecture)
    numbers = r"grid: \[([\d, ]+)\] threads: \[(\d+).*?shared_memory: (\d+)"
    found = re.findall(rf"(prefix_\w+) {numbers}", sequence)
    return [
        {
            "kernel": name,
            "grid": [int(x) for x in grid.split(",")],
            "threads": int(threads),
            "shared_memory": int(shared),
            **kernels[name],
        }
        for name, grid, threads, shared in found
    ]


def tpu_kernels(program) -> list[dict]:
    """Bytes of vector memory that each kernel of ours takes."""
    used = (
        r'used_scoped_memory_configs":\[{"memory_space":"1","offset":"0","size":"(\d+)'
    )
    return [
        {"kernel": name, "vmem": int(size)}
        for line in program.as_text().splitlines()
        if "tpu_custom_call" in line
        for name in re.findall(r"^\s*(?:ROOT )?%(prefix_\w+)", line)
        for size in re.findall(used, line)
    ]


def registers(ptx: Path, architecture: str) -> dict[str, int]:
    """Of a kernel, from ptxas."""
    import nvidia.cuda_nvcc  # pyright: ignore[reportMissingImports]

    ptxas = Path(next(iter(nvidia.cuda_nvcc.__path__))) / "bin" / "ptxas"
    command = [ptxas, "-v", f"--gpu-name={architecture}", ptx, "-o", os.devnull]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    used, spilled = r"Used (\d+) registers", r"(\d+) bytes spill stores"
    find = lambda pattern: int(re.findall(pattern, told)[-1])
    return {"registers": find(used), "spilled": find(spilled)}


def measure(case: Case) -> dict[str, Any]:
    """Compiles a case."""
    mesh = device_mesh(case.target)
    function, arguments = program(case, mesh)
    start = time.perf_counter()
    executable = compiled(function, arguments, mesh)
    memory: Any = executable.memory_analysis()
    result = {
        "case": case.name,
        **dataclasses.asdict(case),
        "compile_s": round(time.perf_counter() - start, 1),
        "temp_mib": round(memory.temp_size_in_bytes / 2**20, 1),
    }
    if case.target in GPUS:
        architecture = ARCHITECTURES[case.target]
        result["kernels"] = gpu_kernels(function, arguments, mesh, architecture)
    else:
        result["kernels"] = tpu_kernels(executable)
    return result


def main(argv):
    del argv
    names = flags.FLAGS.cases or list(CASES)
    out = Path(flags.FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results, failed = [], []
    for name in names:
        try:
            results.append(measure(CASES[name]))
        except Exception as error:  # every case is reported before the script fails
            failed.append(name)
            results.append({"case": name, "error": str(error).splitlines()[0][:300]})
        print(json.dumps(results[-1]), flush=True)
        record = provenance() | {"results": results}
        (out / "aot_kernels.json").write_text(json.dumps(record, indent=2) + "\n")
    print(_table(results))
    if failed:
        sys.exit(f"error: did not compile: {', '.join(failed)}")


def _table(results: list[dict[str, Any]]) -> str:
    heads = [
        "case",
        "kernel",
        "registers",
        "spilled",
        "shared KiB",
        "VMEM MiB",
        "threads",
        "temp MiB",
        "compile s",
    ]
    rows = []
    for r in results:
        for k in r.get("kernels", [{}]):
            rows.append(
                [
                    r["case"],
                    k.get("kernel", r.get("error", "-")[:60]),
                    *(str(k.get(key, "-")) for key in ("registers", "spilled")),
                    f"{k['shared_memory'] / 1024:.0f}" if "registers" in k else "-",
                    f"{k['vmem'] / 2**20:.1f}" if "vmem" in k else "-",
                    str(k.get("threads", "-")),
                    str(r.get("temp_mib", "-")),
                    str(r.get("compile_s", "-")),
                ]
            )
    return table(heads, rows)


if __name__ == "__main__":
    flags.DEFINE_list("cases", None, f"Of {', '.join(CASES)}; all by default.")
    flags.DEFINE_string("out", "out/aot", "Folder of aot_kernels.json.")
    app.run(main)
