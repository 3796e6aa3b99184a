"""Makes what goes into a step: its batch cut into windows, and a ratio for each.

Both are functions of the config and of the step's number alone, so they are made ahead
of the step, in threads, while the devices work.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from beacon_jax.core.plan import draw_ratios, memory_slots, plan_slots
from beacon_jax.data.batches import BatchConfig, Batches, StepBatches
from beacon_jax.data.grouped import GroupConfig, GroupedBatches
from beacon_jax.data.prepare import Preparation, finished, prepare
from beacon_jax.data.prepared import Prepared
from beacon_jax.data.tally import percent, si, usage
from beacon_jax.data.text import run_documents
from beacon_jax.data.tokenizer import encode_stream
from beacon_jax.data.windows import split_windows
from beacon_jax.flops import training_step
from beacon_jax.model.config import ModelConfig
from beacon_jax.progress import Stage
from beacon_jax.tokenise import check_ids
from beacon_jax.training.config import Config
from beacon_jax.training.console import say
from beacon_jax.training.initial import embedding_rows, make_tokenizer
from beacon_jax.training.processes import is_lead

AHEAD = 8  # batches that wait for their step: at 8 rows of 20,480 tokens 1.3 MB each


class StepInputs(NamedTuple):
    """Inputs of one step, on the host.

    Attributes:
      batch: arrays [N, B, ...] for `core.train_loss`. N is that of the longest batch of
        the run, so that all steps share one program: windows without tokens stand in
        front, and cost next to nothing.
      plans: ratios of the windows, int32 [N, P], a column for rows that share one.
      tokens: how many real ones all rows have.
      flops: model FLOPs of the step, by `flops.training_step`.
    """

    batch: dict[str, np.ndarray]
    plans: Int[np.ndarray, "N P"]
    tokens: int
    flops: int


def batch_sizes(config: Config) -> dict[str, int]:
    """Returns the rows of a step by the key of the stage, or of "data"."""
    stages = config.data.stages.items()
    sizes = {f"data.stages.{name}": stage.batch_size for name, stage in stages}
    return sizes or {"data": config.data.batch_size}


def make_data(
    config: Config, workdir: Path, stage: Stage
) -> tuple[Any, Path, StepBatches]:
    """Returns the tokenizer of a run, its folder, and the run's batches.

    Rows are cut from the text of config.data.sources if there are stages. Without them
    the sources are prepared if that was not done before.

    Args:
      workdir: folder of the run, for a tokenizer that is trained and prepared data.
      stage: told that preparing goes on.

    Raises:
      ValueError, FileNotFoundError: settings or sources that do not work, or a token
        that the model has no embedding of.
    """
    data = config.data
    documents = functools.cache(lambda: run_documents(config))
    tokenizer, tokenizer_folder = make_tokenizer(config, documents, workdir)
    vocab_size = embedding_rows(config)
    if data.stages:
        stream = encode_stream(documents(), tokenizer)
        if vocab_size is not None:
            check_ids(stream, vocab_size, "the text of data.sources", tokenizer)
        batches = Batches(stream, tokenizer, BatchConfig.of(config), vocab_size)
        return tokenizer, tokenizer_folder, batches
    folder = Path(data.prepared or workdir / "data").expanduser()
    settings = Preparation.of(data, tokenizer_folder, vocab_size)
    made = _prepared(data, settings, folder, stage)
    if is_lead():
        say(usage(made.manifest))
    return tokenizer, tokenizer_folder, GroupedBatches(made, GroupConfig.of(config))


def _prepared(data: Any, settings: Preparation, folder: Path, stage: Stage) -> Prepared:
    """Returns the prepared data: made by the first process, awaited by the others."""

    def show(line: str) -> None:
        stage.alive()
        print(line, flush=True)

    if is_lead():
        limits = {key: data[key] for key in ("workers", "max_drop_fraction")}
        return prepare(settings, folder, **limits, show=show)
    # Not a collective, whose waiting time is limited: preparing may take hours. If the
    # first process fails, jax ends this one.
    while (done := finished(settings, folder)) is None:
        time.sleep(0.5)
    return done


def describe(config: Config, batches: StepBatches) -> str:
    """Describes the data and the size of a run, for its first line."""
    sources = ", ".join(config.data.sources)
    if isinstance(batches, Batches):
        stages = batches.config.stages
        drawn = sum(s.steps * s.batch_size * s.length for s in stages)
        return (
            f"{len(batches.stream):,} tokens of {sources}; steps x batch x length: "
            + ", ".join(f"{s.steps} x {s.batch_size} x {s.length}" for s in stages)
            + f", cut at random: {si(drawn)} tokens, "
            f"{drawn / len(batches.stream):.2g} x the text"
        )
    assert isinstance(batches, GroupedBatches)
    left, total = sum(batches.left_out.values()), batches.data.manifest["total"]
    read = batches.tokens_read
    return (
        f"{total['examples']:,} examples, {total['tokens']:,} tokens of "
        f"{sources}; {batches.steps:,} steps of "
        f"{batches.config.batch_size} rows ({batches.config.group}) in "
        f"{batches.epochs} epoch{'s' if batches.epochs > 1 else ''}"
        + (f", each without {left} rows of incomplete groups" if left else "")
        + (
            f"; {si(read)} of the {si(total['tokens'])} tokens are read "
            f"({percent(read, total['tokens'])})"
            if read < total["tokens"]
            else ""
        )
    )


class Inputs:
    """The inputs of all steps: `inputs[step]` are one step's, `ahead` iterates.

    Args:
      batches: rows of the run, step by step.
      count: ratio plans per step, P.
      rows: indices of the rows of a batch that this process needs; None: all.
    """

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        batches: StepBatches,
        count: int,
        rows: Sequence[int] | None = None,
    ):
        self._config, self._model, self._batches = config, model, batches
        self._count, self._rows = count, rows
        # The tokenizer, which passkey rows need, is not for several threads.
        self._threads = 1 if isinstance(batches, Batches) else 4

    def __getitem__(self, step: int) -> StepInputs:
        config, model, batches = self._config, self._model, self._batches
        raw, lengths = batches.batch(step, self._rows), batches.lengths(step)
        size = window(config, model, batches.width(step))
        n = max(-(-t // window(config, model, t)) for _, t in batches.shapes)
        cut = functools.partial(
            split_windows, lengths=lengths, window=size, count=n, align="right"
        )
        tokens, valid = cut(raw["tokens"])
        labels, _ = cut(raw["labels"], fill=-100)
        batch = {"tokens": tokens, "labels": labels, "valid": valid}
        if "weights" in raw:
            batch["weights"], _ = cut(raw["weights"])
        plans = draw_plans(config, model, batches, step, self._count)
        plans = np.pad(plans, ((n - len(plans), 0), (0, 0)))
        flops = step_flops(config, model, plans, valid)
        return StepInputs(batch, plans, int(lengths.sum()), flops)

    def ahead(self, start: int, stop: int) -> grain.DatasetIterator[StepInputs]:
        """Iterates over the inputs of steps [start, stop), prefetching in threads."""
        steps = grain.MapDataset.range(start, stop).map(self.__getitem__)
        options = grain.ReadOptions(self._threads, AHEAD)
        return iter(steps.to_iter_dataset(options))


def has_teacher(config: Config) -> bool:
    """Tells whether full attention reads each row for the loss."""
    return config.loss.kind == "distil" or config.loss.attention_weight > 0


def step_flops(
    config: Config,
    model: ModelConfig,
    plans: Int[np.ndarray, "N P"],
    valid: Int[np.ndarray, "N B"],
) -> int:
    """Counts the model FLOPs of a step; a teacher reads it, too."""
    taught = has_teacher(config)
    return training_step(model, plans, valid, trainable=config.trainable, taught=taught)


def window(config: Config, model: ModelConfig, width: int) -> int:
    """Returns the tokens of a window, for rows of `width` tokens."""
    return model.beacon.window if model.beacon else (config.window or width)


def draw_plans(
    config: Config, model: ModelConfig, batches: StepBatches, step: int, count: int
) -> np.ndarray:
    """Draws the ratios of a step's windows, int32 [N, P]: `count` plans, one a column.

    N is that of the step's longest row, and all rows end together. A plan that would
    not fit into the memory's slots is drawn again.

    Raises:
      ValueError: none of 1,000 plans fits into config.memory_slots.
    """
    lengths = batches.lengths(step)
    lengths = lengths[lengths > 0]
    size = window(config, model, batches.width(step))
    windows = int((-(-lengths // size)).max())
    beacon = model.beacon
    if beacon is None:
        return np.zeros((windows, count), np.int32)
    room = slots(config, model, windows)
    # Where ratio 0 is allowed depends on how full the last window is; the emptiest one
    # of all rows counts.
    length = (windows - 1) * size + int(((lengths - 1) % size + 1).min())

    def draw(seed: list[int]) -> np.ndarray:
        uniform = np.random.default_rng([*seed, 1]).uniform() < config.uniform_plans
        for attempt in range(1000):
            plan = draw_ratios(
                model,
                windows,
                mix="instance-random" if uniform else beacon.ratio_mix,
                seed=[*seed, 2, attempt] if attempt else seed,
                length=length,
                training=True,
            )
            if plan_slots(model, plan) <= room:
                return plan
        raise ValueError(
            f"memory_slots={config.memory_slots}: no plan of {windows} windows with "
            f"ratios {list(beacon.ratios)} fits; raise it, or set it to 0."
        )

    drawn_as = step + config.data.first_step
    return np.stack([draw([config.seed, drawn_as, i]) for i in range(count)], axis=1)


def slots(config: Config, model: ModelConfig, windows: int) -> int:
    """Counts a row's memory slots: config.memory_slots, or what plans may need."""
    assert model.beacon is not None
    drawn = model.beacon.ratio_mix == "step-random" and not config.uniform_plans
    return config.memory_slots or memory_slots(model, windows, likely=drawn)
