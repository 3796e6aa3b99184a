"""Accelerators that are not here, and the programs that are compiled for them.

XLA's own compilers for CUDA and TPU run without hardware: what comes out is the program
that would run there. Import this module before jax, which reads the environment.

Needs the `aot` extra: pip install "beacon_jax[aot]".
"""

import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to share

from absl import app, flags
from jax.experimental.topologies import get_topology_desc

from beacon_jax.bench.records import Row, write_result
from beacon_jax.resources import folder


def devices(target: str) -> Any:
    """Returns the devices of a target, none of which is here.

    Args:
      target: a file of benchmarks/targets without .txtpb (8 GPUs), or a TPU topology
        as "v5p:2x2x2".
    """
    file = folder("benchmarks") / "targets" / f"{target}.txtpb"
    if not file.exists():
        return get_topology_desc(platform="tpu", topology_name=target).devices
    return get_topology_desc(
        platform="cuda",
        topology_name="",
        topology="1x1x8",
        target_config=file.read_text(),
    ).devices


def in_own_process(target: str, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a process in which nothing is compiled for other targets.

    Mosaic for GPUs keeps the first chip of a process for its assembler (jax 0.12.0.1).
    """
    return _worker(target).submit(function, *args).result()


@functools.cache
def _worker(target: str) -> ProcessPoolExecutor:
    del target
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=spawn)


def compile_all(
    cases: Mapping[str, Any],
    measure: Callable[[str], Row],
    *,
    file: str,
    text: Callable[[list[Row]], str],
    fault: str,
    wrong: Callable[[Row], bool],
) -> None:
    """Runs a script of cases; the process ends with 1 if any of them is wrong.

    Args:
      cases: by name; those of --cases, or all of them.
      measure: compiles the case of a name.
      file: written into --out after every case.
      text: the table of all results.
      fault: what to say of the cases whose result is `wrong`.
    """
    script: Any = {"module_name": sys.argv[0]}  # whose flags --help shows
    text_of = f"Of {', '.join(cases)}; all by default."
    flags.DEFINE_list("cases", None, text_of, **script)
    flags.DEFINE_string("out", "out/aot", f"Folder of {file}.", **script)

    def main(argv: list[str]) -> None:
        del argv
        results = []
        for name in flags.FLAGS.cases or list(cases):
            results.append(measure(name))
            print(json.dumps(results[-1]), flush=True)
            write_result(flags.FLAGS.out, file, results=results)
        print(text(results))
        if failed := [row["case"] for row in results if wrong(row)]:
            sys.exit(f"error: {fault}: {', '.join(failed)}")

    app.run(main)
