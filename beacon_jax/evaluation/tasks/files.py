"""The base of tasks on the user's data: rows to prompts, one score over all rows."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.statistics import mean_interval
from beacon_jax.evaluation.tasks.base import Example, Metric, Prediction
from beacon_jax.evaluation.tasks.generation import Generation, bounds

WRAPPER = 256  # tokens of a chat template, and of what cutting a text in two changes


class OnFiles(Generation):
    """A task whose examples are the rows of a file in --data.

    Rows are asked in the order of their tokens, so that those of a batch are alike
    (a batch costs what its longest row does). All have one `length`, --max_length,
    since their own says nothing about the task: the report has one line per method.

    Attributes:
      file: in --data, without its ending. where: who publishes it.
      fields: that a row must have, and their types.
      wrapped: whether questions are put into the chat template (--chat).
    """

    file: str = ""
    where: str = ""
    fields: dict[str, type | tuple[type, ...]]
    wrapped: bool = True
    binary = False

    def prompt(self, row: dict[str, Any]) -> str:
        """What is asked, before it is cut to --max_length and wrapped."""
        raise NotImplementedError

    def info(self, row: dict[str, Any], settings: Settings) -> dict[str, Any]:
        """`answers`, and what else the answer and its score depend on."""
        raise NotImplementedError

    def check(self, row: dict[str, Any]) -> str | None:
        """What is wrong with a row that has the fields, None if nothing is."""
        return None

    def length(self, settings: Settings) -> int:
        """Tokens that texts are cut to."""
        return settings.max_length

    def longest(self, settings: Settings) -> int:
        return self.length(settings) + self.new_tokens + WRAPPER

    def examples(
        self, model: Model, settings: Settings, inputs: Inputs
    ) -> list[Example]:
        """The first `limit` rows, shortest first; ids are rows of the usable ones.

        Raises:
          FileNotFoundError, ValueError: no such file, or nothing usable in it.
        """
        rows = inputs.rows(self.file, self.fields, self.where, self.check)
        length = self.length(settings)
        examples = []
        for i, row in enumerate(rows[: settings.limit]):
            tokens = self._tokens(model, settings, self.prompt(row))
            examples.append(Example(str(i), length, tokens, self.info(row, settings)))
        return sorted(examples, key=lambda e: (len(e.tokens), int(e.id)))

    def _tokens(self, model: Model, settings: Settings, text: str) -> np.ndarray:
        """The prompt, so short that the answer fits into `longest`."""
        room = self.longest(settings) - self.new_tokens
        chat = settings.chat if self.wrapped else "none"
        most = self.length(settings)
        while most > 0:
            cut = cut_middle(model.tokenizer, text, most)
            tokens = prompts.encode(model, cut, chat=chat)
            if len(tokens) <= room:
                return tokens
            most -= len(tokens) - room
        raise ValueError(
            f"--max_length={settings.max_length} leaves {self.name} no room beside the "
            "chat template: use a larger one, or --chat=none."
        )

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """The mean over all rows, and one more number for each part of them."""
        cells: dict[tuple[str, str | None], list[Prediction]] = {}
        for p in predictions:
            for part in {None, self.part(p)}:
                cells.setdefault((p["method"], part), []).append(p)
        metrics = []
        for (method, part), found in sorted(cells.items(), key=_natural):
            base = {
                "task": self.name,
                "method": method,
                "ratio": found[0]["ratio"],
                "length": found[0]["length"],
                "depth": None,
                "count": len(found),
                "kv_bytes": float(np.mean([p["kv_bytes"] for p in found])),
            }
            name = self.metric if part is None else f"{self.metric}, {part}"
            values = np.asarray([self.value(p) for p in found], np.float64)
            triple = self._interval(values * self.weights(found))
            detail = {} if part is None else {"detail": True}
            metrics.append(base | {"metric": name} | detail | bounds(triple))
            if part is None:
                losses = np.asarray([p["answer_loss"] for p in found])
                triple = mean_interval(losses)
                metrics.append(base | {"metric": "answer_loss"} | bounds(triple))
        return metrics

    def weights(self, found: Sequence[Prediction]) -> np.ndarray:
        """What each row counts in a mean: 1 on average, 1 each if `binary`."""
        return np.ones(len(found))

    def part(self, prediction: Prediction) -> str | None:
        """Which part of the data a row belongs to, if parts are reported."""
        return None

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """One row per method, and a column for each part."""
        text = super().report(metrics, folder)
        parts = [m for m in metrics if m.get("detail")]
        if not parts:
            return text
        names = list(dict.fromkeys(m["metric"] for m in parts))
        cells = {(m["method"], m["metric"]): m for m in parts}
        rows = [
            [method, *(interval(cells.get((method, name)), 2) for name in names)]
            for method in dict.fromkeys(m["method"] for m in parts)
        ]
        return f"{text}\n{table(['method', *names], rows)}\n"


def _natural(cell: tuple[tuple[str, str | None], Any]) -> tuple[str, int, str]:
    """Sorts by method, all rows first, parts by the number in their names."""
    (method, part), _ = cell
    found = re.search(r"\d+", part or "")
    return method, int(found[0]) if part and found else -1, part or ""


def cut_middle(tokenizer: Any, text: str, most: int) -> str:
    """The text, or the text of its first and last most // 2 tokens if it has more.

    LongBench's: the middle goes, since beginnings and ends hold instructions. The two
    halves can come out a few tokens longer or shorter once joined.
    """
    found = prompts.ids(tokenizer, text, special=True)
    if len(found) <= most:
        return text
    half = most // 2
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return decode(found[:half].tolist()) + decode(found[len(found) - half :].tolist())


@functools.cache
def templates(name: str) -> tuple[dict[str, str], dict[str, int]]:
    """Prompts and numbers of new tokens of a benchmark, by task."""
    file = resources.files("beacon_jax.evaluation") / "data" / f"{name}_prompts.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    return found["prompts"], found["new_tokens"]


def best(
    score: Callable[[str, str], float], prediction: str, answers: Sequence[str]
) -> float:
    """The score against the answer that is closest."""
    return max((score(prediction, answer) for answer in answers), default=0.0)
