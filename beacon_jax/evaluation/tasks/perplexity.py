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
from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.methods import Method, remember
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.statistics import mean_interval, ratio_interval
from beacon_jax.evaluation.tasks.base import Example, Metric, Prediction


class Perplexity:
    name = "perplexity"
    whole_windows = True

    def longest(self, settings: Settings) -> int:
        return max(settings.lengths)

    def examples(
        self, model: Model, settings: Settings, inputs: Inputs
    ) -> list[Example]:
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
            Example(f"{length}/{i}", length, stream[e - length - 1 : e], {"row": i})
            for length in settings.lengths
            for i, e in enumerate(ends)
        ]

    def run(
        self, model: Model, method: Method, batch: Sequence[Example]
    ) -> list[dict[str, Any]]:
        cut = batch[0].length - model.window
        past = [e.tokens[:cut] for e in batch]
        last = [e.tokens[cut:-1] for e in batch]
        labels = [e.tokens[cut + 1 :] for e in batch]
        memory, kept = remember(model, method, past, last)
        out, _ = model.feed(
            memory, last, method.live_ratio, outputs="loss", labels=labels
        )
        losses = np.asarray(out.token_loss, np.float64).mean(1)
        return [
            {"loss": float(loss), "kv_bytes": n}
            for loss, n in zip(losses, kept, strict=True)
        ]

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Per method and length: loss, and the paired differences.

        below_window: loss of window-only minus this one. gap_closed: that difference
        over the one of full attention. Both only if those methods were run.
        """
        losses: dict[tuple[str, int], dict[int, float]] = {}
        shown: dict[tuple[str, int], Metric] = {}
        for p in predictions:
            key = (p["method"], p["length"])
            losses.setdefault(key, {})[p["row"]] = p["loss"]
            shown[key] = {k: p[k] for k in ("method", "ratio", "length", "kv_bytes")}
        metrics = []
        for (name, length), found in losses.items():
            rows = sorted(found)

            def paired(other: str, length=length, rows=rows) -> np.ndarray | None:
                by_row = losses.get((other, length), {})
                if not set(rows) <= set(by_row):
                    return None
                return np.asarray([by_row[r] for r in rows])

            own, window, full = paired(name), paired("window"), paired("full")
            assert own is not None
            base = shown[name, length] | {"task": self.name, "count": len(rows)}
            values = {"loss": mean_interval(own)}
            if window is not None and name != "window":
                values["below_window"] = mean_interval(window - own)
                if full is not None:
                    values["gap_closed"] = ratio_interval(window - own, window - full)
            for metric, triple in values.items():
                value, low, high = (None if math.isnan(x) else x for x in triple)
                metrics.append(
                    base | {"metric": metric, "value": value, "low": low, "high": high}
                )
        return metrics

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        plots.loss_curves(metrics, folder / "perplexity.png")
        by_key: dict[tuple[int, str], dict[str, Metric]] = {}
        for m in metrics:
            by_key.setdefault((m["length"], m["method"]), {})[m["metric"]] = m
        rows = []
        for (length, method), m in sorted(by_key.items(), key=lambda item: item[0][0]):
            rows.append(
                [
                    length,
                    method,
                    interval(m["loss"], 3),
                    f"{math.exp(m['loss']['value']):.2f}",
                    interval(m.get("below_window"), 3),
                    interval(m.get("gap_closed"), 2),
                    f"{m['loss']['kv_bytes']:,.0f}",
                    m["loss"]["count"],
                ]
            )
        head = [
            "length",
            "method",
            "loss, nats/token",
            "ppl",
            "below window-only",
            "gap closed",
            "KV bytes of past",
            "rows",
        ]
        return (
            "## Loss of the last window given the past\n\nThe same tokens are predicted"
            " at every length and by every method; [95 % interval over rows].\n\n"
            + table(head, rows)
            + "\n\n![loss against length](perplexity.png)\n"
        )
