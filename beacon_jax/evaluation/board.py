"""The board: some tasks of RULER, every method beside full attention, in one table.

    OUT/board.md    a row per method and ratio: the mean, each task, bytes, time, memory
    OUT/board.png   the mean against the compression ratio

It stands apart from report.md, whose first sections are the same in every run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beacon_jax.evaluation import plots
from beacon_jax.evaluation.groups import BOARD, MEANS
from beacon_jax.evaluation.methods import split_name
from beacon_jax.evaluation.report import interval, main_metrics, mebibytes, table
from beacon_jax.evaluation.tasks.base import Metric

HEAD = (
    "method",
    "compression",
    "mean [95 %]",
    *(task.removeprefix("ruler_") for task in MEANS[BOARD]),
    "KV MiB",
    "s per row",
    "peak MiB",
    "rows",
)
ABOUT = (
    "Compression is the share of the past's keys and values that is dropped: 0.75 is "
    "x4. The mean is of the tasks, each counting the same, with its 95 % interval; KV "
    "is what is kept of a row's past. Seconds are those of a row in a batch, without "
    "compilation, reading and answering; what several methods share counts for each. "
    "The peak is the most memory that a batch takes beside the weights, behind the "
    "slash its rows."
)


def write(
    metrics: Sequence[Metric], timings: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """Writes the board's files if all its tasks were run; returns its text, or "".

    Args:
      metrics: of all tasks, and the means over them.
      timings: what batches took (`runner.summary`).
    """
    whole = f"mean of {len(MEANS[BOARD])}"
    means = [m for m in metrics if m["task"] == BOARD and m["metric"] == whole]
    if not means:
        return ""
    tables = []
    for length in sorted({m["length"] for m in means}):
        here = [m for m in means if m["length"] == length]
        rows = [_row(m, metrics, timings) for m in sorted(here, key=_place)]
        tables.append(f"{length:,} tokens:\n\n{table(HEAD, rows)}\n")
    plots.means_by_ratio(means, folder / "board.png")
    figure = "![mean against the compression ratio](board.png)"
    text = "\n".join([f"## {BOARD}\n", f"{ABOUT}\n", *tables, f"{figure}\n"])
    (folder / "board.md").write_text(text, encoding="utf-8")
    return text


def _place(mean: Metric) -> tuple[float, float]:
    """Orders rows by their ratios, and those of one ratio by their means."""
    return mean["ratio"] or 0, -mean["value"]


def _row(
    mean: Metric, metrics: Sequence[Metric], timings: Sequence[Mapping[str, Any]]
) -> list[str]:
    same = lambda x: x["method"] == mean["method"] and x["length"] == mean["length"]
    scores = {m["task"]: m["value"] for m in main_metrics(metrics) if same(m)}
    took = [t for t in timings if same(t) and t["task"] in MEANS[BOARD]]
    seconds = [sum(t["seconds"]) / t["rows"] for t in took]
    rows = max((t["rows"] for t in took), default=1)
    peaks = [t["peak_bytes"] for t in took if t.get("peak_bytes")]
    family, tag = split_name(mean["method"])
    ratio = mean["ratio"]
    dropped = f"{1 - 1 / ratio:.3g}" if isinstance(ratio, int) else tag
    return [
        family,
        dropped or "–",
        interval(mean, 3),
        *(f"{scores[task]:.2f}" for task in MEANS[BOARD]),
        f"{mean['kv_bytes'] / 2**20:.1f}",
        f"{sum(seconds) / len(seconds):.1f}" if seconds else "–",
        mebibytes(max(peaks, default=None)) + (f" / {rows}" if peaks else ""),
        str(mean["count"]),
    ]
