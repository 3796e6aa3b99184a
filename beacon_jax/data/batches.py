"""Training batches with random access: a batch is a pure function of config and step.

Nothing is consumed or remembered, so a run that resumes at step n sees exactly what an
uninterrupted run would have seen, and the data position is the step number.

Kinds of rows, mixed by weight within every batch:
  text     contiguous text, eos between documents; every label weighs 1.
  passkey  real text with a 5-digit key at a random depth, asked for at the end and, up
           to `passkey_questions - 1` times, on the way (a question per row gives 5
           useful labels in hundreds; more questions give more signal per row).
  repeat   a random segment of uniform token ids, tiled. Everything after its first
           period is predictable by induction only; this is what makes recall emerge
           within a minute or two instead of not at all (docs/evaluation-protocols.md
           section 6.2).
  copy     real text whose end repeats an earlier passage of the row word for word, so
           that exact recall over a distance is trained on words as well as on digits.

Any row may be interleaved with dummies: an eos after every r-th token, as beacons will
stand later, unlabelled and under plain causal attention. Nothing is compressed; a base
model trained on some such rows is meant to tolerate tokens in between. The reason: with
beacons in its window the predecessor of every r-th token is no longer at distance 1.
(Beacons trained alike for 2,200 steps, 64 held-out rows, x4: 0.032 nats/token below
window-only on a base without dummies, 0.071 on one that trained 1,200 steps more with
them in 30 % of the rows; passkeys at x2 and x4 .98 and .84 against .94 and .81.)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from beacon_jax.data.examples import IGNORED
from beacon_jax.data.passkey import (
    QUESTION,
    Passkey,
    encode_with_key,
    make_passkey,
)
from beacon_jax.names import meant
from beacon_jax.tokenise import check_ids

KINDS = ("text", "passkey", "repeat", "copy")
# Keys of config.data that only stages read.
STAGE_KEYS = (
    "answer_weight",
    "second_weight",
    "passkey_questions",
    "passkey_window",
    "passkey_tail",
    "copy_weight",
    "dummy_every",
    "first_step",
)


class StepBatches(Protocol):
    """Interface through which the trainer reads batches.

    `Batches` cuts rows from a text. `grouped.GroupedBatches` takes whole examples of a
    prepared folder.

    Attributes:
      steps: number of steps of the run.
      shapes: (B, T) of all batches that occur.
      fingerprint: identifies the data: a run resumes with equal data or not at all.
    """

    @property
    def steps(self) -> int: ...

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]: ...

    @property
    def fingerprint(self) -> str: ...

    def width(self, step: int) -> int:
        """Returns the width T of the batch of a step."""
        ...

    def lengths(self, step: int) -> Int[np.ndarray, " B"]:
        """Returns the number of real tokens of every row, known without reading one.

        0 stands for a place without a row.
        """
        ...

    def batch(
        self, step: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns tokens and labels int32 [B, T], perhaps weights float32 [B, T].

        Args:
          rows: the rows that are needed. The others may be left empty. None: all are
            needed.
        """
        ...


@dataclass(frozen=True)
class BatchStage:
    """A stage of training: `steps` batches of `batch_size` rows of `length` tokens.

    Attributes:
      mix: (kind, weight) pairs.
      dummies: share of the rows that are interleaved with eos (inside `length`).
    """

    steps: int
    length: int
    batch_size: int
    mix: tuple[tuple[str, float], ...] = (("text", 1.0),)
    dummies: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        unknown = [kind for kind, _ in self.mix if kind not in KINDS]
        if unknown:
            near = meant(unknown[0], KINDS)
            raise ValueError(f"mix has {unknown}: {near}use {', '.join(KINDS)}.")
        if not 0.0 <= self.dummies <= 1.0:
            raise ValueError(f"dummies={self.dummies} must lie in [0, 1].")
        if not self.mix or min(w for _, w in self.mix) < 0 or not self.total > 0:
            raise ValueError(f"mix={self.mix} needs weights >= 0 with a positive sum.")

    @property
    def total(self) -> float:
        """Sum of the weights of the mix."""
        return sum(weight for _, weight in self.mix)


@dataclass(frozen=True)
class BatchConfig:
    """The settings of `Batches`. Weights multiply the cross entropy of single labels.

    Attributes:
      answer_weight: weight of the digits of every answer.
      second_weight: weight of the key's second mention in the needle, which is
        predictable from the first. The first mention is random and weighs 0.
      passkey_window: if > 0, the needle ends before the last window (see make_passkey).
      passkey_tail: up to this many tokens of text, at most half of the row, follow the
        final question. In training the last window has no beacons, at inference it has:
        with 0, no final answer is given next to beacons.
      dummy_every: the spacings of dummies, one drawn per interleaved row.
      first_step: added to a step's number where rows are drawn, so that a run goes on
        in the data behind one of that many steps.
    """

    stages: tuple[BatchStage, ...]
    seed: int = 0
    answer_weight: float = 10.0
    second_weight: float = 3.0
    passkey_questions: int = 1
    passkey_window: int = 0
    passkey_tail: int = 0
    copy_weight: float = 1.0
    dummy_every: tuple[int, ...] = (2, 4, 8)
    first_step: int = 0

    @classmethod
    def of(cls, config: Any) -> "BatchConfig":
        """Makes the settings from a whole config (`training.config`)."""
        data = config.data
        stages = []
        for name in sorted(data.stages):
            given = data.stages[name].to_dict()
            mix = given.pop("mix", {"text": 1.0})
            given["mix"] = tuple((k, w) for k, w in sorted(mix.items()) if w)
            try:
                stages.append(BatchStage(**given))
            except ValueError as error:
                raise ValueError(f"data.stages.{name}.{error}") from None
            except TypeError:
                raise ValueError(
                    f"data.stages.{name} has the keys {', '.join(given)}: use those of "
                    "training.config.stage (steps, length, batch_size, mix, dummies)."
                ) from None
        settings = {key: data[key] for key in STAGE_KEYS}
        return cls(stages=tuple(stages), seed=config.seed, **settings)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("data.stages is empty: give it at least one stage.")
        if self.passkey_questions < 1:
            raise ValueError(
                f"data.passkey_questions={self.passkey_questions} must be at least 1."
            )
        for key in STAGE_KEYS:
            value = getattr(self, key)
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"data.{key}={value} must not be negative.")
        if not self.dummy_every or min(self.dummy_every) < 1:
            raise ValueError(
                f"data.dummy_every={self.dummy_every} must be numbers of at least 1."
            )

    @property
    def steps(self) -> int:
        """Number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> BatchStage:
        """Returns the stage of a step; steps past the end belong to the last stage."""
        if step < 0:
            raise ValueError(f"step={step} must be >= 0")
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]


@dataclass(frozen=True)
class Batches:
    """Batches over one token stream (see tokenizer.encode_stream).

    Attributes:
      vocab_size: rows of the model's embedding; None: one for each token.
    """

    stream: np.ndarray
    tokenizer: Any
    config: BatchConfig
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        longest = max(stage.length for stage in self.config.stages)
        if len(self.stream) < 2 * longest:
            raise ValueError(
                f"data.sources: the text has {len(self.stream)} tokens, rows of "
                f"{longest} need at least {2 * longest}: name sources with more text, "
                "or lower the length in data.stages."
            )
        for stage in self.config.stages:
            if dict(stage.mix).get("passkey"):
                self._check_room(stage)

    def _check_room(self, stage: BatchStage) -> None:
        """Raises ValueError unless a passkey fits into the shortest row of a stage."""
        config = self.config
        every = min(config.dummy_every) if stage.dummies else 0
        length = stage.length - (stage.length // (every + 1) if every else 0)
        length -= min(config.passkey_tail, length // 2)
        rng, window = np.random.default_rng(0), config.passkey_window
        try:
            make_passkey(rng, self.stream, length, 0.0, self.tokenizer, window)
        except ValueError as error:
            raise ValueError(
                f"data.stages has passkeys in rows of length={stage.length}, of which "
                f"dummies and data.passkey_tail={config.passkey_tail} may leave "
                f"{length}: {error}, or take passkey out of its mix."
            ) from None

    @property
    def steps(self) -> int:
        return self.config.steps

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((s.batch_size, s.length) for s in self.config.stages)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.stream)).hexdigest()

    def width(self, step: int) -> int:
        return self.config.stage_at(step).length

    def lengths(self, step: int) -> Int[np.ndarray, " B"]:
        stage = self.config.stage_at(step)
        return np.full(stage.batch_size, stage.length, np.int32)

    def batch(
        self, step: int, rows: Sequence[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns tokens, labels int32 [B, T], weights float32 [B, T], kind int32 [B].

        `kind` is an index into KINDS. labels[:, t] is tokens[:, t + 1]. The last label,
        and every label of weight 0, is -100, so that counting labels counts what is
        trained on. All rows are filled, whatever `rows` says: one generator draws them
        one after the other.
        """
        stage = self.config.stage_at(step)
        drawn_as = step + self.config.first_step
        rng = np.random.default_rng([self.config.seed, drawn_as])
        share = np.asarray([weight for _, weight in stage.mix]) / stage.total
        kinds = [KINDS.index(kind) for kind, _ in stage.mix]
        kind = np.asarray(kinds, np.int32)[
            rng.choice(len(kinds), stage.batch_size, p=share)
        ]
        drawn = [self._row(rng, stage, KINDS[k]) for k in kind]
        tokens, labels, weights = (np.stack(part) for part in zip(*drawn, strict=True))
        if self.vocab_size is not None:  # eos and passkeys are not of the stream
            name = f"the batch of step {step + 1}"
            check_ids(tokens, self.vocab_size, name, self.tokenizer)
        return {"tokens": tokens, "labels": labels, "weights": weights, "kind": kind}

    def _row(self, rng: np.random.Generator, stage: BatchStage, kind: str):
        """Draws the tokens, labels and weights [T] of one row."""
        every = 0
        if rng.uniform() < stage.dummies:
            every = int(rng.choice(self.config.dummy_every))
        real = np.ones(stage.length, bool)
        if every:
            real[every :: every + 1] = False
        row, weight = getattr(self, "_" + kind)(rng, int(real.sum()))
        tokens = np.full(stage.length, self.tokenizer.eos_token_id, np.int32)
        labels = np.full(stage.length, IGNORED, np.int32)
        weights = np.zeros(stage.length, np.float32)
        tokens[real] = row
        # A kind weighs the tokens to be predicted; here the weight moves to the
        # position that predicts. Labels skip over dummies to the next real token.
        weights[real] = np.append(weight[1:], 0.0)
        labels[real] = np.append(row[1:], IGNORED)
        return tokens, np.where(weights > 0, labels, IGNORED).astype(np.int32), weights

    def _slice(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = int(rng.integers(0, len(self.stream) - length + 1))
        return self.stream[start : start + length]

    def _text(self, rng: np.random.Generator, length: int):
        return self._slice(rng, length), np.ones(length)

    def _repeat(self, rng: np.random.Generator, length: int):
        # Log-uniform periods: short ones are learnt first and carry the long ones
        # along.
        period = int(np.exp(rng.uniform(np.log(4), np.log(length // 2 + 1))))
        specials = len(set(self.tokenizer.all_special_ids))
        known = min(len(self.tokenizer), self.vocab_size or len(self.tokenizer))
        segment = rng.integers(specials, known, period)
        weights = np.ones(length)
        weights[:period] = 0.0
        return np.tile(segment, -(-length // period))[:length], weights

    def _copy(self, rng: np.random.Generator, length: int):
        tokens = self._slice(rng, length).copy()
        size = int(rng.integers(min(8, length // 4), length // 2))
        source = int(rng.integers(0, length - 2 * size + 1))
        tokens[length - size :] = tokens[source : source + size]
        weights = np.ones(length)
        weights[length - size] = 0.0  # nothing announces that the copy begins
        weights[length - size + 1 :] = self.config.copy_weight
        return tokens, weights

    def _passkey(self, rng: np.random.Generator, length: int):
        config = self.config
        text = self._slice(rng, length)
        tail = int(rng.integers(0, min(config.passkey_tail, length // 2) + 1))
        sample = make_passkey(
            rng,
            text,
            length - tail,
            float(rng.uniform()),
            self.tokenizer,
            config.passkey_window,
        )
        asked, weights = sample.tokens.copy(), np.ones(length)
        weights[slice(*sample.mentions[0])] = 0.0
        weights[slice(*sample.mentions[1])] = config.second_weight
        weights[slice(*sample.answer)] = config.answer_weight
        if config.passkey_questions > 1:
            self._ask_again(rng, sample, asked, weights)
        return np.concatenate([asked, text[length - tail :]]), weights

    def _ask_again(
        self,
        rng: np.random.Generator,
        sample: Passkey,
        tokens: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        """Overwrites text between needle and final question with earlier questions."""
        question, (span,) = encode_with_key(QUESTION, sample.key, self.tokenizer)
        extra = int(rng.integers(0, self.config.passkey_questions))
        low, high = sample.needle[1], len(tokens) - len(question)
        slots = (high - low) // len(question)
        for slot in rng.permutation(slots)[:extra]:
            at = low + int(slot) * len(question)
            tokens[at : at + len(question)] = question
            weights[at + span[0] : at + span[1]] = self.config.answer_weight
