"""Multi-query associative recall in token space (Arora et al. 2023, Zoology).

Keys and values are single random tokens from disjoint thirds of the vocabulary, in
pairs that lie anywhere among random tokens of the last third, on average one pair in 16
tokens; at the end, keys are given again and their values asked for. What the compressor
has to store is known exactly, and where: accuracy by the place of the value in its unit
(of `ratio` tokens, a beacon behind the last) shows what units lose by their far ends.

Eight queries per text, each answered with the right values of those before in view (as
in training on such data). Pairs lie outside the window that is open at the first query,
so that only the memory can answer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from beacon_jax.data.passkey import last_window_start
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Method, remember
from beacon_jax.evaluation.reading import nats, read
from beacon_jax.evaluation.tasks.base import Instance, Prediction
from beacon_jax.evaluation.tasks.places import ByPlace
from beacon_jax.evaluation.tasks.synthetic import Draw, Drawn
from beacon_jax.inference.finite import check_finite
from beacon_jax.inference.model import Model
from beacon_jax.tokenise import front

QUERIES = 8
EVERY = 16  # tokens per pair


class Vocabulary(NamedTuple):
    """Token ids of the three kinds; first: what the tokenizer puts in front of text."""

    keys: np.ndarray
    values: np.ndarray
    fillers: np.ndarray
    first: np.ndarray


class Mqar(ByPlace):
    name = "mqar"
    title = "Multi-query associative recall"
    about = (
        f"Right values of {QUERIES} keys per text, greedy [95 % bootstrap interval "
        "over texts]."
    )
    whole_windows = True
    binary = False

    def source(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> Vocabulary:
        """Finds the ordinary tokens that occur in the held-out text.

        A model may never have been trained on others. In order of their ids, the first
        third are keys.
        """
        special = getattr(model.tokenizer, "all_special_ids", [])
        seen = np.setdiff1d(np.unique(inputs.stream), special)
        thirds = np.array_split(seen.astype(np.int32), 3)
        if len(thirds[2]) < QUERIES:
            raise ValueError(
                f"--text={settings.text} has {len(seen)} different tokens, and "
                f"{3 * QUERIES} are needed: name a source with more text."
            )
        keys, values, fillers = thirds
        return Vocabulary(keys, values, fillers, front(model.tokenizer))

    def example(self, draw: Draw) -> Drawn:
        """Draws an example; its tokens have the last value too, which is never fed."""
        rng, model, _, source, length, _ = draw
        first = source.first
        end = (length - 2 * QUERIES) // model.window * model.window
        room = end - len(first)
        count = min(room // EVERY, len(source.keys), len(source.values))
        queries = min(QUERIES, count)
        if not count:
            raise ValueError(
                f"--lengths has {length}, too few tokens for {self.name} in windows of "
                f"{model.window}: use at least {2 * model.window + 2 * QUERIES}."
            )
        keys = rng.choice(source.keys, count, replace=False)
        values = rng.choice(source.values, count, replace=False)
        each = room // count
        at = len(first) + each * np.arange(count) + rng.integers(0, each - 1, count)
        at += int(rng.integers(room - each * count + 1))
        tokens = np.empty(length, np.int32)
        tokens[:] = rng.choice(source.fillers, length)
        tokens[: len(first)] = first
        tokens[at], tokens[at + 1] = keys, values
        asked = rng.choice(count, queries, replace=False)
        tokens[length - 2 * queries :: 2] = keys[asked]
        tokens[length - 2 * queries + 1 :: 2] = values[asked]
        return tokens, {"pairs": count, "positions": (at[asked] + 1).tolist()}

    def further(self, model: Model, example: Instance) -> list[np.ndarray]:
        return []  # the answers are tokens of the example

    def run(
        self, model: Model, method: Method, batch: Sequence[Any]
    ) -> list[dict[str, Any]]:
        queries = len(batch[0].info["positions"])
        rows = np.stack([e.tokens for e in batch])
        first = rows.shape[1] - 2 * queries + 1  # behind the first key
        cut = last_window_start(first, model.window)
        past, following = list(rows[:, :cut]), list(rows[:, cut:first])
        memory, kept = remember(model, method, past, following)
        hits, losses = [], []
        for end in range(first, rows.shape[1], 2):
            # Piece by piece: only the logits of the ends are ever made.
            logits, memory = read(model, following, method.live_ratio, memory)
            hits.append(logits.argmax(-1) == jnp.asarray(rows[:, end]))
            losses.append(nats(logits, rows[:, end]))
            following = list(rows[:, end : end + 2])
        right = np.asarray(jnp.stack(hits, 1), int).tolist()
        lost = np.asarray(jnp.stack(losses, 1), np.float64)
        check_finite(np.isfinite(lost), "losses", model.net.dtype.name)
        return [
            {"hits": h, "answer_loss": loss, "kv_bytes": n}
            for h, loss, n in zip(right, lost.mean(1).tolist(), kept, strict=True)
        ]

    def value(self, prediction: Prediction) -> float:
        return float(np.mean(prediction["hits"]))

    def recalled(self, prediction: Prediction) -> list[int]:
        return prediction["hits"]
