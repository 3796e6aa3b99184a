"""Compiles the attention kernels for accelerators that are not here.

python -m beacon_jax.bench.aot_kernels [--cases=NAME,...] [--out=FOLDER]

At the shapes of real models, with what each kernel takes of its chip: registers, spills
and shared memory per program on GPU (from ptxas), VMEM on TPU. A kernel that does not
compile, for lack of shared memory say, ends the script with 1.

Needs the `aot` extra: pip install "beacon_jax[aot]".
"""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.bench import targets  # before jax

# isort: split
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beacon_jax.attention import prefix_attention
from beacon_jax.attention.device import Target
from beacon_jax.bench.device import whole_tiles
from beacon_jax.bench.records import Row
from beacon_jax.bench.report import by_column
from beacon_jax.model.presets import get_preset
from beacon_jax.model.rotary import inverse_frequencies

GPUS = ("a100_80gb", "h200")
TPUS = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x2", "v6e:2x4")
MEMORY = 16384  # slots
ARCHITECTURES = {"a100_80gb": "sm_80", "h200": "sm_90a"}


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """Names one program to compile.

    target: of `targets.devices`.
    queries: T, a window of T / 1.5 tokens with its beacons at ratio 2.
    backward: forward and backward on one layer's buffer, as in training; otherwise
      forward on a layer of the stacked buffer, as in inference.
    rows: B; above one of two layers only: 32 would not fit.
    implementation: one of `attention.IMPLEMENTATIONS`.
    int8: of a memory with scales per slot.
    mean: whose keys lack their mean.
    bias: slots have one.
    """

    model: str
    target: str
    queries: int
    backward: bool
    implementation: str
    rows: int = 1
    int8: bool = False
    mean: bool = False
    bias: bool = False

    @property
    def name(self) -> str:
        """The case's name on the command line."""
        way = "backward" if self.backward else "decode" if self.rows > 1 else "forward"
        kind = "-int8" * self.int8 + "-mean" * self.mean + "-bias" * self.bias
        kind += "-mosaic" * ("mosaic" in self.implementation)
        return f"{self.model}-{self.queries}-{way}{kind}-{self.target.split(':')[0]}"


def _cases() -> Iterator[KernelCase]:
    for target in (*GPUS, *TPUS):
        windows = ("pallas_gpu", "mosaic_gpu") if target in GPUS else ("pallas_tpu",)
        for model in ("llama2-7b", "qwen2-7b"):
            for queries in (1536, 3072):
                for backward in (False, True):
                    for kernel in windows:
                        yield KernelCase(model, target, queries, backward, kernel)
    # A token, and a window's beacons at ratio 8, for eight rows.
    for target in (*GPUS, *TPUS):
        for model in ("llama2-7b", "qwen2-7b"):
            for queries, options in (
                (1, {}),
                (128, {}),
                (1, {"int8": True}),
                (1, {"int8": True, "mean": True}),
            ):
                kernel = "decode_gpu"
                if target in TPUS:
                    one = queries == 1 and not options
                    kernel = "decode_tpu" if one else "pallas_tpu"
                case = KernelCase(model, target, queries, False, kernel, rows=8)
                yield dataclasses.replace(case, **options)
                if target in GPUS and not options:
                    yield dataclasses.replace(case, implementation="decode_mosaic_gpu")
    # Each kernel that takes a bias per slot.
    for target in (*GPUS, *TPUS):
        kernels = ("pallas_gpu", "mosaic_gpu") if target in GPUS else ("pallas_tpu",)
        for kernel in kernels:
            for backward in (False, True) if target in GPUS else (False,):
                case = KernelCase("qwen2-7b", target, 1536, backward, kernel)
                yield dataclasses.replace(case, bias=True)
        kernels = (
            ("decode_gpu", "decode_mosaic_gpu") if target in GPUS else ("decode_tpu",)
        )
        for kernel in kernels:
            yield KernelCase("qwen2-7b", target, 1, False, kernel, rows=8, bias=True)
    # The other width of heads that Mosaic's kernels take: Qwen2-0.5B's 64.
    for target in GPUS:
        for backward in (False, True):
            yield KernelCase("qwen2-0.5b", target, 1536, backward, "mosaic_gpu")


CASES = {case.name: case for case in _cases()}


def program(case: KernelCase, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """Returns a function and its arguments as shapes on the mesh's device."""
    config = get_preset(case.model)
    t, s = case.queries, whole_tiles(MEMORY + case.queries)
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
        more = {"layer": on((), jnp.int32)}
        names = ["k_scale", "v_scale"] * case.int8 + ["bias"] * case.bias
        more |= dict.fromkeys(names, on((*stack, b, heads, s), jnp.float32))
        if case.mean:
            more["k_mean"] = on((*stack, b, heads, config.head_dim), jnp.float32)
            attend = functools.partial(attend, frequencies=inverse_frequencies(config))
        layered = lambda q, k, v, prefix, more: attend(q, k, v, prefix, **more)
        return layered, (*arguments, more)

    biases = [on((b, heads, s), jnp.float32)] * case.bias

    def gradients(q, k, v, prefix, d_out, *bias):
        options = {"bias": bias[0]} if bias else {}
        one = lambda q, k, v: attend(q, k, v, prefix, **options)
        return jax.vjp(one, q, k, v)[1](d_out)

    return gradients, (*arguments, q, *biases)


def compiled(function, arguments, mesh: Mesh, **options) -> Any:
    """Compiles a function for the mesh's device, with options of the compiler."""
    # Pallas itself wants to know the chip, too, and asks the mesh; Mosaic for GPUs asks
    # the default device for its compute capability.
    device = mesh.devices.flat[0]
    default = contextlib.nullcontext()
    if device.platform == "gpu":
        default = jax.default_device(device)
    with default, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile(compiler_options=options)


def gpu_kernels(
    function, arguments, mesh: Mesh, architecture: str
) -> tuple[Any, list[dict]]:
    """Compiles for a GPU; returns the program and what each kernel of ours takes.

    Each has registers and bytes spilled per thread, bytes of shared memory and threads
    per block.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder  # read by XLA's plugin
        try:
            program = compiled(
                function, arguments, mesh, xla_dump_to=folder, xla_dump_emitter_re="ptx"
            )
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        mosaic = [_mosaic_kernel(file) for file in Path(folder).glob("prefix_*.ptxas")]
        if mosaic:
            return program, mosaic
        return program, _triton_kernels(Path(folder), architecture)


def _mosaic_kernel(file: Path) -> dict:
    """Reads what ptxas said of a Mosaic kernel; a program is one warpgroup."""
    name = re.sub(r"_\d+$", "", file.stem)
    resources = next(file.parent.glob(f"{name}_*.resources.txt")).read_text()
    shared = int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0])
    return {
        "kernel": name,
        "threads": 128,
        "shared_memory": shared,
        **_registers(file.read_text()),
    }


def _triton_kernels(folder: Path, architecture: str) -> list[dict]:
    sequence = next(folder.glob("*thunk_sequence.txt")).read_text()
    kernels = {}
    for file in folder.glob("*.ptx"):
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
    """Returns the bytes of vector memory that each kernel of ours takes."""
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
    """Asks ptxas for the registers and spilled bytes of a kernel."""
    import nvidia.cuda_nvcc  # pyright: ignore[reportMissingImports]

    ptxas = Path(next(iter(nvidia.cuda_nvcc.__path__))) / "bin" / "ptxas"
    command = [ptxas, "-v", f"--gpu-name={architecture}", ptx, "-o", os.devnull]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return _registers(done.stderr)


def _registers(told: str) -> dict[str, int]:
    """Reads the output of `ptxas -v`."""
    used, spilled = r"Used (\d+) registers", r"(\d+) bytes spill stores"
    find = lambda pattern: int(re.findall(pattern, told)[-1])
    return {"registers": find(used), "spilled": find(spilled)}


def measure(case: KernelCase) -> Row:
    """Compiles a case for one device of its target."""
    mesh = Mesh(np.asarray(targets.devices(case.target)[:1]), ("all",))
    function, arguments = program(case, mesh)
    start = time.perf_counter()
    if case.target in GPUS:
        architecture = ARCHITECTURES[case.target]
        executable, kernels = gpu_kernels(function, arguments, mesh, architecture)
    else:
        executable = compiled(function, arguments, mesh)
        kernels = tpu_kernels(executable)
    memory: Any = executable.memory_analysis()
    return {
        "case": case.name,
        **dataclasses.asdict(case),
        "compile_s": round(time.perf_counter() - start, 1),
        "temp_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "kernels": kernels,
    }


def measure_named(name: str) -> Row:
    """Compiles the case of a name; an error is a result, so that others follow."""
    try:
        return targets.in_own_process(CASES[name].target, measure, CASES[name])
    except Exception as error:
        return {"case": name, "error": str(error).splitlines()[0][:300]}


def _table(results: list[Row]) -> str:
    get = lambda key: lambda r: r.get(key, "-")
    columns = {
        "case": get("case"),
        "kernel": lambda r: r.get("kernel", r.get("error", "-")[:60]),
        "registers": get("registers"),
        "spilled": get("spilled"),
        "shared KiB": lambda r: (
            f"{r['shared_memory'] / 1024:.0f}" if "registers" in r else "-"
        ),
        "VMEM MiB": lambda r: f"{r['vmem'] / 2**20:.1f}" if "vmem" in r else "-",
        "threads": get("threads"),
        "temp MiB": get("temp_mib"),
        "compile s": get("compile_s"),
    }
    return by_column(columns, [r | k for r in results for k in r.get("kernels", [{}])])


if __name__ == "__main__":
    targets.compile_all(
        CASES,
        measure_named,
        file="aot_kernels.json",
        text=_table,
        fault="did not compile",
        wrong=lambda result: "error" in result,
    )
