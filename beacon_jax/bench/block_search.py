"""Searches the block sizes of the attention kernels for GPUs.

python -m beacon_jax.bench.block_search [--implementations=mosaic_gpu,pallas_gpu]
  [--targets=a100_80gb,h200] [--head_dims=64,128] [--out=FOLDER]

Compiles every candidate for chips that are not here and says what it takes: registers,
spills, shared memory, and how many warps a processor of the chip can hold at once.
Chosen are, for each kernel, among those of at least 8 warps that spill at most 16 bytes
a thread (or as few as they can), the largest blocks: they read each key and query least
often; of equal ones those that fetch further ahead. With --targets=here the GPU of this
machine times them all, and the fastest are chosen. `attention.gpu_blocks` has the table
that comes of it.

Needs the `aot` extra but for --targets=here: pip install "beacon_jax[aot]".
"""

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from beacon_jax.bench import aot_kernels, targets  # before jax

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beacon_jax.attention.gpu_blocks import Block, GpuBlocks
from beacon_jax.attention.mosaic_gpu import mosaic_gpu
from beacon_jax.attention.pallas_gpu import pallas_gpu
from beacon_jax.bench.device import random_array
from beacon_jax.bench.records import Row, write_result
from beacon_jax.bench.report import by_column
from beacon_jax.bench.timing import compile_program, measure_queued

T, SLOTS, HEADS, KV_HEADS = 1536, 17920, 32, 8
KERNELS: tuple[str, ...] = ("forward", "d_q", "d_kv")
SPILLED = 16  # bytes per thread that cost next to nothing
WARPS = 8  # of a processor: fewer do not hide what each waits for
REGISTERS = 65536
# KiB of a processor that programs share; each takes 1 more than it asks for.
SHARED = {"a100_80gb": 164, "h200": 228}


def candidates(implementation: str) -> Iterator[Block]:
    """Yields the blocks that are tried."""
    if implementation == "mosaic_gpu":  # a warpgroup multiplies 64 rows, at sm_90 by 64
        sizes = itertools.product((64, 128), (32, 64, 128), (4,), (2, 3))
    else:
        sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))
    return itertools.starmap(Block, sizes)


def turned(implementation: str, block: Block) -> Block:
    """Returns the block of d_kv: there the keys are the rows of the products."""
    if implementation == "mosaic_gpu":
        return block._replace(queries=block.keys, keys=block.queries)
    return block


def programs(implementation: str, head_dim: int, block: Block) -> dict[str, Any]:
    """Makes functions of (q, k, v, prefix, d_out): forward, and all three kernels.

    The names say what of `KERNELS` has the candidate's block.
    """
    run = {"mosaic_gpu": mosaic_gpu, "pallas_gpu": pallas_gpu}[implementation]
    small = Block(64, 64, 4, 1)
    options: Any = {"scale": head_dim**-0.5}

    def forward(q, k, v, prefix, d_out):
        del d_out
        return run(q, k, v, prefix, blocks=GpuBlocks(block, small, small), **options)

    def backward(q, k, v, prefix, d_out):
        blocks = GpuBlocks(small, block, turned(implementation, block))
        one = lambda *x: run(*x, prefix, blocks=blocks, **options)
        return jax.vjp(one, q, k, v)[1](d_out)

    return {"forward": forward, "d_q d_kv": backward}


def arguments(head_dim: int, sharding: Any = None) -> tuple[Any, ...]:
    """Returns the shapes of what the programs take."""
    on = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    q = on((1, T, HEADS, head_dim), jnp.bfloat16)
    k = on((1, SLOTS, KV_HEADS, head_dim), jnp.bfloat16)
    return q, k, k, on((1,), jnp.int32), q


def compile_elsewhere(target: str, head_dim: int, program: Any) -> dict[str, Row]:
    """Returns what each kernel of a program takes on a chip that is not here."""
    mesh = Mesh(np.asarray(targets.devices(target)[:1]), ("all",))
    shapes = arguments(head_dim, NamedSharding(mesh, PartitionSpec()))
    architecture = aot_kernels.ARCHITECTURES[target]
    kernels = aot_kernels.gpu_kernels(program, shapes, mesh, architecture)[1]
    return {
        found["kernel"].removeprefix("prefix_attention_"): found
        | {"held": held(found, SHARED[target])}
        for found in kernels
    }


def held(kernel: Row, shared: int) -> int:
    """Counts the warps that a processor holds of a kernel; shared: its KiB."""
    each = kernel["shared_memory"] / 1024 + 1
    fit = min(shared // each, REGISTERS // (kernel["registers"] * kernel["threads"]))
    return int(fit) * kernel["threads"] // 32


def time_here(head_dim: int, program: Any) -> dict[str, Row]:
    """Returns the seconds of a program on this GPU, for each of its kernels."""
    q, k, v, prefix, d_out = arguments(head_dim)
    keys = jax.random.split(jax.random.key(0), 4)
    given = [
        random_array(key, x.shape, x.dtype)
        for key, x in zip(keys, (q, k, v, d_out), strict=True)
    ]
    given.insert(3, jnp.full(prefix.shape, SLOTS - T, jnp.int32))
    run = compile_program(program, *given).run
    seconds = measure_queued(lambda: run(*given)).median_s
    return {key: {"seconds": seconds} for key in KERNELS}


def chosen(rows: list[Row]) -> Row | None:
    """Chooses among one kernel's candidates; None: there is none that will do."""
    timed = [row for row in rows if "seconds" in row]
    if timed:
        return min(timed, key=lambda row: row["seconds"])
    compiled = [row for row in rows if "spilled" in row]
    fit = [row for row in compiled if row["held"] >= WARPS] or compiled
    least = min((row["spilled"] for row in fit), default=0)
    fit = [row for row in fit if row["spilled"] <= max(SPILLED, least)]
    largest = lambda r: (r["queries"] * r["keys"], r["stages"], r["held"])
    return max(fit, key=largest, default=None)


def search(implementation: str, target: str, head_dim: int) -> list[Row]:
    """Tries all candidates of one table entry; marks what is chosen."""
    entry = {"implementation": implementation, "target": target, "head_dim": head_dim}
    rows = []
    for block in candidates(implementation):
        for names, program in programs(implementation, head_dim, block).items():
            try:
                if target == "here":
                    found = time_here(head_dim, program)
                else:
                    found = compile_elsewhere(target, head_dim, program)
            except Exception as error:
                found = {key: {"error": str(error).split("\n")[0]} for key in KERNELS}
            for name in names.split():
                own = turned(implementation, block) if name == "d_kv" else block
                rows.append(entry | own._asdict() | found[name] | {"kernel": name})
    for name in KERNELS:
        best = chosen([row for row in rows if row["kernel"] == name])
        if best is not None:
            best["chosen"] = True
    return rows


def _table(rows: list[Row]) -> str:
    get = lambda key: lambda row: row.get(key, "-")
    names = ("implementation", "target", "head_dim", "kernel", *Block._fields)
    names += ("registers", "spilled", "shared_memory", "held", "seconds")
    columns: Any = {name: get(name) for name in names}
    return by_column(columns, [row for row in rows if row.get("chosen")])


def main(_: list[str]) -> None:
    """Runs the command."""
    o, rows = flags.FLAGS, []
    if "here" in o.targets:
        jax.config.update("jax_platforms", None)  # `targets` has said "cpu"
        if jax.devices()[0].platform != "gpu":
            raise app.UsageError("--targets=here needs a GPU: JAX sees none.")
    for name, target, width in itertools.product(
        o.implementations, o.targets, map(int, o.head_dims)
    ):
        if target == "here":
            found = search(name, target, width)
        else:
            found = targets.in_own_process(target, search, name, target, width)
        rows += found
        for row in found:
            if row.get("chosen"):
                print(json.dumps(row), flush=True)
        write_result(o.out, "block_search.json", results=rows)
    print(_table(rows))


if __name__ == "__main__":
    flags.DEFINE_list(
        "implementations", ["mosaic_gpu", "pallas_gpu"], "Kernels of these."
    )
    flags.DEFINE_list("targets", ["a100_80gb", "h200"], "Chips, or `here`.")
    flags.DEFINE_list("head_dims", ["64", "128"], "Widths of heads.")
    flags.DEFINE_string("out", "out/blocks", "Folder of block_search.json.")
    app.run(main)
