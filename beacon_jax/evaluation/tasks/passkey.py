"""Passkey retrieval: a 5-digit key in real text, answered greedily, exact match.

The needle always ends before the last window, so that only the memory can answer.
"""

from typing import Any

from beacon_jax.data.passkey import make_passkey
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.tasks.base import Prediction
from beacon_jax.evaluation.tasks.places import ByPlace
from beacon_jax.evaluation.tasks.synthetic import Draw, Drawn
from beacon_jax.inference.model import Model


class PasskeyRetrieval(ByPlace):
    name = "passkey"
    title = "Passkey accuracy"
    about = (
        "Five digits, exact match, greedy, [95 % Wilson interval]; the needle is "
        "always outside the last window."
    )
    whole_windows = True
    lead = ""  # the question ends with the space

    def source(self, model: Model, settings: RunSettings, inputs: TaskData) -> Any:
        stream = inputs.stream
        for length in settings.lengths:
            if len(stream) < length:
                raise ValueError(
                    f"--text={settings.text} has {len(stream)} held-out tokens, fewer "
                    f"than the {length} of --lengths; use shorter ones, or more text."
                )
        return stream

    def seed(self, settings: RunSettings, length: int, number: int) -> list[int]:
        return [settings.seed, length, number]

    def example(self, draw: Draw) -> Drawn:
        """The answer ends at `length`."""
        rng, model, _, stream, length, depth = draw
        start = int(rng.integers(0, len(stream) - length + 1))
        hay = stream[start : start + length]
        sample = make_passkey(rng, hay, length, depth, model.tokenizer, model.window)
        count = sample.answer[1] - sample.answer[0]
        key = str(sample.key)
        info: dict[str, Any] = {"depth": depth, "answers": [key], "new_tokens": count}
        start, stop = sample.mentions[1]
        if stop - start == len(key):  # a token per digit
            info["positions"] = list(range(start, stop))
        return sample.tokens[:-count], info

    def value(self, prediction: Prediction) -> float:
        return float(prediction["predicted"] == prediction["answers"][0])

    def recalled(self, prediction: Prediction) -> list[int]:
        """Whether each digit of the second mention was answered."""
        key = prediction["answers"][0]
        told = prediction["predicted"].ljust(len(key))
        return [int(a == b) for a, b in zip(told, key, strict=False)]
