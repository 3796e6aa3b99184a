"""The base of the offline tasks: drawn examples on a grid of lengths and depths."""

import zlib
from typing import Any

import numpy as np

from beacon_jax.evaluation.inputs import Inputs
from beacon_jax.evaluation.model import Model
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.tasks.base import Example
from beacon_jax.evaluation.tasks.generation import Generation


class Synthetic(Generation):
    """Makes `samples` examples per length, their depths in turn.

    Each is drawn from its own generator: seed, task, length and number decide it,
    whatever else is run.
    """

    def source(self, model: Model, settings: Settings, inputs: Inputs) -> Any:
        """What all examples share, such as a haystack."""
        return None

    def example(
        self,
        rng: np.random.Generator,
        model: Model,
        settings: Settings,
        source: Any,
        length: int,
        depth: float,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Makes (prompt, info) with prompt + new_tokens <= length."""
        raise NotImplementedError

    def examples(
        self, model: Model, settings: Settings, inputs: Inputs
    ) -> list[Example]:
        source = self.source(model, settings, inputs)
        depths = grid(settings.depths)
        found = []
        for length in settings.lengths:
            for i in range(min(settings.samples, settings.limit or settings.samples)):
                rng = np.random.default_rng(draw_seed(settings, self.name, length, i))
                depth = depths[i % len(depths)]
                made = self.example(rng, model, settings, source, length, depth)
                found.append(Example(f"{length}/{i}", length, *made))
        return found


def grid(count: int) -> list[float]:
    """Depths, evenly from 0 to 1; a single one is the middle."""
    return np.linspace(0.0, 1.0, count).round(4).tolist() if count > 1 else [0.5]


def draw_seed(settings: Settings, name: str, *numbers: int) -> list[int]:
    return [settings.seed, zlib.crc32(name.encode()), *numbers]
