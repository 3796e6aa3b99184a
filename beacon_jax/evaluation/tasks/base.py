"""What the runner asks of a task, and what it hands to it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from beacon_jax.evaluation.methods import Method, Model

# One number: task, metric, method, ratio, length, value, low, high (95 %), count and
# whatever else the task's table is indexed by (depth, ...). JSON values only.
Metric = dict[str, Any]
# One answer: id, length, method, ratio (the runner's) and what `run` returned.
Prediction = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides every example and every prediction, besides model and method.

    lengths: raw tokens of an example; multiples of the window, above one window.
    samples: examples per length. depths: places of the needle, evenly over [0, 1].
    text: source of held-out text (data.text). limit: only so many examples per task.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: int = 5
    samples: int = 128
    text: str = "stdlib"
    seed: int = 0
    limit: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be >= 1.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit={self.limit} must be >= 1; leave it out.")
        if not self.lengths:
            raise ValueError("--lengths is empty: give for example 256,512,1024.")


@dataclasses.dataclass(frozen=True)
class Example:
    """One question. Examples of one batch have the same `length`.

    id: unique within the task. tokens: int32 [length] or what the task needs.
    info: copied into the prediction (JSON values).
    """

    id: str
    length: int
    tokens: np.ndarray
    info: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """A benchmark: pure functions of their arguments, so that a run can resume."""

    name: str

    def examples(
        self, model: Model, settings: Settings, stream: np.ndarray
    ) -> list[Example]:
        """All examples, those of one length together; `stream`: held-out tokens [n]."""
        ...

    def run(
        self, model: Model, method: Method, batch: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """The answers of a batch, incl. `kv_bytes`, the past's bytes of each row."""
        ...

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Numbers with intervals, from the predictions of all methods."""
        ...

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        """This task's section of report.md; its plots go to `folder`."""
        ...
