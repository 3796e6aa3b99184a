"""Perplexity by the release's protocol (`eval_lm.py`), of documents one by one.

A document is read in windows of up to `length` tokens that begin every `stride` tokens;
each starts from nothing, and only tokens that no earlier window scored are scored in
it. A document's loss is the mean over its scored tokens, and perplexity is exp of the
mean over documents: short ones weigh as much as long ones. bos, if the tokenizer has
one, stands in front of every window and counts.

What the release calls max_length is a length here, and its stride is half of it (in
whole windows of ours). For a model with beacons, its own window W of compression is
inside: the text is compressed W tokens by W tokens as it is read, and all of it is
scored, so that losses of tokens with little past are in the mean. (`perplexity` keeps
past and scored tokens apart.) Differences:
  * documents are cut after the fourth window;
  * documents shorter than the longest length are left out (release: --min_length), so
    that lengths are compared on the same documents;
  * `--samples` of them are drawn by the seed; the release takes the first 100.

Other methods compress all whole windows in front of each window anew: what they keep
then is what they would keep if the text ended there.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.core.loss import IGNORE
from beacon_jax.data.passkey import last_window_start
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Incremental, Method, remember
from beacon_jax.evaluation.reading import Rows, empty, losses
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.statistics import bounds, grouped, mean_interval
from beacon_jax.evaluation.tasks.base import Instance, Metric, Prediction, Task
from beacon_jax.evaluation.tasks.generation import about
from beacon_jax.evaluation.tasks.synthetic import draw_seed
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.tokenise import encode, front

PARTS = 4  # windows of a document
FILE, WHERE = "lm/pg19", "the release's data (namespace-Pt/projects, long-llm.tar.gz)"


class PerplexityRelease(Task):
    name = "perplexity_release"
    whole_windows = True

    def examples(
        self, model: Model, settings: RunSettings, inputs: TaskData
    ) -> list[Instance]:
        """The windows of the documents, for each length.

        The text is --data's lm/pg19 if it has one, else the held-out documents.

        Raises:
          ValueError: no document is long enough.
        """
        texts, origin = _texts(settings, inputs)
        longest = max(settings.lengths)
        most = longest + (PARTS - 1) * stride(longest, model.window)
        documents = _documents(model, texts, longest, most)
        if not documents:
            raise ValueError(
                f"{origin} has no document of {longest} tokens, which {self.name} "
                "needs: use shorter --lengths, or longer documents."
            )
        rng = np.random.default_rng(draw_seed(settings, self.name))
        count = min(settings.samples, len(documents))
        chosen = np.sort(rng.choice(len(documents), count, replace=False)).tolist()
        first = front(model.tokenizer)
        return [
            Instance(
                f"{length}/{d}/{start}",
                length,
                np.concatenate([first, documents[d][start:end]]),
                # The first token of a text without bos is predicted by nothing.
                {"document": d, "scored": max(len(first) + scored - start, 1)},
            )
            for length in settings.lengths
            for d, start, end, scored in _in_turn(
                {d: len(documents[d]) for d in chosen},
                length - len(first),
                stride(length, model.window),
            )
        ]

    def run(
        self, model: Model, method: Method, batch: Sequence[Instance]
    ) -> list[dict[str, Any]]:
        rows = [e.tokens[:-1] for e in batch]
        labels = [e.tokens[1:].copy() for e in batch]
        counts = []
        for row, example in zip(labels, batch, strict=True):
            row[: example.info["scored"] - 1] = IGNORE
            counts.append(int((row != IGNORE).sum()))
        if isinstance(method, Incremental):
            sums, kept = _read_on(model, method, rows, labels)
        else:
            sums, kept = _read_anew(model, method, rows, labels)
        return [
            {"loss": s / n, "tokens": n, "kv_bytes": held}
            for s, n, held in zip(sums, counts, kept, strict=True)
        ]

    def score(self, predictions: Sequence[Prediction]) -> list[Metric]:
        """Perplexity, and its logarithm as a detail; intervals over documents."""
        cells = grouped(predictions, lambda p: (p["method"], p["length"]))
        metrics = []
        for found in cells.values():
            rows = grouped(found, lambda p: p["document"]).values()
            sizes = [sum(p["tokens"] for p in row) for row in rows]
            sums = [sum(p["loss"] * p["tokens"] for p in row) for row in rows]
            triple = bounds(mean_interval(np.asarray(sums) / np.asarray(sizes)))
            base = about(self.name, found, tokens=sum(sizes)) | {"count": len(sizes)}
            powers = {name: math.exp(value) for name, value in triple.items()}
            metrics.append(base | {"metric": "perplexity"} | powers)
            metrics.append(base | {"metric": "loss", "detail": True} | triple)
        return metrics

    def report(self, metrics: Sequence[Metric], folder: Path) -> str:
        logs = {(m["length"], m["method"]): m for m in metrics if m["metric"] == "loss"}
        rows = [
            [
                m["length"],
                m["method"],
                interval(m, 2),
                interval(logs[m["length"], m["method"]], 3),
                f"{m['kv_bytes']:,.0f}",
                m["count"],
                m["tokens"],
            ]
            for m in sorted(metrics, key=lambda m: m["length"])
            if m["metric"] == "perplexity"
        ]
        head = ["length", "method", "perplexity", "loss, nats/token"]
        head += ["KV bytes of past", "documents", "tokens"]
        return (
            "## Perplexity by the release's protocol\n\nWindows of `length` tokens "
            "that begin every half of it; exp of the mean over documents of each one's "
            f"mean loss [95 % interval over documents].\n\n{table(head, rows)}\n"
        )


def stride(length: int, window: int) -> int:
    """Tokens between the beginnings of windows: half a length, in whole W."""
    return max(length // 2 // window, 1) * window


def parts(size: int, length: int, step: int) -> list[tuple[int, int, int]]:
    """Lists (start, end, first scored token) of a document's windows, at most PARTS."""
    found, scored = [], 0
    for start in range(0, PARTS * step, step):
        end = min(start + length, size)
        found.append((start, end, scored))
        scored = end
        if end == size:
            break
    return found


def _in_turn(
    sizes: dict[int, int], length: int, step: int
) -> list[tuple[int, int, int, int]]:
    """Lists (document, *part) of all documents: the first of each, the second, ...

    So --limit leaves windows of as many documents as it can.
    """
    found = [
        (d, *part) for d, size in sizes.items() for part in parts(size, length, step)
    ]
    return sorted(found, key=lambda part: (part[1], part[0]))


def _texts(settings: RunSettings, inputs: TaskData) -> tuple[list[str], str]:
    if settings.data:
        try:
            rows = inputs.rows(FILE, {"text": str}, WHERE)
        except FileNotFoundError:
            pass  # the held-out text will do
        else:
            return [row["text"] for row in rows], f"--data={settings.data}/{FILE}"
    return inputs.documents, f"--text={settings.text}"


def _documents(
    model: Model, texts: Sequence[str], least: int, most: int
) -> list[np.ndarray]:
    """The first `most` tokens of the documents that have `least` or more."""
    found = []
    for text in texts:
        # Cut before it is encoded: books have 0.5 MB. No token has 16 characters on
        # average; one that does only makes the document shorter.
        # Without the bos that each window begins with.
        tokens = encode(model.tokenizer, text[: 16 * most], "start")
        tokens = tokens[len(front(model.tokenizer)) :][:most]
        if len(tokens) >= least:
            found.append(tokens)
    return found


def _read_on(
    model: Model, method: Incremental, rows: Rows, labels: Rows
) -> tuple[np.ndarray, list[int]]:
    """Reads once: returns (summed losses, bytes in front of the last window)."""
    ratio, longest = method.live_ratio, method.longest
    memory = empty(model, len(rows), ratio, longest, method.dtype, method.recent)
    cuts = [last_window_start(len(row), model.window) for row in rows]
    ends = [len(row) for row in rows]
    past, memory = _read(model, method, memory, rows, labels, [0] * len(rows), cuts)
    kept = method.kv_bytes(memory)
    last, _ = _read(model, method, memory, rows, labels, cuts, ends)
    return past + last, kept


def _read_anew(
    model: Model, method: Method, rows: Rows, labels: Rows
) -> tuple[np.ndarray, list[int]]:
    """Does as `_read_on`, with a new memory for every window that has scored tokens."""
    w = model.window
    sums, kept = np.zeros(len(rows)), [0] * len(rows)
    for start in range(0, max(map(len, rows)), w):
        due = [
            i
            for i, row in enumerate(labels)
            if (row[start : start + w] != IGNORE).any()
        ]
        if not due:
            continue
        # Rows without scored tokens here repeat one that has some: shapes stay.
        used = [i if i in due else due[0] for i in range(len(rows))]
        some, wanted = [rows[i] for i in used], [labels[i] for i in used]
        past, following = (
            [r[a] for r in some] for a in (slice(start), slice(start, start + w))
        )
        memory, held = remember(model, method, past, following)
        starts = [start] * len(used)
        ends = [min(start + w, len(row)) for row in some]
        found, _ = _read(model, method, memory, some, wanted, starts, ends)
        for i in due:
            sums[i] += found[i]
            kept[i] = held[i]
    return sums, kept


def _read(
    model: Model,
    method: Method,
    memory: Memory,
    rows: Rows,
    labels: Rows,
    starts: Sequence[int],
    ends: Sequence[int],
) -> tuple[np.ndarray, Memory]:
    """Feeds a piece of each row: summed losses of its labels, and the memory."""
    cut = [slice(*pair) for pair in zip(starts, ends, strict=True)]
    given = [row[at] for row, at in zip(rows, cut, strict=True)]
    wanted = [row[at] for row, at in zip(labels, cut, strict=True)]
    if not max(map(len, given)):
        return np.zeros(len(rows)), memory
    found, memory = losses(
        model, memory, given, wanted, method.live_ratio, method.longest
    )
    sums = [found[i, : len(row)][row != IGNORE].sum() for i, row in enumerate(wanted)]
    return np.asarray(sums), memory
