"""Launches a small sharded step 30,000 times on busy cores; it must never hang.

python -m beacon_jax.bench.stress_collectives [--launches=30000] [--rounds=3]
  [--devices=2] [--without=pool,limit]

Every round is a process of its own, prepared as the package prepares each of its
commands (`beacon_jax.runtime`), while another program keeps every core busy. Ends with
1 if a round makes no progress for --patience seconds (ten times as long until it has
compiled) or dies. --without leaves out what the package does, to see that the script
finds the fault: on two cores with jax 0.11.2 `--without=pool,limit` hangs in the first
launches.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import app, flags

WIDTH = 32  # of the matrices of the step, which is to be short: many launches
LAYERS = 2  # collectives of each kind per launch


def child_environment(devices: int) -> dict[str, str]:
    """Returns that of a fresh shell: the pool is for the child to prepare."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    for name in ("PJRT_NPROC", "XLA_FLAGS"):
        env.pop(name, None)
    return env


def busy_cores() -> list[subprocess.Popen]:
    """Starts a program per core that only spins; they end with this process."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**6))"
    command = [sys.executable, "-c", spin]
    return [subprocess.Popen(command) for _ in range(os.cpu_count() or 1)]


def launch(count: int, without: Sequence[str]) -> None:
    """Launches in the child; prints {"done": launches} at start, end, each second."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if "pool" in without:
        jax.devices()  # too late for `runtime`, which warns
    from beacon_jax import runtime

    runtime.prepare()
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = PartitionSpec("data")

    def local(weights, x):
        for _ in range(LAYERS):
            whole = jax.lax.all_gather(weights, "data", tiled=True)
            x = jnp.tanh(x @ whole)
            mean = jax.lax.pmean(x.T @ x, "data") / len(x)
            part = mean.shape[0] // mesh.size
            start = jax.lax.axis_index("data") * part
            weights += 1e-3 * jax.lax.dynamic_slice_in_dim(mean, start, part)
        return weights, jax.lax.pmean(jnp.sum(x), "data")

    step = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(rows, rows),
            out_specs=(rows, PartitionSpec()),
            check_vma=False,
        ),
        donate_argnums=0,
    )
    place = lambda x: jax.device_put(x, NamedSharding(mesh, rows))
    rng = np.random.default_rng(0)
    weights = place(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH)
    x = place(rng.normal(size=(64 * mesh.size, WIDTH)).astype(np.float32))
    step = step.lower(weights, x).compile()
    print(json.dumps({"done": 0}), flush=True)
    said = time.monotonic()
    for done in range(1, count + 1):
        weights, total = step(weights, x)
        if "limit" not in without:
            runtime.launched(total)
        if time.monotonic() - said > 1:
            said = time.monotonic()
            print(json.dumps({"done": done}), flush=True)
    assert np.isfinite(float(total))
    print(json.dumps({"done": count}), flush=True)


def run_round(o: flags.FlagValues) -> tuple[int, str | None]:
    """Runs one process; returns the launches reported, and what went wrong."""
    command = [sys.executable, "-m", "beacon_jax.bench.stress_collectives", "--child"]
    command += [f"--launches={o.launches}", f"--without={','.join(o.without)}"]
    process = subprocess.Popen(
        command, env=child_environment(o.devices), stdout=subprocess.PIPE, text=True
    )
    heard, done = [time.monotonic() + 9 * o.patience], [0]

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            heard[0], done[0] = time.monotonic(), json.loads(line)["done"]

    listener = threading.Thread(target=listen)
    listener.start()
    fault = None
    while process.poll() is None:
        time.sleep(0.2)
        if time.monotonic() - heard[0] > o.patience:
            fault = f"no progress for {o.patience:g} s"
            process.kill()
    listener.join()
    if fault is None and process.returncode:
        fault = f"ended with {process.returncode}"
    return done[0], fault


def main(argv: Sequence[str]) -> None:
    del argv
    o = flags.FLAGS
    if o.child:
        launch(o.launches, o.without)
        return
    spinning, faults = busy_cores(), 0
    try:
        for number in range(1, o.rounds + 1):
            start = time.monotonic()
            done, fault = run_round(o)
            seconds = time.monotonic() - start
            verdict = fault or "ok"
            print(
                f"round {number}: {done:,} of {o.launches:,} launches on {o.devices} "
                f"devices in {seconds:.0f} s: {verdict}",
                flush=True,
            )
            faults += fault is not None
    finally:
        for process in spinning:
            process.kill()
    if faults:
        sys.exit(f"error: {faults} of {o.rounds} rounds hung or died.")


if __name__ == "__main__":
    flags.DEFINE_integer("launches", 30_000, "Of the step, per round.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Processes, one after the other.", lower_bound=1)
    flags.DEFINE_integer("devices", 2, "CPU devices.", lower_bound=2)
    flags.DEFINE_float("patience", 60.0, "Seconds without progress that are a hang.")
    flags.DEFINE_list("without", [], "Left out: pool, limit.")
    flags.DEFINE_bool("child", False, "One round, in this process.")
    app.run(main)
