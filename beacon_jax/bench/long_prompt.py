"""A long prompt through a random model on what is here: bounded memory, one program.

python -m beacon_jax.bench.long_prompt [--tokens=131072] [--ratio=8] [--window=1024]
  [--preset=qwen2-0.5b] [--layers=2] [--piece=8192] [--dtype=bfloat16] [--out=FOLDER]

Feeds the prompt in pieces and saves the memory after each: the same command goes on
where a killed run was. Ends with 1 unless the memory took 1/ratio of full attention's
bytes plus one window, and one program was compiled. Writes long_prompt.json.

The default is the whole 0.5B model in float32: 25 to 45 minutes on two CPU cores.
--layers=2 --tokens=8192 --piece=2048 takes a minute.
"""

import dataclasses
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from safetensors import safe_open
from safetensors.numpy import save_file

from beacon_jax.bench.device import random_variables
from beacon_jax.bench.records import provenance, versions, write_json
from beacon_jax.core.feed import feed, feed_jit
from beacon_jax.core.memory import MemoryState, init_memory, slot_nbytes
from beacon_jax.core.plan import capacity
from beacon_jax.model.config import ModelConfig, check_ratio
from beacon_jax.model.net import Net
from beacon_jax.model.presets import get_preset
from beacon_jax.progress import say

STATE, RESULT = "state.safetensors", "long_prompt.json"
LOGITS = "last_logits"


@dataclasses.dataclass(frozen=True)
class LongPrompt:
    """Names what is run; a saved state belongs to exactly one."""

    preset: str
    layers: int
    tokens: int
    window: int
    ratio: int
    piece: int
    dtype: str = "float32"

    def model(self) -> ModelConfig:
        """Returns the config of the model; ValueError names a wrong option."""
        config = get_preset(self.preset)
        if config.beacon is None:
            raise ValueError(f"--preset={self.preset} has no beacons.")
        check_ratio(self.ratio, self.window)
        if self.piece < 1 or self.tokens < 1:
            raise ValueError("--piece and --tokens must be at least 1.")
        beacon = dataclasses.replace(
            config.beacon, window=self.window, ratios=(self.ratio,)
        )
        layers = self.layers or config.num_layers
        return dataclasses.replace(config, num_layers=layers, beacon=beacon)

    def text(self, config: ModelConfig) -> np.ndarray:
        """Draws the token ids of the prompt [T]."""
        rng = np.random.default_rng(0)
        return rng.integers(0, config.vocab_size, self.tokens, dtype=np.int32)


@dataclasses.dataclass
class Done:
    """Counts what all processes did so far; the peak is the most of any of them."""

    done: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_rss_bytes: int = 0
    processes: int = 0


def leaves(memory: MemoryState) -> list[str]:
    """Names the arrays that a memory has."""
    names = [field.name for field in dataclasses.fields(memory)]
    return [name for name in names if getattr(memory, name) is not None]


def save(
    file: Path, prompt: LongPrompt, progress: Done, memory: MemoryState, logits: Any
) -> None:
    """Writes the state all or nothing: a run killed meanwhile finds the one before."""
    arrays = {name: np.asarray(getattr(memory, name)) for name in leaves(memory)}
    what = {"prompt": dataclasses.asdict(prompt)}
    what["progress"] = dataclasses.asdict(progress)
    part = file.with_suffix(".part")
    save_file(arrays | {LOGITS: np.asarray(logits)}, part, {"run": json.dumps(what)})
    os.replace(part, file)


def restore(file: Path, prompt: LongPrompt, empty: MemoryState):
    """Returns (progress, memory, logits) of a saved run, or of one that begins."""
    if not file.exists():
        return Done(), empty, None
    with safe_open(file, "np") as saved:
        run = json.loads(saved.metadata()["run"])
        if run["prompt"] != dataclasses.asdict(prompt):
            raise ValueError(
                f"{file} is of another run, {run['prompt']}: use its options, another "
                "--out, or delete it."
            )
        names = (*leaves(empty), LOGITS)
        arrays = {name: jnp.asarray(saved.get_tensor(name)) for name in names}
    logits = arrays.pop(LOGITS)
    return Done(**run["progress"]), empty.replace(**arrays), logits


def run(prompt: LongPrompt, out: Path) -> dict[str, Any]:
    """Feeds what is left of the prompt; returns the result, as it is written."""
    config = prompt.model()
    out.mkdir(parents=True, exist_ok=True)
    ratios = np.asarray([prompt.ratio], np.int32)
    closed = prompt.tokens // prompt.window
    room = capacity(config, [prompt.ratio] * max(closed, 1))
    empty = init_memory(config, 1, room, jnp.dtype(prompt.dtype))
    progress, memory, logits = restore(out / STATE, prompt, empty)
    del empty
    text = prompt.text(config)
    if progress.done < prompt.tokens:
        progress.processes += 1
        variables = random_variables(config, prompt.dtype)
        say(
            f"long_prompt: {room:,} slots, {memory.nbytes / 2**20:,.0f} MiB; "
            f"{rss() / 2**30:.1f} GiB"
        )
    jitted: Any = feed_jit
    programs = jitted._cache_size()
    while progress.done < prompt.tokens:
        part = text[progress.done : progress.done + prompt.piece]
        tokens = np.zeros((1, prompt.piece), np.int32)
        tokens[0, : len(part)] = part
        rows = tokens, np.asarray([len(part)], np.int32), ratios
        net = Net(config, prompt.dtype)
        begun = time.perf_counter()
        output, memory = feed(net, variables, memory, *rows, donate=True)
        logits = jax.block_until_ready(output.last_logits)
        progress.seconds.append(time.perf_counter() - begun)
        progress.done += len(part)
        progress.peak_rss_bytes = max(progress.peak_rss_bytes, rss())
        save(out / STATE, prompt, progress, memory, logits)
        tell(prompt, progress)
    compiled = jitted._cache_size() - programs
    result = summary(prompt, config, progress, memory, logits, compiled)
    write_json(out / RESULT, result)
    return result


def rss() -> int:
    """Returns the most bytes that this process had in memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def tell(prompt: LongPrompt, progress: Done) -> None:
    """Says how far the prompt is read, and how fast."""
    last = progress.seconds[-1]
    left = prompt.tokens - progress.done
    rate = progress.done / sum(progress.seconds)
    say(
        f"long_prompt: {progress.done:,} of {prompt.tokens:,} tokens, this piece "
        f"{min(prompt.piece, progress.done) / last:,.0f} tokens/s, all {rate:,.0f}; "
        f"{left / rate / 60:.1f} min left; peak {progress.peak_rss_bytes / 2**30:.2f} "
        "GiB"
    )


def summary(
    prompt: LongPrompt,
    config: ModelConfig,
    progress: Done,
    memory: MemoryState,
    logits: Any,
    compiled: int,
) -> dict[str, Any]:
    """Makes the result, with what was promised of it.

    Times include compiling, once per process.
    """
    token = slot_nbytes(config, prompt.dtype)
    full = prompt.tokens * token
    assert config.beacon is not None
    sink = config.beacon.sink
    window = (prompt.window + prompt.window // prompt.ratio + sink) * token
    seconds = sum(progress.seconds)
    kept = int(memory.slots[0]) + int(memory.open_entries(config.beacon.placement)[0])
    promises = {
        "all tokens are in the memory": int(memory.windows[0]) * prompt.window
        + int(memory.raw[0])
        == prompt.tokens,
        "KV buffer is 1/ratio of full attention's plus one window": memory.nbytes
        <= full / prompt.ratio + window,
        # 0 where the saved run had already ended.
        "one program": compiled in (0, 1),
        "logits are finite": bool(jnp.isfinite(logits).all()),
    }
    device = jax.devices()[0]
    return {
        "run": versions(device) | provenance() | {"python": sys.version.split()[0]},
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        **dataclasses.asdict(prompt),
        "num_layers": config.num_layers,
        "seconds": seconds,
        "tokens_per_second": prompt.tokens / seconds,
        "piece_seconds": progress.seconds,
        "processes": progress.processes,
        "compiled_programs": compiled,
        "kv_buffer_bytes": memory.nbytes,
        "kv_used_bytes": kept * token,
        "kv_full_bytes": full,
        "kv_of_full": memory.nbytes / full,
        "peak_rss_bytes": progress.peak_rss_bytes,
        "next_token": int(jnp.argmax(logits[0])),
        "promises": promises,
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: options begin with --.")
    o = flags.FLAGS
    prompt = LongPrompt(
        o.preset, o.layers, o.tokens, o.window, o.ratio, o.piece, o.dtype
    )
    try:
        result = run(prompt, Path(o.out))
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(result, indent=1))
    if broken := [what for what, kept in result["promises"].items() if not kept]:
        sys.exit(f"error: not so: {'; '.join(broken)}")


if __name__ == "__main__":
    flags.DEFINE_string("preset", "qwen2-0.5b", "Shape of the model.")
    flags.DEFINE_integer("layers", 0, "Of the model; 0: the preset's.")
    flags.DEFINE_integer("tokens", 131072, "Of the prompt.")
    flags.DEFINE_integer("window", 1024, "Raw tokens of a window.")
    flags.DEFINE_integer("ratio", 8, "Raw tokens per beacon.")
    flags.DEFINE_integer("piece", 8192, "Tokens per call; the memory is saved behind.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of everything.")
    flags.DEFINE_string("out", "out/long-prompt", "Folder of the state and the result.")
    app.run(main)
