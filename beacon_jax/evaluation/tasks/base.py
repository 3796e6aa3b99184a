"""What the runner asks of a task, and what it hands to it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.methods import Method
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.settings import Settings

__all__ = ["Example", "Inputs", "Metric", "Prediction", "Settings", "Task"]

# One number: task, metric, method, ratio, length, value, low, high (95 %), count and
# whatever else the task's table is indexed by (depth, ...). JSON values only.
Metric = dict[str, Any]
# One answer: id, length, method, ratio (the runner's) and what `run` returned.
Prediction = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question. Examples of one batch have the same `length`.

    id: unique within the task. length: tokens that were asked for. tokens: int32 [n],
      n <= length, or what the task needs. info: copied into the prediction (JSON
      values).
    """

    id: str
    length: int
    tokens: np.ndarray
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """A benchmark: pure functions of their arguments, so that a run can resume."""

    name: str
    whole_windows: bool  # its lengths are multiples of the window

    def longest(self, settings: Settings) -> int:
        """Tokens of the longest example, answer included."""
        ...

    def examples(
        self, model: Model, settings: Settings, inputs: Inputs
    ) -> list[Example]:
        """Makes all examples, those of one length together."""
        ...

    def run(
        self, model: Model, method: Method, batch: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """Answers a batch; `kv_bytes` are the bytes of each row's past.

        `seconds`, if there, is taken out: times are kept apart from predictions, which
        are the same in every run.
        """
        ...

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Computes numbers with intervals from the predictions of all methods."""
        ...

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """Writes this task's section of report.md; its plots go to `folder`."""
        ...
