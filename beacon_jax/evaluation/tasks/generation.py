"""The base of tasks that ask for text: run, scored and reported here.

A task says how its prompts look and what an answer is worth; everything else is the
same for all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from beacon_jax.evaluation import plots
from beacon_jax.evaluation.methods import Method, remember_prompts
from beacon_jax.evaluation.reading import answer, answer_losses, read
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.statistics import (
    Triple,
    bounds,
    grouped,
    mean_interval,
    share,
)
from beacon_jax.evaluation.tasks.base import Instance, Metric, Prediction, Task
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.tokenise import encode


class GenerationTask(Task):
    """A task whose answers are generated greedily.

    Attributes:
      title: heading of its section in the report; about: what is measured, in a line.
      new_tokens: at most in an answer (`info["new_tokens"]` of an example, equal within
        one length, goes before).
      stop: strings that end an answer (`info["stop"]` likewise).
      metric: what `value` is called.
      binary: its values are 0 or 1.
      lead: what a right answer begins with.
      columns: of `details` that stand in the table of the report, with their heads.

    Examples have prompt + new_tokens <= length, and info["answers"], a list of right
    answers, the first of which is the reference of `answer_loss`; info["depth"] gives
    columns and a heat map.
    """

    title: str = ""
    about: str = ""
    new_tokens: int = 32
    stop: tuple[str, ...] = ()
    metric: str = "accuracy"
    binary: bool = True
    lead: str = " "
    columns: Mapping[str, str] = MappingProxyType({})

    def value(self, prediction: Prediction) -> float:
        """What prediction["predicted"] is worth, 0 ... 1."""
        raise NotImplementedError

    def read(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> tuple[Memory, Float[jax.Array, "B V"], list[int]]:
        """Memory and logits after the prompts, and the bytes kept of their past."""
        rows = [e.tokens for e in batch]
        memory, rest, kept = remember_prompts(model, method, rows)
        logits, memory = read(model, rest, method.live_ratio, memory)
        return memory, logits, kept

    def further(self, model: Model, example: Instance) -> list[np.ndarray]:
        count = example.info.get("new_tokens", self.new_tokens)
        return [self._reference(model, example, count)]

    def run(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> list[dict[str, Any]]:
        info = batch[0].info
        count = info.get("new_tokens", self.new_tokens)
        memory, logits, kept = self.read(model, method, batch)
        wanted = [self._reference(model, e, count) for e in batch]
        ratio, stop = method.live_ratio, info.get("stop", self.stop)
        losses = answer_losses(model, memory, logits, wanted, ratio)
        answers = answer(model, memory, logits, count, ratio, stop)
        return [
            {"predicted": text, "answer_loss": loss, "kv_bytes": held}
            for text, loss, held in zip(answers.texts, losses, kept, strict=True)
        ]

    def _reference(self, model: Model, example: Instance, count: int) -> np.ndarray:
        """Tokens of the first right answer, as far as it may be long."""
        answer, last = example.info["answers"][0], int(example.tokens[-1])
        found = encode(model.tokenizer, self.lead + answer, "behind", last)
        return found[:count]

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Per method and length over all rows, at each depth and of each part.

        All rows together have the answers' loss and `details` too.
        """
        metrics, details = [], []
        for key, found in self.cells(predictions).items():
            _, _, depth, part = key
            base = about(self.name, found, depth=depth)
            values = np.asarray([self.value(p) for p in found], np.float64)
            values *= self.weights(found)
            number = bounds(share(values) if self.binary else mean_interval(values))
            if part is not None:
                name = {"metric": f"{self.metric}, {part}", "detail": True}
                metrics.append(base | name | number)
                continue
            metrics.append(base | {"metric": self.metric} | number)
            if depth is None:
                losses = np.asarray([p["answer_loss"] for p in found])
                losses = bounds(mean_interval(losses))
                metrics.append(base | {"metric": "answer_loss"} | losses)
                for name, triple in self.details(found).items():
                    name = {"metric": name, "detail": True}
                    details.append(base | name | bounds(triple))
        return metrics + details

    def cells(
        self, predictions: Sequence[Prediction]
    ) -> dict[tuple[str, int, float | None, str | None], list[Prediction]]:
        """Groups predictions by method, length, depth and part; None: all of them."""
        pairs = [
            ((p["method"], p["length"], *rest), p)
            for p in predictions
            for rest in dict.fromkeys(
                [(None, None), (p.get("depth"), None), (None, self.part(p))]
            )
        ]
        cells = grouped(pairs, lambda pair: pair[0])
        return {key: [p for _, p in found] for key, found in cells.items()}

    def part(self, prediction: Prediction) -> str | None:
        """Which part of the data a row belongs to, if parts are reported."""
        return None

    def weights(self, found: Sequence[Prediction]) -> np.ndarray:
        """What each row counts in a mean: 1 on average, 1 each if `binary`."""
        return np.ones(len(found))

    def details(self, found: Sequence[Prediction]) -> dict[str, Triple]:
        """More numbers of one method and length, by the names of their metrics."""
        return {}

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """One row per length and method."""
        scores = [m for m in metrics if m["metric"] == self.metric]
        others = {(m["length"], m["method"], m["metric"]): m for m in metrics}
        depths = sorted({m["depth"] for m in scores if m["depth"] is not None})
        cells = {(m["length"], m["method"], m["depth"]): m for m in scores}
        rows = []
        for m in sorted(scores, key=lambda m: m["length"]):
            if m["depth"] is not None:
                continue
            key = (m["length"], m["method"])
            found = [cells.get((*key, d)) for d in depths]
            loss = others.get((*key, "answer_loss"))
            rows.append(
                [
                    *key,
                    interval(m, 2),
                    *(f"{c['value']:.2f}" if c else "" for c in found),
                    *(interval(others.get((*key, name)), 2) for name in self.columns),
                    f"{loss['value']:.2f}" if loss else "–",
                    f"{m['kv_bytes']:,.0f}",
                    m["count"],
                ]
            )
        head = ["length", "method", self.metric, *(f"depth {d:g}" for d in depths)]
        head += [*self.columns.values(), "answer loss", "KV bytes of past", "rows"]
        text = f"## {self.title}\n\n{self.about}\n\n{table(head, rows)}\n"
        if depths:
            plots.heat_maps(scores, folder / f"{self.name}.png", self.metric)
            text += f"\n![{self.metric} by length and depth]({self.name}.png)\n"
        return text


def about(task: str, found: Sequence[Prediction], **more: Any) -> Metric:
    """What the metrics of predictions of one method and length begin with."""
    return {
        "task": task,
        "method": found[0]["method"],
        "ratio": found[0]["ratio"],
        "length": found[0]["length"],
        **more,
        "count": len(found),
        "kv_bytes": float(np.mean([p["kv_bytes"] for p in found])),
    }
