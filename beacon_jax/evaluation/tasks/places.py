"""Recall by the place in a unit: a beacon stands behind every `ratio` tokens.

Compressors of this kind keep what stands next to a beacon better than what stands at
the far end of its unit; an accuracy over all places hides that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.evaluation import plots
from beacon_jax.evaluation.methods import split_name
from beacon_jax.evaluation.statistics import bounds, grouped, share
from beacon_jax.evaluation.tasks.base import Metric, Prediction
from beacon_jax.evaluation.tasks.synthetic import Synthetic

AT = "accuracy_at"  # metric of one place in the unit


class ByPlace(Synthetic):
    """Adds the accuracy at each place, of methods with a ratio.

    The "positions" of a prediction are indices of tokens in the text; those without are
    left out.
    """

    def recalled(self, prediction: Prediction) -> Sequence[float]:
        """Whether each token of the positions was recalled, 0 or 1."""
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        hits = [
            ((p["method"], p["ratio"], p["length"], position % p["ratio"]), hit)
            for p in predictions
            if p["ratio"] is not None and p.get("positions")
            for position, hit in zip(p["positions"], self.recalled(p), strict=True)
        ]
        names = ("method", "ratio", "length", "place")
        cells = grouped(hits, lambda pair: pair[0])
        return super().score(predictions) + [
            {"task": self.name, "metric": AT, "detail": True}
            | dict(zip(names, key, strict=True))
            | bounds(share(np.asarray([hit for _, hit in cells[key]], np.float64)))
            | {"count": len(cells[key])}
            for key in sorted(cells)
        ]

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """Adds the figure if anything has a place."""
        text = super().report(metrics, folder)
        found = [m for m in metrics if m["metric"] == AT]
        if not found:
            return text
        _draw(found, folder / f"{self.name}_positions.png")
        return f"{text}\n![accuracy by place in the unit]({self.name}_positions.png)\n"


def _draw(metrics: Sequence[Metric], path: Path) -> None:
    """Draws accuracy against the place of the value in its unit.

    A panel per ratio, a line per method, all lengths together. Beacons stand behind the
    last place.
    """
    ratios = sorted({m["ratio"] for m in metrics if m["ratio"] > 1})
    width = max(3.4 * len(ratios) + 1.6, 4.0)
    figure = plots.make_figure(figsize=(width, 3.4), layout="constrained")
    panels = figure.subplots(1, max(len(ratios), 1), sharey=True, squeeze=False)[0]
    lines: dict[str, Any] = {}
    for panel, ratio in zip(panels, ratios, strict=False):
        here = [m for m in metrics if m["ratio"] == ratio]
        methods = list(dict.fromkeys(m["method"] for m in here))
        for place, method in enumerate(methods):
            at, values = _pooled([m for m in here if m["method"] == method])
            # Side by side, or equal values would hide each other.
            aside = 0.3 * ((place + 0.5) / len(methods) - 0.5)
            family = split_name(method)[0]
            style = plots.style(family)
            (lines[family],) = panel.plot(
                [x + aside for x in at], values, label=family, **style
            )
        panel.set_title(f"x{ratio}")
        panel.set_xticks(range(ratio))
        panel.set_xlabel("place of the value in its unit")
    panels[0].set_ylabel("accuracy")
    panels[0].set_ylim(-0.03, 1.03)
    figure.legend(
        list(lines.values()), list(lines), loc="outside right upper", fontsize=8
    )
    figure.savefig(path, dpi=plots.DPI)


def _pooled(metrics: Sequence[Metric]) -> tuple[list[int], list[float]]:
    """Places and the accuracy at each over all lengths."""
    at = sorted({m["place"] for m in metrics})
    values = []
    for place in at:
        here = [m for m in metrics if m["place"] == place]
        hits = sum(m["value"] * m["count"] for m in here)
        values.append(hits / sum(m["count"] for m in here))
    return at, values
