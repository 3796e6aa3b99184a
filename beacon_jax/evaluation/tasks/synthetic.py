"""The base of the offline tasks: drawn examples on a grid of lengths and depths."""

import zlib
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.tasks.base import Instance
from beacon_jax.evaluation.tasks.generation import GenerationTask
from beacon_jax.inference.model import Model

type Drawn = tuple[np.ndarray, dict[str, Any]]  # a prompt, and info


class Draw(NamedTuple):
    """Inputs that one example is made from.

    Attributes:
      source: what all examples of a run share (`Synthetic.source`).
      length: most tokens of the prompt and the answer.
    """

    rng: np.random.Generator
    model: Model
    settings: RunSettings
    source: Any
    length: int
    depth: float

    def ask(self, text: str, prefix: str) -> prompts.Tokens:
        """The prompt of a text whose answer begins with `prefix` (`prompts.ask`)."""
        return prompts.ask(self.model, text, prefix, self.settings.chat)


class Synthetic(GenerationTask):
    """Makes `samples` examples per length, their depths in turn.

    Each is drawn from its own generator: seed, task, length and number decide it,
    whatever else is run.
    """

    def source(self, model: Model, settings: RunSettings, inputs: TaskData) -> Any:
        """What all examples share, such as a haystack."""
        return None

    def example(self, draw: Draw) -> Drawn:
        """Makes (prompt, info) with prompt + new_tokens <= length."""
        raise NotImplementedError

    def seed(self, settings: RunSettings, length: int, number: int) -> list[int]:
        """Seeds the generator of one example."""
        return draw_seed(settings, self.name, length, number)

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        source = self.source(model, settings, inputs)
        depths = grid(settings.depths)
        found = []
        for length in settings.lengths:
            for i in range(min(settings.samples, settings.limit or settings.samples)):
                rng = np.random.default_rng(self.seed(settings, length, i))
                depth = depths[i % len(depths)]
                made = self.example(Draw(rng, model, settings, source, length, depth))
                found.append(Instance(f"{length}/{i}", length, *made))
        return found


def grid(count: int) -> list[float]:
    """Depths, evenly from 0 to 1; a single one is the middle."""
    return np.linspace(0.0, 1.0, count).round(4).tolist() if count > 1 else [0.5]


def draw_seed(settings: RunSettings, name: str, *numbers: int) -> list[int]:
    return [settings.seed, zlib.crc32(name.encode()), *numbers]
