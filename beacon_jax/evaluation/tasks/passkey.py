"""Passkey retrieval: a 5-digit key in real text, answered greedily, exact match.

The needle always ends before the last window, so that only the memory can answer.
"""

import numpy as np

from beacon_jax.data.passkey import make_passkey
from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.tasks.base import Example, Prediction
from beacon_jax.evaluation.tasks.generation import Generation


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
        depths = np.linspace(0.0, 1.0, settings.depths).round(4).tolist()
        if settings.depths == 1:
            depths = [0.5]
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
        info = {"depth": depth, "answers": [str(sample.key)], "new_tokens": count}
        return Example(f"{length}/{index}", length, sample.tokens[:-count], info)

    def value(self, prediction: Prediction) -> float:
        return float(prediction["predicted"] == prediction["answers"][0])

    def reference(self, answer: str) -> str:
        return answer  # the question ends with the space
