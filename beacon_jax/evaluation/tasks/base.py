"""What the runner asks of a task, and what it hands to it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Method
from beacon_jax.inference.model import Model

__all__ = ["Instance", "Metric", "Prediction", "RunSettings", "Task", "TaskData"]

# One number: task, metric, method, ratio, length, value, low, high (95 %), count and
# whatever else the task's table is indexed by (depth, ...). JSON values only.
Metric = dict[str, Any]
# One answer: id, length, method, ratio (the runner's) and what `run` returned.
Prediction = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Instance:
    """One question. Examples of one batch have the same `length`.

    id: unique within the task. length: tokens that were asked for. tokens: int32 [n],
      n <= length, or what the task needs. info: copied into the prediction (JSON
      values).
    """

    id: str
    length: int
    tokens: np.ndarray
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task:
    """A benchmark: pure functions of their arguments, so that a run can resume.

    Attributes:
      name: in --tasks and in file names.
      whole_windows: its lengths are multiples of the window.
    """

    name: str = ""
    whole_windows: bool = False

    def longest(self, settings: RunSettings) -> int:
        """Tokens of the longest example, answer included."""
        return max(settings.lengths)

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        """Makes all examples, those of one length together."""
        raise NotImplementedError

    def further(self, model: Model, example: Instance) -> list[np.ndarray]:
        """Token ids that a run needs besides the example's: right answers, say."""
        return []

    def run(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> list[dict[str, Any]]:
        """Answers a batch; `kv_bytes` are the bytes of each row's past.

        `seconds`, if there, is taken out: times are kept apart from predictions, which
        are the same in every run.
        """
        raise NotImplementedError

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Computes numbers with intervals from the predictions of all methods."""
        raise NotImplementedError

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """Writes this task's section of report.md; its plots go to `folder`."""
        raise NotImplementedError
