"""Passkey retrieval: a 5-digit key in real text, answered greedily, exact match.

The needle always ends before the last window, so that only the memory can answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.data.passkey import make_passkey
from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.tasks import places
from beacon_jax.evaluation.tasks.base import Example, Metric, Prediction
from beacon_jax.evaluation.tasks.generation import Generation
from beacon_jax.evaluation.tasks.synthetic import grid


class Passkey(Generation):
    name = "passkey"
    title = "Passkey accuracy"
    about = (
        "Five digits, exact match, greedy, [95 % Wilson interval]; the needle is "
        "always outside the last window."
    )
    whole_windows = True

    def examples(
        self, model: Model, settings: Settings, inputs: Inputs
    ) -> list[Example]:
        """`samples` per length, their depths in turn; the answer ends at `length`."""
        depths = grid(settings.depths)
        return [
            self._example(model, settings, inputs, length, i, depths[i % len(depths)])
            for length in settings.lengths
            for i in range(settings.samples)
        ]

    def _example(
        self,
        model: Model,
        settings: Settings,
        inputs: Inputs,
        length: int,
        index: int,
        depth: float,
    ) -> Example:
        stream = inputs.stream
        if len(stream) < length:
            raise ValueError(
                f"--text={settings.text} has {len(stream)} held-out tokens, fewer than "
                f"the {length} of --lengths; use shorter ones, or more text."
            )
        rng = np.random.default_rng([settings.seed, length, index])
        start = int(rng.integers(0, len(stream) - length + 1))
        hay = stream[start : start + length]
        sample = make_passkey(rng, hay, length, depth, model.tokenizer, model.window)
        count = sample.answer[1] - sample.answer[0]
        key = str(sample.key)
        info: dict[str, Any] = {"depth": depth, "answers": [key], "new_tokens": count}
        start, stop = sample.mentions[1]
        if stop - start == len(key):  # a token per digit
            info["positions"] = list(range(start, stop))
        return Example(f"{length}/{index}", length, sample.tokens[:-count], info)

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Adds single digits of the second mention by place in a unit."""
        return super().score(predictions) + places.score(
            self.name, predictions, _digits
        )

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        text = super().report(metrics, folder)
        return text + places.report(metrics, folder, self.name)

    def value(self, prediction: Prediction) -> float:
        return float(prediction["predicted"] == prediction["answers"][0])

    def reference(self, answer: str) -> str:
        return answer  # the question ends with the space


def _digits(prediction: Prediction) -> list[int]:
    """Whether each digit of the key was answered."""
    key = prediction["answers"][0]
    told = prediction["predicted"].ljust(len(key))
    return [int(a == b) for a, b in zip(told, key, strict=False)]
