"""Batches of whole examples, grouped by their number of windows.

An example of n tokens has ceil(n / W) windows. The group decides what is in a batch:
  strict   rows of one number of windows. Rows are shuffled, sorted by that number
           (stable) and cut into batches. What is left of a number when it changes is
           left out. Then the batches are shuffled. This is the release's
           StrideGroupedSampler (docs/evaluation-protocols.md section 4.1), its order
           included: `random.seed(seed)` before it gives the batches of epoch 0.
  relaxed  the same, but a batch may hold rows of several numbers; only the last,
           incomplete batch is left out (the release keeps it).
  pad      the same as relaxed, but the incomplete batch is filled with empty rows:
           every row is used.
Rows are aligned at their last windows, which makes mixed batches right
(docs/specification.md section 3).

The whole order is drawn from (seed, epoch) and the lengths alone, so that it is the
same on any number of processes and devices. Batch i needs no batch before it: the data
position of a run is its step.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax.data.examples import IGNORED, shift
from beacon_jax.data.prepared import Prepared
from beacon_jax.names import check_choice

GROUPS = ("strict", "relaxed", "pad")
EMPTY = -1  # a row without an example


@dataclass(frozen=True)
class GroupConfig:
    """The settings of `GroupedBatches`.

    Attributes:
      window: tokens of a window; 0: rows are not grouped (one window each).
      batch_size: rows of a step, of all devices together.
      weights: a number per source, its share among the rows; (): every row once.
      epochs, steps, tokens: limits of the run, which ends at the first that is reached;
        0: no such limit.
    """

    window: int
    batch_size: int
    group: str = "strict"
    seed: int = 0
    weights: tuple[float, ...] = ()
    epochs: int = 1
    steps: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, config: Any) -> "GroupConfig":
        """Makes the settings from a whole config (`training.config`)."""
        data = config.data
        same = ("batch_size", "group", "epochs", "steps")
        return cls(
            window=config.beacon.window if config.beacon.use else config.window,
            seed=config.seed,
            weights=tuple(data.weights),
            tokens=int(data.tokens),
            **{name: data[name] for name in same},
        )

    def __post_init__(self) -> None:
        check_choice("data.group", self.group, GROUPS)
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size={self.batch_size} must be at least 1.")
        for name in ("epochs", "steps", "tokens"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} must not be negative; 0: no "
                    "such limit."
                )
        if not (self.epochs or self.steps or self.tokens):
            raise ValueError(
                "data.epochs=0, data.steps=0 and data.tokens=0 never end: set one."
            )


def windows_of(lengths: Int[np.ndarray, " n"], window: int) -> Int[np.ndarray, " n"]:
    """Returns the number of windows of rows of these lengths.

    The release counts the same number as (length - W) / W + 1, rounded up.
    """
    if not window:
        return np.ones_like(lengths)
    return -(-lengths // window)


def order(
    windows: Int[np.ndarray, " n"], batch_size: int, group: str, seed: int
) -> tuple[Int[np.ndarray, "S B"], dict[int, int]]:
    """Returns the batches of one epoch, and how many rows are left out.

    Args:
      windows: number of windows of every row.
      seed: seed of Python's generator, whose shuffle the release uses.

    Returns:
      Row numbers, EMPTY where a batch has no row; and {windows: rows left out}.
    """
    draw = random.Random(seed)
    shuffled = list(range(len(windows)))
    draw.shuffle(shuffled)
    rows = np.asarray(shuffled, np.int64)
    rows = rows[np.argsort(windows[rows], kind="stable")]
    if group == "strict":
        edges = np.flatnonzero(np.diff(windows[rows])) + 1
        runs = np.split(rows, edges)
    else:
        runs = [rows]
    batches, left = [], Counter()
    for run in runs:
        if group == "pad":
            filler = np.full(-len(run) % batch_size, EMPTY)
            run = np.concatenate([run, filler])
        whole = len(run) - len(run) % batch_size
        batches.append(run[:whole].reshape(-1, batch_size))
        left.update(windows[run[whole:]].tolist())
    cut = np.concatenate(batches) if batches else np.zeros((0, batch_size), np.int64)
    shuffled = list(range(len(cut)))
    draw.shuffle(shuffled)
    return cut[np.asarray(shuffled, np.int64)], dict(sorted(left.items()))


def mixture(
    sources: Int[np.ndarray, " n"], weights: Sequence[float], seed: Sequence[int]
) -> Int[np.ndarray, " m"]:
    """Chooses rows so that the sources have the shares `weights`.

    Returns:
      Row numbers, ascending, of the largest such choice that has no row twice.

    Raises:
      ValueError: weights that do not fit the sources; a source without a row.
    """
    counts = np.bincount(sources, minlength=len(weights))
    if len(counts) > len(weights):
        raise ValueError(
            f"data.weights={tuple(weights)} must be one number for each of the "
            f"{len(counts)} data.sources."
        )
    share = np.asarray(weights, float)
    if not (np.isfinite(share) & (share >= 0)).all() or not share.sum():
        raise ValueError(
            f"data.weights={tuple(weights)} must not be negative, and not all 0."
        )
    missing = [i for i in range(len(weights)) if weights[i] and not counts[i]]
    if missing:
        raise ValueError(
            f"data.weights={tuple(weights)}: source {missing[0]} has no example; give "
            "it weight 0."
        )
    used = np.flatnonzero(share)
    most = min(counts[used] / share[used])
    chosen = []
    for i in used:
        rows = np.flatnonzero(sources == i)
        # 1e-9: 10 * 0.3 / 0.3 must not lose a row to rounding.
        take = min(int(most * share[i] + 1e-9), len(rows))
        draw = np.random.default_rng([*seed, int(i)])
        chosen.append(draw.permutation(rows)[:take])
    return np.sort(np.concatenate(chosen))


class GroupedBatches:
    """Batches over a prepared folder, with the interface `data.batches.StepBatches`.

    Attributes:
      left_out: {windows: rows} of epoch 0 that no batch holds.
      epochs: number of epochs that are begun.
    """

    def __init__(self, data: Prepared, config: GroupConfig):
        """Draws the order of the rows of all steps.

        Raises:
          ValueError: not one whole batch, weights that do not fit, or more steps than
            the epochs have.
        """
        self.data, self.config = data, config
        if config.weights and len(config.weights) != len(data.uris):
            raise ValueError(
                f"data.weights={config.weights} must be one number for each of the "
                f"{len(data.uris)} data.sources."
            )
        self.rows, self.left_out, self.epochs = self._order()
        self.steps = len(self.rows)
        self.longest = int(self.data.lengths.max())

    def _order(self) -> tuple[np.ndarray, dict[int, int], int]:
        """Returns the row numbers [steps, B] of all epochs, `left_out` and `epochs`."""
        config, lengths = self.config, self.data.lengths
        parts, left_out, epoch = [], {}, 0
        steps, tokens = 0, 0
        while not config.epochs or epoch < config.epochs:
            rows, left = self._epoch(epoch)
            if not len(rows):
                raise ValueError(
                    f"data.batch_size={config.batch_size}: none of the groups of "
                    f"{len(lengths)} examples fills a batch; make it smaller, or use "
                    f"data.group='pad' instead of {config.group!r}."
                )
            left_out = left_out or left
            parts.append(rows)
            epoch += 1
            steps += len(rows)
            tokens += int(_lengths(lengths, rows).sum())
            if config.steps and steps >= config.steps:
                break
            if config.tokens and tokens >= config.tokens:
                break
        rows = np.concatenate(parts).astype(np.int32)
        if config.steps > len(rows):
            raise ValueError(
                f"data.steps={config.steps}, but data.epochs={config.epochs} of "
                f"{len(lengths)} examples have {len(rows)}: raise data.epochs (0: as "
                "many as it takes)."
            )
        if config.steps:
            rows = rows[: config.steps]
        if config.tokens:
            seen = np.cumsum(_lengths(lengths, rows).sum(1))
            rows = rows[: int(np.searchsorted(seen, config.tokens)) + 1]
        return rows, left_out, epoch

    def _epoch(self, epoch: int) -> tuple[np.ndarray, dict[int, int]]:
        config, lengths = self.config, self.data.lengths
        chosen = np.arange(len(lengths))
        if config.weights:
            draw = [config.seed, epoch]
            chosen = mixture(self.data.sources, config.weights, draw)
        windows = windows_of(lengths[chosen], config.window)
        seed = config.seed + epoch * 2**32
        rows, left = order(windows, config.batch_size, config.group, seed)
        return np.where(rows == EMPTY, EMPTY, chosen[rows]), left

    @property
    def tokens_read(self) -> int:
        """The number of tokens of all examples that some batch holds."""
        rows = np.unique(self.rows[self.rows != EMPTY])
        return int(self.data.lengths[rows].sum())

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return ((self.config.batch_size, self.longest),)

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def width(self, step: int) -> int:
        return self.longest

    def lengths(self, step: int) -> Int[np.ndarray, " B"]:
        return _lengths(self.data.lengths, self.rows[step])

    def batch(
        self, step: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns tokens and labels int32 [B, T], and lengths int32 [B].

        Rows are padded on the right, tokens with 0 and labels with -100. labels[:, t]
        is tokens[:, t + 1], or -100 where that is not to be learnt.

        Args:
          rows: the rows to read, all by default; others are empty, but have their
            lengths.
        """
        chosen = self.rows[step]
        shape = (len(chosen), self.longest)
        tokens, labels = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
        for row in range(len(chosen)) if rows is None else rows:
            if chosen[row] == EMPTY:
                continue
            example = self.data.read(int(chosen[row]))
            n = len(example.tokens)
            tokens[row, :n] = example.tokens
            labels[row, :n] = shift(example.tokens, example.labelled)
        return {"tokens": tokens, "labels": labels, "lengths": self.lengths(step)}


def _lengths(lengths: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.where(rows == EMPTY, 0, lengths[rows]).astype(np.int32)
