"""Loss of the last window, given the past.

Every length and every method predicts the same tokens: the past of a row grows to the
left, so the curve over length shows what more past is worth, and differences between
methods are paired. All W tokens of the last window predict; the first of them is the
only one whose context is the past alone. Inference semantics: beacons stand in the last
window too, as in the release's `evaluate_perplexity`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.evaluation import plots
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Method, remember
from beacon_jax.evaluation.reading import losses
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.statistics import (
    bounds,
    grouped,
    mean_interval,
    ratio_interval,
)
from beacon_jax.evaluation.tasks.base import Instance, Metric, Prediction, Task
from beacon_jax.inference.model import Model


class Perplexity(Task):
    name = "perplexity"
    whole_windows = True

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        """Rows of length + 1 tokens whose last windows never overlap.

        Raises:
          ValueError: too little text for that many.
        """
        stream = inputs.stream
        longest, window = max(settings.lengths), model.window
        blocks = (len(stream) - longest - 1) // window + 1
        if blocks < settings.samples:
            raise ValueError(
                f"--text={settings.text} has {len(stream)} held-out tokens, enough for "
                f"{max(blocks, 0)} of --samples={settings.samples} rows of "
                f"{longest} tokens; use fewer, or a source with more text."
            )
        rng = np.random.default_rng(settings.seed)
        starts = window * np.sort(rng.choice(blocks, settings.samples, replace=False))
        ends = starts + longest + 1
        return [
            Instance(f"{length}/{i}", length, stream[e - length - 1 : e], {"row": i})
            for length in settings.lengths
            for i, e in enumerate(ends)
        ]

    def run(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> list[dict[str, Any]]:
        cut = batch[0].length - model.window
        past = [e.tokens[:cut] for e in batch]
        last = [e.tokens[cut:-1] for e in batch]
        labels = [e.tokens[cut + 1 :] for e in batch]
        memory, kept = remember(model, method, past, last)
        found, _ = losses(model, memory, last, labels, method.live_ratio)
        return [
            {"loss": float(loss), "kv_bytes": n}
            for loss, n in zip(found.mean(1), kept, strict=True)
        ]

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Per method and length: loss, and the paired differences.

        below_window: loss of window-only minus this one. gap_closed: that difference
        over the one of full attention. Both only if those methods were run.
        """
        cells = grouped(predictions, lambda p: (p["method"], p["length"]))
        by_row = {key: {p["row"]: p["loss"] for p in x} for key, x in cells.items()}
        metrics = []
        for (name, length), found in by_row.items():
            rows = sorted(found)

            def paired(other: str, length=length, rows=rows) -> np.ndarray | None:
                of = by_row.get((other, length), {})
                if not set(rows) <= set(of):
                    return None
                return np.asarray([of[r] for r in rows])

            own, window, full = paired(name), paired("window"), paired("full")
            assert own is not None
            last, shown = (
                cells[name, length][-1],
                ("method", "ratio", "length", "kv_bytes"),
            )
            base = {k: last[k] for k in shown}
            base |= {"task": self.name, "count": len(rows)}
            values = {"loss": mean_interval(own)}
            if window is not None and name != "window":
                values["below_window"] = mean_interval(window - own)
                if full is not None:
                    values["gap_closed"] = ratio_interval(window - own, window - full)
            for metric, triple in values.items():
                found = bounds(triple).items()
                known = {k: None if math.isnan(x) else x for k, x in found}
                metrics.append(base | {"metric": metric} | known)
        return metrics

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        plots.loss_curves(metrics, folder / "perplexity.png")
        cells = {(m["length"], m["method"], m["metric"]): m for m in metrics}
        losses = [m for m in metrics if m["metric"] == "loss"]
        rows = []
        for m in sorted(losses, key=lambda m: m["length"]):
            key = (m["length"], m["method"])
            rows.append(
                [
                    *key,
                    interval(m, 3),
                    f"{math.exp(m['value']):.2f}",
                    interval(cells.get((*key, "below_window")), 3),
                    interval(cells.get((*key, "gap_closed")), 2),
                    f"{m['kv_bytes']:,.0f}",
                    m["count"],
                ]
            )
        head = ["length", "method", "loss, nats/token", "ppl", "below window-only"]
        head += ["gap closed", "KV bytes of past", "rows"]
        return (
            "## Loss of the last window given the past\n\nThe same tokens are predicted"
            " at every length and by every method; [95 % interval over rows].\n\n"
            + table(head, rows)
            + "\n\n![loss against length](perplexity.png)\n"
        )
