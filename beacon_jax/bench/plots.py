"""Figures of a benchmark, drawn from its rows."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from beacon_jax.attention import IMPLEMENTATIONS
from beacon_jax.bench.kernels import DEFAULT, INT8_MEMORY, LIBRARY
from beacon_jax.bench.records import Row
from beacon_jax.bench.report import grouped, peaks, unit_of
from beacon_jax.bench.serving import FULL, FULL_LIBRARY

DPI = 120
Point = tuple[float, float, float, float]  # x, median, least, most
# One look per name in every panel. What compression or our kernels are measured
# against is black; `default` is one of the others, and drawn open on top of it.
FIXED = {
    FULL: {"color": "black", "marker": "o"},
    FULL_LIBRARY: {"color": "black", "marker": "s", "linestyle": "--"},
    LIBRARY: {"color": "black", "marker": "s", "linestyle": "--"},
    DEFAULT: {
        "color": "tab:green",
        "marker": "D",
        "markersize": 8,
        "markerfacecolor": "none",
        "linestyle": ":",
    },
}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """Draws a figure for each part that has rows; returns their paths.

    They are kernels.png, prefill.png, decode.png and train.png.
    """
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
    # One panel leaves no room for a legend below it.
    size = (max(4.6 * columns, 6), 3.4 * lines + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes


def _style(value: str) -> dict[str, Any]:
    name = value.removesuffix(INT8_MEMORY)
    int8 = {"linestyle": "-.", "marker": "^"} if name != value else {}
    if name in FIXED:
        return FIXED[name] | int8
    names = [n for n in IMPLEMENTATIONS if n not in FIXED]
    if name in names:
        # C2 is the green of `default`.
        place = names.index(name)
        return {"color": f"C{place + (place > 1)}", "marker": "o"} | int8
    if name[:1] == "x" and name[1:].isdigit():
        return {"color": f"C{int(name[1:]).bit_length() - 1}", "marker": "o"}
    return {"marker": "o"}


def _lines(panel: Any, rows: Sequence[Row], name: str, point: Callable[[Row], Point]):
    """Draws a line with its spread per value of `name`."""
    for (value,), group in grouped(rows, name).items():
        x, middle, low, high = zip(*sorted(map(point, group)), strict=True)
        (drawn,) = panel.plot(x, middle, label=str(value), **_style(str(value)))
        panel.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12)


def _level(panel: Any, value: float, text: str) -> None:
    panel.axhline(value, color="grey", linewidth=1.5, linestyle=(0, (1, 1)), label=text)


def _legend(figure: Figure, columns: int) -> None:
    """Draws one for all panels, below them: inside it would hide lines."""
    found = {}
    for panel in figure.axes:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, line)
    ratio = lambda label: int(label[1:]) if label[1:].isdigit() else 0
    labels = sorted(found, key=ratio)  # else as they were drawn
    figure.legend(
        [found[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
    )


def _log_y(panel: Any) -> None:
    """Marks 1, 2, 5, 10, ... in digits."""
    panel.grid(alpha=0.2)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _flops(rates: Sequence[float]) -> tuple[float, str]:
    """Returns FLOP/s per unit, and the unit that fits the largest of these rates."""
    return (1e9, "GFLOP/s") if max(rates) < 1e12 else (1e12, "TFLOP/s")


def _times(row: Row, per_second: float) -> tuple[float, float, float]:
    """Returns median, least and most seconds, in units of which so many are one."""
    middle, low, high = (row["seconds"][k] for k in ("median_s", "min_s", "max_s"))
    return per_second * middle, per_second * low, per_second * high


def _rate(row: Row, amount: float) -> tuple[float, float, float]:
    """Returns median, least and most of `amount` per second."""
    t = row["seconds"]
    low, middle, high = (amount / t[k] for k in ("max_s", "median_s", "min_s"))
    return middle, low, high


def _kernels(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    """Draws time and rate side by side: time has to fall with the live slots."""
    groups = grouped(rows, "way", "queries", "memory", "batch", "preset", "dtype")
    figure, panels = _panels(2 * len(groups), width=4)
    per_flop, unit = _flops([1e12 * row["tflops"] for row in (*rows, *top.values())])
    pairs = zip(panels[::2], panels[1::2], strict=False)
    for (left, right), (key, group) in zip(pairs, groups.items(), strict=False):
        way, queries, memory, batch, preset, dtype = key
        decode = way == "decode"
        name, scale = ("read_bytes", 1e9) if decode else ("useful_flops", per_flop)

        middle = statistics.median(row["seconds"]["median_s"] for row in group)
        per_second, unit_of_time = unit_of(middle)

        spent = lambda row, n=per_second: (row["key"]["live"], *_times(row, n))
        reached = lambda row, name=name, scale=scale: (
            row["key"]["live"],
            *_rate(row, row[name] / scale),
        )
        _lines(left, group, "implementation", spent)
        _lines(right, group, "implementation", reached)
        if dtype in top:
            peak = top[dtype]["bandwidth_gbs" if decode else "tflops"]
            _level(right, peak if decode else peak * 1e12 / per_flop, "measured peak")
        left.set_ylabel(f"time, {unit_of_time}")
        right.set_ylabel("GB/s" if decode else f"useful {unit}")
        for panel in (left, right):
            _log_y(panel)
            panel.set_title(
                f"{preset} {way}, {batch} × {queries} on {memory:,} slots", fontsize=9
            )
            panel.set_xlabel("live slots")
            lives = sorted({row["key"]["live"] for row in group})
            panel.set_xticks(lives, [f"{n:,}" for n in lives], fontsize=8)
    _legend(figure, 8)
    return figure


def _panel_each(
    rows: Sequence[Row],
    names: Sequence[str],
    of: str,
    x: str,
    point: Callable[[Row], tuple[float, float, float]],
) -> tuple[Figure, list[tuple[Any, tuple[Any, ...]]]]:
    """Draws a panel per value of `names`, a line per value of `of`, over the key `x`.

    Returns:
      The figure, and each panel with the values of `names`.
    """
    groups = grouped(rows, *names)
    figure, panels = _panels(len(groups))
    made = list(zip(panels, groups, strict=False))
    for panel, values in made:
        group = groups[values]
        _lines(panel, group, of, lambda row: (row["key"][x], *point(row)))
        ticks = sorted({row["key"][x] for row in group})
        panel.set_xscale("log", base=2)
        panel.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=8)
        panel.minorticks_off()
    return figure, made


def _prefill(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    del top
    times = lambda row: _times(row, 1)
    names = ("preset", "dtype")
    figure, panels = _panel_each(rows, names, "method", "length", times)
    for panel, (preset, dtype) in panels:
        _log_y(panel)
        panel.set_title(f"{preset}, {dtype}", fontsize=9)
        panel.set_xlabel("tokens")
        panel.set_ylabel("time to first token, s")
    _legend(figure, 6)
    return figure


def _decode(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    del top
    rate = lambda row: _rate(row, row["key"]["batch"])
    names = ("preset", "length", "dtype")
    figure, panels = _panel_each(rows, names, "method", "batch", rate)
    for panel, (preset, length, dtype) in panels:
        panel.set_title(f"{preset} behind {length:,} tokens, {dtype}", fontsize=9)
        panel.set_xlabel("rows")
        panel.set_ylabel("tokens/s")
        panel.set_ylim(bottom=0)
    _legend(figure, 6)
    return figure


def _train(rows: Sequence[Row], top: dict[str, Row]) -> Figure:
    per_flop, unit = _flops([1e12 * row["tflops"] for row in (*rows, *top.values())])
    rate = lambda row: _rate(row, row["model_flops"] / per_flop)
    figure, ((panel, _),) = _panel_each(rows, (), "preset", "length", rate)
    for dtype in sorted({row["key"]["dtype"] for row in rows} & set(top)):
        peak = top[dtype]["tflops"] * 1e12 / per_flop
        _level(panel, peak, f"measured matrix product, {dtype}")
    panel.set_xlabel("tokens")
    panel.set_ylabel(f"model {unit} of a step")
    panel.set_ylim(bottom=0)
    _legend(figure, 4)
    return figure
