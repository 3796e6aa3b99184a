"""What chips that are not here can reach at best: FLOPs, bytes, roofline time.

  prefill   max(FLOPs / peak, bytes / bandwidth); bytes are the weights once per window
            (full attention: per chunk of 8192 tokens), the memory that each window
            sees, and the entries that it writes
  decoding  bytes of one step / bandwidth, one row (`sizes.decode_bytes`)

Peaks and bandwidths are those of `training.hardware` (NVIDIA's data sheets, Google
Cloud's TPU documentation). A model that does not fit one chip is split over the fewest,
a power of two, that hold weights, KV cache and a window's activations in 95 % of their
memory, at no cost of communication. Nothing here is measured: real programs are slower.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from beacon_jax import flops
from beacon_jax.bench.records import Row
from beacon_jax.bench.report import by_column
from beacon_jax.bench.sizes import (
    GIB,
    activation_bytes,
    decode_bytes,
    entries_after,
    slots_after,
    weight_bytes,
)
from beacon_jax.core.law import Law
from beacon_jax.core.memory import slot_nbytes
from beacon_jax.evaluation.runner import integers
from beacon_jax.model.presets import get_preset
from beacon_jax.training.hardware import Chip, find_chip

CHIPS = ("A100 80GB", "H100", "H200", "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e")
PRESETS = ("llama2-7b", "qwen2-7b", "llama3-8b", "llama2-70b", "qwen2-72b")
LENGTHS = (4096, 32768, 131072, 524288, 1048576)
RATIOS = (2, 4, 8, 16, 32)
CHUNK = 8192
USABLE = 0.95
LONGEST = 2**20


@dataclasses.dataclass(frozen=True)
class Load:
    """Says what a prefill needs; ratio 0 is full attention. Bytes in bfloat16."""

    preset: str
    length: int
    ratio: int
    flops: int
    weight_bytes: int
    kv_bytes: int
    moved_bytes: int
    held_bytes: int
    decode_bytes: float
    decode_flops: int


def load(preset: str, length: int, ratio: int) -> Load:
    """Computes the load of a text of `length` tokens, one row."""
    config = get_preset(preset)
    assert config.beacon is not None
    token = slot_nbytes(config, "bfloat16")
    weights = weight_bytes(config, beacon=ratio > 0)
    step = config.beacon.window if ratio else min(CHUNK, length)
    starts = range(0, length, step)
    seen = sum(slots_after(config, start, ratio) for start in starts)
    written = length + (length // ratio if ratio else 0)
    kept = slots_after(config, length, ratio) * token
    spent = flops.prefill(config, length, ratio)
    rows = int(Law.of(config).entries(ratio, step))
    entries = entries_after(config, length, ratio)
    return Load(
        preset=preset,
        length=length,
        ratio=ratio,
        flops=spent.total,
        weight_bytes=weights,
        kv_bytes=kept,
        moved_bytes=len(starts) * weights + (seen + written) * token,
        held_bytes=weights + kept + rows * token + activation_bytes(config, rows),
        decode_bytes=decode_bytes(config, 1, entries, ratio),
        decode_flops=flops.decode_step(config, entries).total,
    )


@dataclasses.dataclass(frozen=True)
class Roof:
    """Says how long a load takes on `chips` of a kind: first token, and every other."""

    chips: int
    prefill_s: float
    token_s: float


def roof(work: Load, chip: Chip) -> Roof:
    """Computes the best times of a load on the fewest chips that hold it."""
    count = 1
    while work.held_bytes > count * USABLE * chip.memory * 1e9:
        count *= 2
    peak, moved = count * chip.tflops * 1e12, count * chip.bandwidth * 1e9
    return Roof(
        chips=count,
        prefill_s=max(work.flops / peak, work.moved_bytes / moved),
        token_s=max(work.decode_flops / peak, work.decode_bytes / moved),
    )


def make(
    presets: Sequence[str] | None = None,
    lengths: Sequence[str] | None = None,
    ratios: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Makes the table as JSON values: chips, rows with a roof per chip, break-even.

    Args:
      presets, lengths, ratios: as on the command line; None for the usual ones.

    Returns:
      {"chips", "rows", "break_even"}; the last has, by preset and ratio, the shortest
      prompt that compression costs no more FLOPs for, None above 1M tokens.

    Raises:
      ValueError: a name or number that cannot be.
    """
    presets = presets or PRESETS
    counts = integers("lengths", lengths) if lengths else LENGTHS
    asked = integers("ratios", ratios) if ratios else RATIOS
    chips = {name: chip for name in CHIPS if (chip := find_chip(name)) is not None}
    rows = []
    for preset in presets:
        for length in counts:
            for ratio in (0, *asked):
                work = load(preset, length, ratio)
                roofs = {n: dataclasses.asdict(roof(work, c)) for n, c in chips.items()}
                rows.append(dataclasses.asdict(work) | {"roofs": roofs})
    even = lambda config: {r: flops.break_even(config, r, LONGEST) for r in asked}
    return {
        "chips": {name: dataclasses.asdict(chip) for name, chip in chips.items()},
        "rows": rows,
        "break_even": {preset: even(get_preset(preset)) for preset in presets},
    }


def text(figures: dict[str, Any]) -> str:
    """Writes what `make` returns as Markdown tables."""
    chips = by_column(
        {
            "chip": lambda chip: chip["name"],
            "bf16 TFLOP/s": lambda chip: f"{chip['tflops']:g}",
            "GB/s": lambda chip: f"{chip['bandwidth']:g}",
            "GB": lambda chip: f"{chip['memory']:g}",
        },
        [{"name": name, **chip} for name, chip in figures["chips"].items()],
    )
    made = [
        "Published peaks (data sheets; see training/hardware.py). Below: fewest chips, "
        f"best time to the first token, best time per token.\n\n{chips}"
    ]
    for preset in dict.fromkeys(row["preset"] for row in figures["rows"]):
        rows = [row for row in figures["rows"] if row["preset"] == preset]
        made.append(f"{preset}\n\n{_preset(rows)}")
    even = figures["break_even"]
    show = lambda n: f"{n:,}" if n else f"> {LONGEST:,}"
    columns = {"break-even, tokens": lambda preset: preset["name"]} | {
        f"x{r}": lambda preset, r=r: show(preset[r]) for r in next(iter(even.values()))
    }
    made.append(by_column(columns, [{"name": n, **found} for n, found in even.items()]))
    return "\n\n".join(made)


def _preset(rows: list[Row]) -> str:
    full = {row["length"]: row["flops"] for row in rows if row["ratio"] == 0}
    columns = {
        "tokens": lambda row: f"{row['length']:,}",
        "ratio": lambda row: f"x{row['ratio']}" if row["ratio"] else "full",
        "PFLOP": lambda row: _three(row["flops"] / 1e15),
        "full / it": lambda row: f"{full[row['length']] / row['flops']:.2f}",
        "KV GiB": lambda row: _three(row["kv_bytes"] / GIB),
        "moved GiB": lambda row: f"{row['moved_bytes'] / GIB:,.0f}",
        "held GiB": lambda row: f"{row['held_bytes'] / GIB:.1f}",
    }
    roofs = {n: lambda row, n=n: _cell(**row["roofs"][n]) for n in rows[0]["roofs"]}
    return by_column(columns | roofs, rows)


def _three(value: float) -> str:
    """Writes three digits, or all before the point: 1,585 and not 1.58e+03."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _cell(chips: int, prefill_s: float, token_s: float) -> str:
    many = f"{chips}×: " if chips > 1 else ""
    return f"{many}{_three(prefill_s)} s, {_three(token_s * 1e3)} ms"
