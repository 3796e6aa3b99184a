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
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.report import interval, pivot
from beacon_jax.evaluation.tasks.base import Instance, Metric, Prediction
from beacon_jax.evaluation.tasks.generation import GenerationTask
from beacon_jax.inference.model import Model

WRAPPER = 256  # tokens of a chat template, and of what cutting a text in two changes


class OnFiles(GenerationTask):
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

    def info(self, row: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
        """`answers`, and what else the answer and its score depend on."""
        raise NotImplementedError

    def check(self, row: dict[str, Any]) -> str | None:
        """What is wrong with a row that has the fields, None if nothing is."""
        return None

    def length(self, settings: RunSettings) -> int:
        """Tokens that texts are cut to."""
        return settings.max_length

    def longest(self, settings: RunSettings) -> int:
        return self.length(settings) + self.new_tokens + WRAPPER

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        """The first `limit` rows, shortest first; ids are rows of the usable ones.

        Raises:
          FileNotFoundError, ValueError: no such file, or nothing usable in it.
        """
        rows = inputs.rows(self.file, self.fields, self.where, self.check)
        length = self.length(settings)
        examples = []
        for i, row in enumerate(rows[: settings.limit]):
            tokens = self._tokens(model, settings, self.prompt(row))
            examples.append(Instance(str(i), length, tokens, self.info(row, settings)))
        return sorted(examples, key=lambda e: (len(e.tokens), int(e.id)))

    def _tokens(self, model: Model, settings: RunSettings, text: str) -> np.ndarray:
        """The prompt, so short that the answer fits into `longest`."""
        room = self.longest(settings) - self.new_tokens
        chat = settings.chat if self.wrapped else "none"
        most = self.length(settings)
        while most > 0:
            cut = prompts.cut_middle(model.tokenizer, text, most)
            tokens = prompts.encode(model, cut, chat=chat)
            if len(tokens) <= room:
                return tokens
            most -= len(tokens) - room
        raise ValueError(
            f"--max_length={settings.max_length} leaves {self.name} no room beside the "
            "chat template: use a larger one, or --chat=none."
        )

    def cells(
        self, predictions: Sequence[Prediction]
    ) -> dict[tuple[str, int, float | None, str | None], list[Prediction]]:
        return dict(sorted(super().cells(predictions).items(), key=_natural))

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """One row per method, and a column for each part."""
        text = super().report(metrics, folder)
        parts = [m for m in metrics if m.get("detail")]
        if not parts:
            return text
        cell = functools.partial(interval, digits=2)
        return f"{text}\n{pivot(parts, ['method'], ['metric'], cell)}\n"


def _natural(cell: tuple[tuple[Any, ...], Any]) -> tuple[str, int, str]:
    """Sorts by method, all rows first, parts by the number in their names."""
    (method, _, _, part), _ = cell
    found = re.search(r"\d+", part or "")
    return method, int(found[0]) if part and found else -1, part or ""


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
