"""The figures of a report. Each function draws one PNG from metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# The colours of the published needle heat maps: missed, half, found.
HEAT = LinearSegmentedColormap.from_list("heat", ["#F0496E", "#EBB839", "#0CD79F"])
DPI = 120


def heat_maps(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, length × depth, one panel per method."""
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
        figure.colorbar(image, ax=list(panels), label="accuracy")
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
