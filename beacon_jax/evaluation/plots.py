"""The figures of a report. Each function draws one PNG from metrics."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.evaluation.methods import ADAPT, RECENT, split_name
from beacon_jax.evaluation.statistics import grouped

# The colours of the published needle heat maps: missed, half, found.
HEAT = ["#F0496E", "#EBB839", "#0CD79F"]
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
    "mean-pool": ("tab:purple", "^"),
    "snapkv": ("tab:red", "D"),
    "snapkv_aware": ("tab:orange", "D"),
    "kvzip": ("tab:pink", "h"),
    "attention-matching": ("magenta", "d"),
    "retention": ("teal", "8"),
    "expected-attention": ("tab:cyan", "p"),
    "selective": ("tab:brown", "X"),
}
NOTHING = 0.05  # a score that is not worth a panel
UNBOUNDED = ("loss", "perplexity", "answer_loss")  # what does not lie in [0, 1]


def heat_maps(
    metrics: Sequence[dict[str, Any]], path: Path, label: str = "accuracy"
) -> None:
    """A score, length × depth, one panel per method."""
    cells = [m for m in metrics if m["depth"] is not None]
    methods = list(dict.fromkeys(m["method"] for m in cells))
    lengths = sorted({m["length"] for m in cells})
    depths = sorted({m["depth"] for m in cells})
    figure = make_figure(
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
        image = panel.imshow(grid, cmap=_heat(), vmin=0.0, vmax=1.0, aspect="auto")
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
    """Draws the loss of the last window against the length, a panel per ratio.

    If there is one length, it draws a row per method, in the order of their losses.
    """
    found = [m for m in metrics if m["metric"] == "loss"]
    label = "loss of the last window, nats/token"
    if len({m["length"] for m in found}) == 1:
        _rows(found, label).savefig(path, dpi=DPI)
        return

    def draw(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
        for m, drawn in _length_lines(axes, metrics, lambda x: x["value"]):
            ordered = sorted(m, key=lambda x: x["length"])
            low, high = ([x[key] for x in ordered] for key in ("low", "high"))
            band = {"color": drawn.get_color(), "alpha": 0.08}
            axes.fill_between(drawn.get_xdata(), low, high, **band)

    figure, panels = _per_ratio(found, draw)
    panels[0].set_ylabel(label)
    figure.savefig(path, dpi=DPI)


def make_figure(**options: Any) -> Any:
    """Makes a figure. matplotlib is an extra, and who draws nothing can do without."""
    from matplotlib.figure import Figure

    return Figure(**options)


def _heat() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("heat", HEAT)


def _rows(metrics: Sequence[Mapping[str, Any]], label: str) -> Any:
    """A value with its interval per method, the best on top."""
    ordered = sorted(metrics, key=lambda m: -m["value"])
    figure = make_figure(figsize=(6.4, 1.2 + 0.22 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for place, m in enumerate(ordered):
        drawn = _line(m) | {"label": m["method"], "linestyle": "none"}
        spread = [[m["value"] - m["low"]], [m["high"] - m["value"]]]
        axes.errorbar([m["value"]], [place], xerr=spread, elinewidth=0.8, **drawn)
        if m["ratio"] is None:  # what the others are read against
            color = drawn["color"]
            axes.axvline(m["value"], color=color, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(ordered)), [m["method"] for m in ordered], fontsize=8)
    axes.set_xlabel(f"{label}, {ordered[0]['length']:,} tokens [95 %]")
    axes.grid(axis="x", alpha=0.2)
    return figure


def means_by_ratio(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a mean with its interval against the compression ratio, at each length.

    What has no ratio is a level line.
    """
    lengths = sorted({m["length"] for m in metrics})
    figure = make_figure(figsize=(4.2 * len(lengths) + 2.0, 3.8), layout="constrained")
    panels = list(figure.subplots(1, len(lengths), squeeze=False)[0])
    for axes, length in zip(panels, lengths, strict=True):
        here = [m for m in metrics if m["length"] == length and m["ratio"] != ADAPT]
        _against_ratio(axes, here)
        families = list(dict.fromkeys(split_name(m["method"])[0] for m in here))
        moved = _moved(families)
        for m in here:
            family = split_name(m["method"])[0]
            if m["ratio"] is None:
                continue
            at, color = m["ratio"] * moved[family], style(family)["color"]
            axes.vlines(at, m["low"], m["high"], color=color, linewidth=0.8, alpha=0.6)
        ratios = sorted({m["ratio"] for m in here} - {None})
        axes.set_xticks(ratios, [f"{1 - 1 / r:.3g}" for r in ratios], fontsize=8)
        axes.set_title(f"{length:,} tokens", fontsize=9)
        axes.set_xlabel("compression ratio")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(axis="y", alpha=0.2)
    panels[0].set_ylabel("mean score [95 %]")
    _legend(figure, panels)
    figure.savefig(path, dpi=DPI)


def training_loss(lines: Path, path: Path) -> None:
    """Loss against the step, from the metrics.jsonl of a training run."""
    rows = [json.loads(x) for x in lines.read_text(encoding="utf-8").splitlines()]
    found = sorted({r["step"]: r["loss"] for r in rows if "loss" in r}.items())
    figure = make_figure(figsize=(6.0, 3.0), layout="constrained")
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

    Tasks in which no method reaches `NOTHING` are named in the text, not drawn: their
    lines would all lie on the axis.

    what: "scores", or "answer_losses": in the names of the figures.

    Returns:
      Markdown of the figures that were worth drawing.
    """
    made = []
    silent = _silent(metrics)
    drawn = [m for m in metrics if m["task"] not in silent]
    for key, draw in (("ratio", _against_ratio), ("length", _against_length)):
        if len({m[key] for m in drawn} - {None}) > 1:
            name = f"{what}_by_{key}.png"
            _panels(drawn, folder / name, draw)
            made.append(f"![{what.replace('_', ' ')} by {key}]({name})\n")
    if silent:
        made.append(
            f"Not drawn, since no method is above {NOTHING:g}: {', '.join(silent)}.\n"
        )
    return made


def _silent(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tasks with scores of 0 to 1 that are next to 0 for every method."""
    best: dict[str, float] = {}
    for m in metrics:
        score = np.inf if m["metric"] in UNBOUNDED else m["value"]
        if score is not None:
            best[m["task"]] = max(score, best.get(m["task"], 0.0))
    return [task for task, score in best.items() if score <= NOTHING]


def costs(
    metrics: Sequence[Mapping[str, Any]],
    times: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[str]:
    """Draws KV bytes of the past and seconds per example, a panel per ratio.

    Both stand against the length; seconds are without compilation.
    """
    if len({m["length"] for m in metrics}) < 2:
        return []
    took: dict[tuple[str, int], float] = {}
    for t in times:  # of the first task that measured a method and a length
        took.setdefault((t["method"], t["length"]), sum(t["seconds"]) / t["rows"])

    def draw(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
        _length_lines(axes, metrics, lambda x: took.get((x["method"], x["length"])))
        axes.set_ylim(bottom=0)

    figure, panels = _per_ratio(metrics, draw, before=1)
    _memory_panel(panels[0], metrics)
    panels[1].set_ylabel("seconds per example, in batches")
    figure.savefig(folder / "costs.png", dpi=DPI)
    return [
        "![KV bytes and time against the length](costs.png)\n\n"
        "Times are without compilation.\n"
    ]


def _memory_panel(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draws one line for all methods of equal bytes: they would hide each other."""
    lines: dict[tuple[tuple[int, float], ...], list[Mapping[str, Any]]] = {}
    for m in _by_method(metrics):
        held = {x["length"]: x["kv_bytes"] for x in m}
        lines.setdefault(tuple(sorted(held.items())), []).append(m[0])
    most = max(value for line in lines for _, value in line)
    unit, name = next(
        (u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
        if most >= u or u == 1
    )  # fmt: skip
    for line, same in lines.items():
        tags = sorted({split_name(m["method"])[1] for m in same})
        shared = f"{tags[0]}, {len(same)} methods" if len(same) > 1 else ""
        x, y = zip(*line, strict=True)
        drawn = _line(same[0]) | ({"color": "tab:grey"} if shared else {})
        axes.plot(x, [value / unit for value in y], **drawn)
        text = shared or same[0]["method"]
        axes.annotate(
            text, (x[-1], y[-1] / unit), (6, 0), textcoords="offset points",
            fontsize=7, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.spines[["right", "top"]].set_visible(False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"KV of the past, {name}")
    axes.set_title("memory", fontsize=9)
    _length_axis(axes, metrics)


def _per_ratio(
    metrics: Sequence[Mapping[str, Any]],
    draw: Callable[[Any, Sequence[Mapping[str, Any]]], None],
    before: int = 0,
) -> tuple[Any, list[Any]]:
    """A panel per ratio, each with the methods that have none, and one legend.

    Args:
      before: panels in front that the caller fills; they share no axis.
    """
    tags = sorted({split_name(m["method"])[1] for m in metrics} - {""}, key=by_number)
    count = before + max(len(tags), 1)
    figure = make_figure(figsize=(3.3 * count + 1.6, 3.6), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes, tag in zip(panels[before:], tags or [""], strict=True):
        if axes is not panels[before]:
            axes.sharey(panels[before])
        draw(axes, [m for m in metrics if split_name(m["method"])[1] in ("", tag)])
        axes.set_title(tag, fontsize=9)
    _legend(figure, panels[before:])
    return figure, panels


def _panels(
    metrics: Sequence[Mapping[str, Any]],
    path: Path,
    draw: Callable[[Any, list[Mapping[str, Any]]], None],
) -> None:
    """A panel per task, four in a row, with one legend."""
    tasks = list(dict.fromkeys((m["task"], m["metric"]) for m in metrics))
    wide = min(4, len(tasks))
    high = -(-len(tasks) // wide)
    figure = make_figure(figsize=(3.4 * wide + 2.0, 2.8 * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).ravel()
    for axes, (task, metric) in zip(panels, tasks, strict=False):
        axes.set_title(task, fontsize=9)
        draw(axes, [m for m in metrics if (m["task"], m["metric"]) == (task, metric)])
        axes.set_ylabel(metric, fontsize=8)
        if metric not in UNBOUNDED:
            axes.set_ylim(-0.03, 1.03)  # or 0.01 looks like much
    for axes in panels[len(tasks) :]:
        axes.remove()
    _legend(figure, list(panels[: len(tasks)]))
    figure.savefig(path, dpi=DPI)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """Adds one legend for all panels, beside them."""
    lines: dict[str, Any] = {}
    for axes in panels:
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(name, line)
    figure.legend(
        list(lines.values()), list(lines), loc="outside right upper", fontsize=8
    )


def style(family: str) -> dict[str, Any]:
    """A colour and a marker that are a family's in every panel and every report.

    With the last window raw it has the same ones, hollow and dotted.
    """
    base = family.removesuffix(RECENT)
    digit = int(hashlib.sha256(base.encode()).hexdigest(), 16)
    free = f"C{digit % 10}", MARKERS[digit // 10 % len(MARKERS)]
    color, marker = STYLES.get(base, free)
    drawn = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2}
    if base == family:
        return drawn
    return drawn | {"markerfacecolor": "white", "linestyle": ":"}


def _against_ratio(axes: Any, metrics: list[Mapping[str, Any]]) -> None:
    """Draws against the ratio, at the longest length; without a ratio a level line."""
    longest = max(m["length"] for m in metrics)
    here = [
        m
        for m in metrics
        if m["length"] == longest
        and m["value"] is not None
        and split_name(m["method"])[1] != ADAPT
    ]
    ratios = sorted({m["ratio"] for m in here} - {None})
    families = list(dict.fromkeys(split_name(m["method"])[0] for m in here))
    moved = _moved(families)
    for family in families:
        found = [m for m in here if split_name(m["method"])[0] == family]
        if found[0]["ratio"] is None:
            value = found[0]["value"]
            color = style(family)["color"]
            axes.axhline(
                value, linestyle="--", linewidth=1.0, label=family, color=color
            )
            continue
        line = sorted((m["ratio"] * moved[family], m["value"]) for m in found)
        axes.plot(*zip(*line, strict=True), label=family, **style(family))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ratios, [f"x{r}" for r in ratios])
    axes.minorticks_off()
    axes.set_xlabel("tokens per slot", fontsize=8)
    axes.set_title(f"{axes.get_title()}, {longest:,} tokens", fontsize=9)


def _against_length(axes: Any, metrics: list[Mapping[str, Any]]) -> None:
    for m, drawn in _length_lines(axes, metrics, lambda x: x["value"]):
        drawn.set(label=m[0]["method"], alpha=_faded(m[0]["ratio"]))


def _length_lines(
    axes: Any,
    metrics: Sequence[Mapping[str, Any]],
    value: Callable[[Mapping[str, Any]], float | None],
) -> list[tuple[list[Mapping[str, Any]], Any]]:
    """Draws a line per method against the length, side by side where they are equal.

    Returns:
      (metrics, line) of each method that has values.
    """
    methods, made = _by_method(metrics), []
    moved = _moved([m[0]["method"] for m in methods])
    for m in methods:
        points = {x["length"]: y for x in m if (y := value(x)) is not None}
        if points:
            lengths, values = zip(*sorted(points.items()), strict=True)
            at = [n * moved[m[0]["method"]] for n in lengths]
            made.append((m, *axes.plot(at, values, **_line(m[0]))))
    _length_axis(axes, metrics)
    return made


def _by_method(
    metrics: Sequence[Mapping[str, Any]],
) -> list[list[Mapping[str, Any]]]:
    """The metrics of each method."""
    return list(grouped(metrics, lambda m: m["method"]).values())


def _line(metric: Mapping[str, Any]) -> dict[str, Any]:
    """The look of a method's family, and its name in the legend."""
    family = split_name(metric["method"])[0]
    dashed = {"linestyle": "--"} if metric["ratio"] is None else {}
    return style(family) | {"label": family} | dashed


def _length_axis(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    lengths = sorted({m["length"] for m in metrics})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7)
    axes.minorticks_off()
    axes.set_xlabel("length, tokens", fontsize=8)


def _moved(names: Sequence[str]) -> dict[str, float]:
    """Returns a factor near 1 per name, which sets equal x values side by side."""
    middle = (len(names) - 1) / 2
    step = min(0.025, 0.25 / max(len(names), 1))
    return {name: 2.0 ** (step * (i - middle)) for i, name in enumerate(names)}


def by_number(tag: str) -> tuple[int, str]:
    """Sorts "x2", "x4", "x16" by their numbers."""
    return (int(tag[1:]) if tag[1:].isdecimal() else 0, tag)


def _faded(ratio: int | None) -> float:
    """Returns the opacity of a ratio: higher ones are lighter."""
    return 1.0 if ratio is None else max(0.3, 1.15 - 0.15 * float(np.log2(2 * ratio)))
