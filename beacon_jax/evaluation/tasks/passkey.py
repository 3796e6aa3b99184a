"""Passkey retrieval: a 5-digit key in real text, answered greedily, exact match.

The needle always ends before the last window, so that only the memory can answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.data.passkey import last_window_start, make_passkey
from beacon_jax.evaluation import plots
from beacon_jax.evaluation.methods import Method, Model
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.statistics import wilson
from beacon_jax.evaluation.tasks.base import Example, Metric, Prediction, Settings


class Passkey:
    name = "passkey"

    def examples(
        self, model: Model, settings: Settings, stream: np.ndarray
    ) -> list[Example]:
        """`samples` per length, their depths in turn; tokens end with the answer."""
        depths = np.linspace(0.0, 1.0, settings.depths).round(4).tolist()
        if settings.depths == 1:
            depths = [0.5]
        return [
            self._example(model, settings, stream, length, i, depths[i % len(depths)])
            for length in settings.lengths
            for i in range(settings.samples)
        ]

    def _example(
        self,
        model: Model,
        settings: Settings,
        stream: np.ndarray,
        length: int,
        index: int,
        depth: float,
    ) -> Example:
        if len(stream) < length:
            raise ValueError(
                f"--text={settings.text} has {len(stream)} held-out tokens, fewer than "
                f"the {length} of --lengths; use shorter ones, or more text."
            )
        rng = np.random.default_rng([settings.seed, length, index])
        start = int(rng.integers(0, len(stream) - length + 1))
        hay = stream[start : start + length]
        sample = make_passkey(rng, hay, length, depth, model.tokenizer, model.window)
        answer = sample.answer[1] - sample.answer[0]
        info = {"depth": depth, "key": sample.key, "answer_tokens": answer}
        return Example(f"{length}/{index}", length, sample.tokens, info)

    def run(
        self, model: Model, method: Method, batch: Sequence[Example]
    ) -> list[dict[str, Any]]:
        sizes = [e.info["answer_tokens"] for e in batch]
        prompts = [e.tokens[:-n] for e, n in zip(batch, sizes, strict=True)]
        cut = last_window_start(min(map(len, prompts)), model.window)
        past, last = [p[:cut] for p in prompts], [p[cut:] for p in prompts]
        memory = method.remember(model, past, last)
        kept = method.kv_bytes(memory)
        out, memory = model.feed(memory, last, method.live_ratio)
        tokens = model.decode(memory, out.last_logits, max(sizes), method.live_ratio)
        answers = []
        for example, n, row, held in zip(batch, sizes, tokens, kept, strict=True):
            answers.append(
                {
                    "predicted": model.tokenizer.decode(row[:n].tolist()),
                    "correct": bool((row[:n] == example.tokens[-n:]).all()),
                    "kv_bytes": held,
                }
            )
        return answers

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Accuracy per method and length, per depth and over all (depth None)."""
        cells: dict[tuple[str, int, float | None], list[Prediction]] = {}
        for p in predictions:
            for depth in (None, p["depth"]):
                cells.setdefault((p["method"], p["length"], depth), []).append(p)
        metrics = []
        for (method, length, depth), found in cells.items():
            hits = sum(p["correct"] for p in found)
            low, high = wilson(hits, len(found))
            metrics.append(
                {
                    "task": self.name,
                    "metric": "accuracy",
                    "method": method,
                    "ratio": found[0]["ratio"],
                    "length": length,
                    "depth": depth,
                    "value": hits / len(found),
                    "low": low,
                    "high": high,
                    "count": len(found),
                    "kv_bytes": found[0]["kv_bytes"],
                }
            )
        return metrics

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        plots.heat_maps(metrics, folder / "passkey.png")
        depths = sorted({m["depth"] for m in metrics if m["depth"] is not None})
        cells = {(m["length"], m["method"], m["depth"]): m for m in metrics}
        rows = []
        for m in sorted(metrics, key=lambda m: m["length"]):
            if m["depth"] is None:
                key = (m["length"], m["method"])
                found = [cells.get((*key, d)) for d in depths]
                rows.append(
                    [
                        *key,
                        interval(m, 2),
                        *(f"{c['value']:.2f}" if c else "" for c in found),
                        f"{m['kv_bytes']:,.0f}",
                        m["count"],
                    ]
                )
        head = ["length", "method", "accuracy", *(f"depth {d:g}" for d in depths)]
        return (
            "## Passkey accuracy\n\nFive digits, exact match, greedy, [95 % Wilson "
            "interval]; the needle is always outside the last window.\n\n"
            + table([*head, "KV bytes of past", "rows"], rows)
            + "\n\n![passkey accuracy by length and depth](passkey.png)\n"
        )
