"""Figures of a benchmark, drawn from its rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from beacon_jax.benchmark.records import Row
from beacon_jax.benchmark.report import peaks

DPI = 120
Point = tuple[float, float, float, float]  # x, median, least, most


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draws kernels.png, prefill.png, decode.png and train.png, those there are rows
    for; returns their paths."""
    good = [row for row in rows if row["status"] == "ok"]
    top, made = peaks(rows), []
    for part, figure in (
        ("kernels", _kernels),
        ("prefill", _prefill),
        ("decode", _decode),
        ("train", _train),
    ):
        found = [row for row in good if row["key"]["part"] == part]
        if found:
            path = out / f"{part}.png"
            figure(found, top).savefig(path, dpi=DPI)
            made.append(path)
    return made


def _panels(count: int, width: int = 3) -> tuple[Figure, list[Any]]:
    columns = min(count, width)
    lines = -(-count // columns)
    size = (4.6 * columns, 3.6 * lines)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes


def _groups(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row["key"].get(name) for name in names)
        found.setdefault(key, []).append(row)
    return found


def _lines(panel: Any, rows: Sequence[Row], name: str, point: Callable[[Row], Point]):
    """A line with its spread per value of `name`; what full attention does is black."""
    for (value,), group in _groups(rows, name).items():
        x, middle, low, high = zip(*sorted(map(point, group)), strict=True)
        black = str(value).startswith(("full", "library"))
        style = {"color": "black", "linestyle": "--"} if black else {}
        (drawn,) = panel.plot(x, middle, marker="o", label=str(value), **style)
        panel.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15)


def _level(panel: Any, value: float, text: str) -> None:
    panel.axhline(value, color="grey", linewidth=1, linestyle=":")
    panel.annotate(
        text,
        (0.01, value),
        xycoords=("axes fraction", "data"),
        fontsize=7,
        color="grey",
        va="bottom",
    )


def _rate(row: Row, amount: float) -> tuple[float, float, float]:
    """Median, least and most of `amount` per second."""
    t = row["seconds"]
    low, middle, high = (amount / t[k] for k in ("max_s", "median_s", "min_s"))
    return middle, low, high


def _kernels(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    """Time and rate side by side: time has to fall with the live slots."""
    groups = _groups(rows, "way", "queries", "memory", "batch", "preset", "dtype")
    figure, panels = _panels(2 * len(groups), width=4)
    pairs = zip(panels[::2], panels[1::2], strict=False)
    for (left, right), (key, group) in zip(pairs, groups.items(), strict=False):
        way, queries, memory, batch, preset, dtype = key
        decode = way == "decode"
        name, scale = ("read_bytes", 1e9) if decode else ("useful_flops", 1e12)

        def spent(row: Row) -> Point:
            t = row["seconds"]
            times = (1e6 * t[k] for k in ("median_s", "min_s", "max_s"))
            return row["key"]["live"], *times

        def reached(row: Row, name: str = name, scale: float = scale) -> Point:
            return row["key"]["live"], *_rate(row, row[name] / scale)

        _lines(left, group, "implementation", spent)
        _lines(right, group, "implementation", reached)
        if dtype in top:
            field = "bandwidth_gbs" if decode else "tflops"
            text = "measured copy" if decode else "measured matmul"
            _level(right, top[dtype][field], text)
        left.set_ylabel("time, µs")
        right.set_ylabel("GB/s" if decode else "useful TFLOP/s")
        for panel in (left, right):
            panel.set_yscale("log")
            panel.set_title(
                f"{preset} {way}, {batch} × {queries} on {memory:,} slots", fontsize=9
            )
            panel.set_xlabel("live slots")
        left.legend(fontsize=7)
    return figure


def _prefill(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    del top
    groups = _groups(rows, "preset", "dtype")
    figure, panels = _panels(len(groups))
    for panel, ((preset, dtype), group) in zip(panels, groups.items(), strict=False):

        def point(row: Row) -> Point:
            t = row["seconds"]
            return row["key"]["length"], t["median_s"], t["min_s"], t["max_s"]

        _lines(panel, group, "method", point)
        _log2(panel, sorted({row["key"]["length"] for row in group}))
        panel.set_yscale("log")
        panel.set_title(f"{preset}, {dtype}", fontsize=9)
        panel.set_xlabel("tokens")
        panel.set_ylabel("time to first token, s")
        panel.legend(fontsize=7)
    return figure


def _decode(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    del top
    groups = _groups(rows, "preset", "length", "dtype")
    figure, panels = _panels(len(groups))
    for panel, ((preset, length, dtype), group) in zip(
        panels, groups.items(), strict=False
    ):

        def point(row: Row) -> Point:
            batch = row["key"]["batch"]
            return batch, *_rate(row, batch)

        _lines(panel, group, "method", point)
        _log2(panel, sorted({row["key"]["batch"] for row in group}))
        panel.set_title(f"{preset} behind {length:,} tokens, {dtype}", fontsize=9)
        panel.set_xlabel("rows")
        panel.set_ylabel("tokens/s")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    return figure


def _train(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    figure, (panel,) = _panels(1)

    def point(row: Row) -> Point:
        return row["key"]["length"], *_rate(row, row["model_flops"] / 1e12)

    _lines(panel, rows, "preset", point)
    for dtype in {row["key"]["dtype"] for row in rows} & set(top):
        _level(panel, top[dtype]["tflops"], "measured matmul")
    _log2(panel, sorted({row["key"]["length"] for row in rows}))
    panel.set_xlabel("tokens")
    panel.set_ylabel("model TFLOP/s of a step")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7)
    return figure


def _log2(panel: Any, ticks: Sequence[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=8)
    panel.minorticks_off()
