"""The base of tasks that ask for text: run, scored and reported here.

A task says how its prompts look and what an answer is worth; everything else is the
same for all of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation import plots, prompts
from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.methods import Method, remember_prompts
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.statistics import mean_interval, wilson
from beacon_jax.evaluation.tasks.base import Example, Metric, Prediction


class Generation:
    """A task whose answers are generated greedily.

    Attributes:
      name: in --tasks and in file names.
      title: heading of its section in the report; about: what is measured, in a line.
      new_tokens: at most in an answer (`info["new_tokens"]` of an example, equal within
        one length, goes before).
      stop: strings that end an answer (`info["stop"]` likewise).
      metric: what `value` is called.
      binary: its values are 0 or 1.

    Examples have info["answers"], a list of right answers, the first of which is the
    reference of `answer_loss`; info["depth"] gives columns and a heat map.
    """

    name: str = ""
    title: str = ""
    about: str = ""
    new_tokens: int = 32
    stop: tuple[str, ...] = ()
    metric: str = "accuracy"
    binary: bool = True
    whole_windows: bool = False

    def longest(self, settings: Settings) -> int:
        return max(settings.lengths)

    def examples(
        self, model: Model, settings: Settings, inputs: Inputs
    ) -> list[Example]:
        """All examples, those of one length together; prompt + new_tokens <= length."""
        raise NotImplementedError

    def value(self, prediction: Prediction) -> float:
        """What prediction["predicted"] is worth, 0 ... 1."""
        raise NotImplementedError

    def read(
        self, model: Model, method: Method, batch: Sequence[Example]
    ) -> tuple[MemoryState, Float[jax.Array, "B V"], list[int]]:
        """Memory and logits after the prompts, and the bytes kept of their past."""
        rows = [e.tokens for e in batch]
        memory, rest, kept = remember_prompts(model, method, rows)
        out, memory = model.feed(memory, rest, method.live_ratio)
        return memory, out.last_logits, kept

    def run(
        self, model: Model, method: Method, batch: Sequence[Example]
    ) -> list[dict[str, Any]]:
        info = batch[0].info
        count = info.get("new_tokens", self.new_tokens)
        memory, logits, kept = self.read(model, method, batch)
        wanted = [self._reference(model, e, count) for e in batch]
        losses = model.answer_losses(memory, logits, wanted, method.live_ratio)
        answers = model.decode(
            memory,
            logits,
            count,
            method.live_ratio,
            info.get("stop", self.stop),
        )
        return [
            {"predicted": text, "answer_loss": loss, "kv_bytes": held}
            for text, loss, held in zip(answers.texts, losses, kept, strict=True)
        ]

    def _reference(self, model: Model, example: Example, count: int) -> np.ndarray:
        """Tokens of the first right answer, as far as it may be long."""
        answer = example.info["answers"][0]
        found = prompts.ids(model.tokenizer, self.reference(answer))
        return found[:count]

    def reference(self, answer: str) -> str:
        """The text that a right answer would begin with, space and all."""
        return f" {answer}"

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Per method and length, per depth (if any) and over all (depth None)."""
        cells: dict[tuple[str, int, float | None], list[Prediction]] = {}
        for p in predictions:
            depths = {None, p.get("depth")}
            for depth in sorted(depths, key=lambda d: (d is not None, d)):
                cells.setdefault((p["method"], p["length"], depth), []).append(p)
        metrics = []
        for (method, length, depth), found in cells.items():
            base = {
                "task": self.name,
                "method": method,
                "ratio": found[0]["ratio"],
                "length": length,
                "depth": depth,
                "count": len(found),
                "kv_bytes": float(np.mean([p["kv_bytes"] for p in found])),
            }
            values = [self.value(p) for p in found]
            triple = self._interval(np.asarray(values, np.float64))
            metrics.append(base | {"metric": self.metric} | bounds(triple))
            if depth is None:
                losses = np.asarray([p["answer_loss"] for p in found])
                found_losses = bounds(mean_interval(losses))
                metrics.append(base | {"metric": "answer_loss"} | found_losses)
        return metrics

    def _interval(self, values: np.ndarray) -> tuple[float, float, float]:
        if not self.binary:
            return mean_interval(values)
        hits = int(values.sum())
        return hits / len(values), *wilson(hits, len(values))

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """One row per length and method."""
        scores = [m for m in metrics if m["metric"] == self.metric]
        losses = {
            (m["length"], m["method"]): m
            for m in metrics
            if m["metric"] == "answer_loss"
        }
        depths = sorted({m["depth"] for m in scores if m["depth"] is not None})
        cells = {(m["length"], m["method"], m["depth"]): m for m in scores}
        rows = []
        for m in sorted(scores, key=lambda m: m["length"]):
            if m["depth"] is not None:
                continue
            key = (m["length"], m["method"])
            found = [cells.get((*key, d)) for d in depths]
            rows.append(
                [
                    *key,
                    interval(m, 2),
                    *(f"{c['value']:.2f}" if c else "" for c in found),
                    f"{losses[key]['value']:.2f}" if key in losses else "–",
                    f"{m['kv_bytes']:,.0f}",
                    m["count"],
                ]
            )
        head = ["length", "method", self.metric, *(f"depth {d:g}" for d in depths)]
        head += ["answer loss", "KV bytes of past", "rows"]
        text = f"## {self.title}\n\n{self.about}\n\n{table(head, rows)}\n"
        if depths:
            plots.heat_maps(scores, folder / f"{self.name}.png", self.metric)
            text += f"\n![{self.metric} by length and depth]({self.name}.png)\n"
        return text


def bounds(triple: tuple[float, float, float]) -> dict[str, float]:
    """A number and its interval as the fields of a metric."""
    return dict(zip(("value", "low", "high"), triple, strict=True))
