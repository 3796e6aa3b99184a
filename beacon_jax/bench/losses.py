"""Losses of held-out text behind memories that were made in different ways."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float

from beacon_jax.bench.records import Row
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.reading import Rows, load_model
from beacon_jax.evaluation.tasks.perplexity import Perplexity
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model


def define_flags(batch_size: int, out: str) -> None:
    """Defines the flags of a script that compares memories, with these defaults."""
    flags.DEFINE_string("model", "assets/tiny-beacon", "Folder or GGUF file.")
    flags.DEFINE_list("ratios", ["2", "4", "8"], "Raw tokens per beacon.")
    flags.DEFINE_integer("samples", 256, "Texts.")
    flags.DEFINE_integer("batch_size", batch_size, "Texts at a time.")
    flags.DEFINE_string("out", out, "Folder of the results.")


def held_out(
    path: str,
    ratios: Sequence[int],
    samples: int,
    past: int,
    dtype: str | None = None,
) -> tuple[Model, list[np.ndarray]]:
    """Loads a model, and texts of at least `past` tokens and a window to predict."""
    model = load_model(path, ratios, dtype=dtype)
    length = -(-past // model.window) * model.window + model.window
    settings = RunSettings(lengths=(length,), samples=samples)
    inputs = TaskData(settings, model.tokenizer)
    return model, [e.tokens for e in Perplexity().examples(model, settings, inputs)]


def remember(model: Model, texts: Rows, ratio: int, dtype: Any = None) -> Memory:
    """Compresses texts of one length, read from their starts.

    Args:
      dtype: of keys and values; None: that of the model.
    """
    return reading.read(model, texts, ratio, dtype=dtype)[1]


def losses(
    model: Model, memory: Memory, rows: Rows, ratio: int
) -> Float[np.ndarray, " B"]:
    """Returns the mean loss of each row's tokens but the first, behind a memory."""
    given, labels = [row[:-1] for row in rows], [row[1:] for row in rows]
    found, _ = reading.losses(model, memory, given, labels, ratio)
    return found[:, : len(rows[0]) - 1].mean(1)


def compare(
    model: Model,
    texts: Rows,
    ratio: int,
    batch: int,
    end: int,
    memories: Callable[[Rows], dict[str, Memory]],
) -> tuple[dict[str, Float[np.ndarray, " N"]], dict[str, Memory]]:
    """Predicts the end of every text behind each of several memories of its start.

    Args:
      batch: texts at a time.
      end: place in a text where what is predicted begins.
      memories: makes them, by name, from texts without their ends.

    Returns:
      The losses of all texts by the memory's name, and the last batch's memories.
    """
    found: dict[str, list[np.ndarray]] = {}
    made: dict[str, Memory] = {}
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch]
        made = memories([row[:end] for row in rows])
        last = [row[end:] for row in rows]
        for name, memory in made.items():
            found.setdefault(name, []).append(losses(model, memory, last, ratio))
    return {name: np.concatenate(values) for name, values in found.items()}, made


def triple(values: tuple[float, float, float]) -> Row:
    """Names a value and the ends of its interval."""
    return dict(zip(("value", "low", "high"), values, strict=True))
