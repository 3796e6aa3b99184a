"""The figures of a report. Each function draws one PNG from metrics."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from beacon_jax.evaluation.methods import ADAPT, split_name

# The colours of the published needle heat maps: missed, half, found.
HEAT = LinearSegmentedColormap.from_list("heat", ["#F0496E", "#EBB839", "#0CD79F"])
DPI = 120
MARKERS = "ovs^D<P>X*"
# Beacons green, full attention black; families that do alike have one colour.
STYLES = {
    "beacon": ("tab:green", "o"),
    "beacon_int8": ("limegreen", "*"),
    "full": ("black", "o"),
    "int8": ("dimgrey", "*"),
    "window": ("darkgrey", "s"),
    "streaming": ("tab:blue", "v"),
    "keep_tail": ("deepskyblue", "<"),
    "keep_head": ("navy", ">"),
    "keep_ends": ("slateblue", "X"),
    "random": ("tab:olive", "P"),
    "strided": ("gold", "D"),
    "mean_pool": ("tab:purple", "^"),
    "snapkv": ("tab:red", "D"),
    "snapkv_aware": ("tab:orange", "D"),
    "selective": ("tab:brown", "X"),
}
UNBOUNDED = ("loss", "perplexity", "answer_loss")  # what does not lie in [0, 1]


def heat_maps(
    metrics: Sequence[dict[str, Any]], path: Path, label: str = "accuracy"
) -> None:
    """A score, length × depth, one panel per method."""
    cells = [m for m in metrics if m["depth"] is not None]
    methods = list(dict.fromkeys(m["method"] for m in cells))
    lengths = sorted({m["length"] for m in cells})
    depths = sorted({m["depth"] for m in cells})
    figure = Figure(
        figsize=(
            1.2 + len(methods) * (1.0 + 0.7 * len(lengths)),
            1.4 + 0.5 * len(depths),
        ),
        layout="constrained",
    )
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    image = None
    for panel, method in zip(panels, methods, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for m in cells:
            if m["method"] == method:
                at = depths.index(m["depth"]), lengths.index(m["length"])
                grid[at] = m["value"]
        image = panel.imshow(grid, cmap=HEAT, vmin=0.0, vmax=1.0, aspect="auto")
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                panel.text(
                    column, row, f"{value:.2f}", ha="center", va="center", fontsize=8
                )
        panel.set_title(method)
        panel.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        panel.set_xlabel("length, tokens")
    panels[0].set_ylabel("depth of the needle")
    if image is not None:
        figure.colorbar(image, ax=list(panels), label=label)
    figure.savefig(path, dpi=DPI)


def loss_curves(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss of the last window against length, one line with its band per method."""
    found = [m for m in metrics if m["metric"] == "loss"]
    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(m["method"] for m in found):
        line = sorted(
            (m["length"], m["value"], m["low"], m["high"])
            for m in found
            if m["method"] == method
        )
        lengths, value, low, high = zip(*line, strict=True)
        style = {"full": "k-", "window": "k--"}.get(method, "-")
        (drawn,) = axes.plot(lengths, value, style, marker="o", label=method)
        axes.fill_between(lengths, low, high, color=drawn.get_color(), alpha=0.1)
    axes.set_xscale("log", base=2)
    lengths = sorted({m["length"] for m in found})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("loss of the last window, nats/token")
    axes.legend()
    figure.savefig(path, dpi=DPI)


def training_loss(lines: Path, path: Path) -> None:
    """Loss against the step, from the metrics.jsonl of a training run."""
    rows = [json.loads(x) for x in lines.read_text(encoding="utf-8").splitlines()]
    found = sorted({r["step"]: r["loss"] for r in rows if "loss" in r}.items())
    figure = Figure(figsize=(6.0, 3.0), layout="constrained")
    axes = figure.subplots()
    if found:
        axes.plot(*zip(*found, strict=True), marker=".", markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats/token")
    figure.savefig(path, dpi=DPI)


def curves(
    metrics: Sequence[Mapping[str, Any]], folder: Path, what: str = "scores"
) -> list[str]:
    """Each task's number against the ratio (at the longest length) and the length.

    what: "scores", or "answer_losses": in the names of the figures.

    Returns:
      Markdown of the figures that were worth drawing.
    """
    made = []
    plans = (
        ("ratio", _against_ratio, "tokens per slot"),
        ("length", _against_length, "length, tokens"),
    )
    for key, draw, label in plans:
        if len({m[key] for m in metrics} - {None}) > 1:
            name = f"{what}_by_{key}.png"
            _panels(metrics, folder / name, draw, label)
            made.append(f"![{what.replace('_', ' ')} by {key}]({name})\n")
    return made


def costs(
    metrics: Sequence[Mapping[str, Any]],
    times: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[str]:
    """KV bytes of the past and seconds per example against the length."""
    if len({m["length"] for m in metrics}) < 2:
        return []
    figure = Figure(figsize=(11.0, 4.0), layout="constrained")
    bytes_axes, time_axes = figure.subplots(1, 2)
    for method in dict.fromkeys(m["method"] for m in metrics):
        held: dict[int, float] = {}
        for m in metrics:
            if m["method"] == method:
                held.setdefault(m["length"], m["kv_bytes"])
        took: dict[int, float] = {}
        for t in times:
            if t["method"] == method:
                took.setdefault(t["length"], sum(t["seconds"]) / t["rows"])
        ratio = next(m["ratio"] for m in metrics if m["method"] == method)
        drawn = style(split_name(method)[0]) | {"alpha": _faded(ratio)}
        for axes, found in ((bytes_axes, held), (time_axes, took)):
            line = sorted(found.items())
            axes.plot(*zip(*line, strict=True), label=method, **drawn)
    lengths = sorted({m["length"] for m in metrics})
    for axes, label in (
        (bytes_axes, "KV bytes of the past"),
        (time_axes, "seconds per example, in batches"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.set_xlabel("length, tokens")
        axes.set_ylabel(label)
    time_axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(folder / "costs.png", dpi=DPI)
    return ["![KV bytes and time against the length](costs.png)\n"]


def _panels(
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
    draw: Callable[[Any, list[Mapping[str, Any]]], None],
    label: str,
) -> None:
    """A panel per task, four in a row, with one legend."""
    tasks = list(dict.fromkeys((m["task"], m["metric"]) for m in metrics))
    wide = min(4, len(tasks))
    high = -(-len(tasks) // wide)
    figure = Figure(figsize=(3.4 * wide + 2.0, 2.8 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    lines: dict[str, Any] = {}
    for axes, (task, metric) in zip(panels, tasks, strict=False):
        draw(axes, [m for m in metrics if (m["task"], m["metric"]) == (task, metric)])
        axes.set_title(task, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.set_ylabel(metric, fontsize=8)
        if metric not in UNBOUNDED:
            axes.set_ylim(-0.03, 1.03)  # or 0.01 looks like much
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, line)
    for axes in panels[len(tasks) :]:
        axes.remove()
    figure.legend(
        list(lines.values()), list(lines), loc="outside right upper", fontsize=8
    )
    figure.savefig(path, dpi=DPI)


def style(family: str) -> dict[str, Any]:
    """A colour and a marker that are a family's in every panel and every report."""
    digit = int(hashlib.sha256(family.encode()).hexdigest(), 16)
    free = f"C{digit % 10}", MARKERS[digit // 10 % len(MARKERS)]
    color, marker = STYLES.get(family, free)
    return {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2}


def _against_ratio(axes: Any, metrics: list[Mapping[str, Any]]) -> None:
    """At the longest length. Methods without a ratio are level lines."""
    longest = max(m["length"] for m in metrics)
    here = [
        m
        for m in metrics
        if m["length"] == longest
        and m["value"] is not None
        and split_name(m["method"])[1] != ADAPT
    ]
    ratios = sorted({m["ratio"] for m in here} - {None})
    for family in dict.fromkeys(split_name(m["method"])[0] for m in here):
        found = [m for m in here if split_name(m["method"])[0] == family]
        if found[0]["ratio"] is None:
            value = found[0]["value"]
            color = style(family)["color"]
            axes.axhline(
                value, linestyle="--", linewidth=1.0, label=family, color=color
            )
            continue
        line = sorted((m["ratio"], m["value"]) for m in found)
        axes.plot(*zip(*line, strict=True), label=family, **style(family))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"x{r}" for r in ratios])
    axes.text(
        0.98, 0.98, f"{longest:,} tokens", transform=axes.transAxes, fontsize=7,
        ha="right", va="top",
    )  # fmt: skip


def _against_length(axes: Any, metrics: list[Mapping[str, Any]]) -> None:
    for method in dict.fromkeys(m["method"] for m in metrics):
        found = [m for m in metrics if m["method"] == method]
        line = [(m["length"], m["value"]) for m in found if m["value"] is not None]
        if line:
            drawn = style(split_name(method)[0]) | {"alpha": _faded(found[0]["ratio"])}
            axes.plot(*zip(*sorted(line), strict=True), label=method, **drawn)
    lengths = sorted({m["length"] for m in metrics})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(n) for n in lengths], fontsize=7)


def _faded(ratio: int | None) -> float:
    """Higher ratios are drawn lighter."""
    return 1.0 if ratio is None else max(0.3, 1.15 - 0.15 * float(np.log2(2 * ratio)))
