"""A text of any length into a memory of one size: bytes and time, up to a million.

python -m beacon_jax.bench.endless [--tokens=1048576] [--ratio=32] [--slot_cap=2048]
  [--window=1024] [--dtype=float32] [--part=32768] [--out=FOLDER]

A random model of SmolLM2-135M's shape reads random tokens with `Model.compress`, which
gets them from an iterator and thins the oldest slots (`slot_cap`). Every part is a
call of its own, whose memory is written down: the same command goes on where a killed
run was, and a larger --tokens goes on behind a run that has ended. Writes endless.json
and endless.png: seconds of each part, their exponent in the length (1: linear), the
most RAM beside what was predicted, and the programs that were compiled.

Two quiet CPU cores read 390 tokens/s in the first 65,536 of the default.
"""

import contextlib
import ctypes
import dataclasses
import gc
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from beacon_jax.bench.device import random_variables
from beacon_jax.bench.records import provenance, versions, write_json
from beacon_jax.core.feed import feed_jit
from beacon_jax.core.law import Law
from beacon_jax.core.memory import init_memory, slot_nbytes
from beacon_jax.core.move import thin
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.options import PIECE_WINDOWS
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.progress import say

RESULT, PACK = "endless.json", "memory.beacon"


@dataclasses.dataclass(frozen=True)
class Endless:
    """Names what is read; what is written down belongs to exactly one."""

    ratio: int
    slot_cap: int
    window: int
    dtype: str
    part: int

    def model(self) -> Model:
        """Makes the random model."""
        beacon = BeaconConfig(window=self.window, ratios=(self.ratio,))
        config = ModelConfig(
            family="llama",
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            max_position=8192,
            tie_embeddings=True,
            eos_ids=(2,),
            bos_ids=(1,),
            beacon=beacon,
        )
        return Model(config, random_variables(config, self.dtype))

    def tokens(self, start: int) -> Iterator[np.ndarray]:
        """Draws the tokens of a part, a window at a time."""
        for at in range(start, start + self.part, self.window):
            rng = np.random.default_rng(at)
            yield rng.integers(3, 49152, self.window, dtype=np.int32)

    def predicted(self, config: ModelConfig, before: int) -> int:
        """Predicts the most bytes of RAM of the process.

        They are what it had with weights and programs in it, the buffer of the memory
        that is continued, that of the new one, and what it takes to thin that: 1.5
        buffers for the slots that move, as XLA says of the compiled program.
        """
        entries = self.slot_cap + Law.of(config).room({self.ratio})
        buffer = entries * slot_nbytes(config, self.dtype)
        dtype = jnp.dtype(self.dtype)
        state = jax.eval_shape(lambda: init_memory(config, 1, entries, dtype=dtype))
        one = jax.ShapeDtypeStruct((1,), jnp.int32)
        program = thin.lower(config, state, one, one).compile()
        found: Any = program.memory_analysis()
        return before + 2 * buffer + found.temp_size_in_bytes

    def warm(self, model: Model) -> int:
        """Compiles all programs on memories that are dropped; returns how many fed."""
        options: Any = {"ratio": self.ratio, "slot_cap": self.slot_cap}
        jitted: Any = feed_jit
        programs = jitted._cache_size()
        memory = None
        for _ in range(2):  # a new memory, and one that goes on
            piece = itertools.islice(self.tokens(0), PIECE_WINDOWS)
            memory = model.compress(piece, memory=memory, **options)
            one = jnp.ones(1, jnp.int32)
            thin(model.config, memory.state.copy(), one, one)
        return jitted._cache_size() - programs


class Peak:
    """The most RAM of this process while a block runs, looked at 20 times a second."""

    def __enter__(self) -> "Peak":
        self.bytes, self._ended = rss(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            self.bytes = max(self.bytes, rss())


def give_back() -> None:
    """Gives back to Linux what the process has freed.

    glibc keeps pages of arrays that are gone, here 78 MB of those of `warm`. They would
    count twice in what is predicted.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def rss() -> int:
    """Returns the bytes that this process has in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(what: Endless, tokens: int, out: Path) -> dict[str, Any]:
    """Reads what is left of the tokens; returns the result, as it is written."""
    out.mkdir(parents=True, exist_ok=True)
    done = _restore(out, what)
    model = what.model()
    jax.block_until_ready(jax.tree.leaves(model.variables))
    programs = what.warm(model)
    give_back()
    before = rss()
    memory = Memory.load(out / PACK, model) if done["parts"] else None
    begun_at = len(done["parts"])
    while len(done["parts"]) * what.part < tokens:
        start = len(done["parts"]) * what.part
        with Peak() as peak:
            begun = time.perf_counter()
            memory = model.compress(
                what.tokens(start),
                ratio=what.ratio,
                slot_cap=what.slot_cap,
                memory=memory,
                on_progress=_tell(start, tokens, done["parts"]),
            )
            seconds = time.perf_counter() - begun
        found = {"tokens": start + what.part, "seconds": round(seconds, 3)}
        found |= {"rss_bytes": peak.bytes, "slots": memory.rows[0].slots}
        done["parts"].append(found)
        memory.save(out / PACK, tokens=False, overwrite=True)
        write_json(out / RESULT, done)
    if len(done["parts"]) > begun_at:
        done["processes"].append({"rss_before_bytes": before, "programs": programs})
    most = max(part["rss_bytes"] for part in done["parts"])
    wanted = what.predicted(model.config, done["processes"][-1]["rss_before_bytes"])
    result = done | {
        "run": versions(jax.devices()[0]) | provenance(),
        "cores": len(os.sched_getaffinity(0)),
        "exponent": exponent(done["parts"]),
        "tokens_per_second": _rate(done["parts"]),
        "peak_rss_bytes": most,
        "predicted_rss_bytes": wanted,
        "error": most / wanted - 1,
        "kv_bytes_of_full_attention": tokens * slot_nbytes(model.config, what.dtype),
        "kv_bytes": memory.used_nbytes if memory is not None else 0,
    }
    write_json(out / RESULT, result)
    draw(result, out / "endless.png")
    return result


def exponent(parts: list[dict[str, Any]]) -> float | None:
    """Fits seconds ~ length^p to the times of whole prefixes; None: too few parts."""
    if len(parts) < 3:
        return None
    each = [part["seconds"] for part in parts]
    lengths = np.log([p["tokens"] for p in parts])
    return float(np.polyfit(lengths, np.log(np.cumsum(each)), 1)[0])


def _rate(parts: list[dict[str, Any]]) -> float | None:
    seconds = sum(part["seconds"] for part in parts)
    return parts[-1]["tokens"] / seconds if parts else None


def _restore(out: Path, what: Endless) -> dict[str, Any]:
    if not (out / RESULT).exists():
        return dataclasses.asdict(what) | {"parts": [], "processes": []}
    done = json.loads((out / RESULT).read_text())
    asked = dataclasses.asdict(what)
    if {name: done[name] for name in asked} != asked:
        raise app.UsageError(
            f"{out / RESULT} is of other options: use them, or another --out."
        )
    return {name: done[name] for name in (*asked, "parts", "processes")}


def _tell(start: int, total: int, parts: list[dict[str, Any]]) -> Any:
    begun = time.perf_counter()

    def tell(done: int, of: int) -> None:
        seconds = time.perf_counter() - begun
        rate = _rate(parts) or done / seconds
        left = (total - start - done) / rate / 60
        say(f"endless: {start + done:,} of {total:,} tokens, {left:.1f} min left")

    return tell


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws seconds against length, and RAM beside the prediction."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    parts = result["parts"]
    x = [part["tokens"] / 1e3 for part in parts]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="tight")
    left.plot(x, [part["seconds"] for part in parts], ".-", color="C0")
    most = max(part["seconds"] for part in parts)
    left.set(xlabel="thousand tokens read", ylim=(0, 1.2 * most))
    left.set_title(f"seconds of each {result['part']:,} tokens", fontsize=10)
    right.plot(x, [p["rss_bytes"] / 2**20 for p in parts], ".-", label="measured")
    wanted = result["predicted_rss_bytes"] / 2**20
    right.axhline(wanted, color="C1", linestyle="--", label="predicted")
    right.set(xlabel="thousand tokens read", ylim=(0, 1.3 * wanted))
    right.set_title("MiB of RAM, at most", fontsize=10)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(_: list[str]) -> None:
    """Runs the command."""
    o = flags.FLAGS
    what = Endless(o.ratio, o.slot_cap, o.window, o.dtype, o.part)
    if o.part % o.window or o.tokens % o.part:
        raise app.UsageError("--part is whole windows, and --tokens whole parts.")
    result = run(what, o.tokens, Path(o.out))
    shown = {name: x for name, x in result.items() if name not in ("parts", "run")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    flags.DEFINE_integer("tokens", 1048576, "How many are read.")
    flags.DEFINE_integer("ratio", 32, "Raw tokens per beacon.")
    flags.DEFINE_integer("slot_cap", 2048, "Most slots of the memory.")
    flags.DEFINE_integer("window", 1024, "Raw tokens of a window.")
    flags.DEFINE_integer("part", 32768, "Tokens of a call; the memory is saved behind.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of everything.")
    flags.DEFINE_string("out", "out/endless", "Folder of the memory and the result.")
    app.run(main)
