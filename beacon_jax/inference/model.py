"""The handle that notebooks and command lines use: a model with its tokenizer."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from beacon_jax import runtime
from beacon_jax.core.memory import slot_nbytes
from beacon_jax.hf import checkpoint
from beacon_jax.hf.identify import Identity
from beacon_jax.hf.placement import Place
from beacon_jax.inference.decode import Decoded, decode
from beacon_jax.inference.feeding import (
    OnProgress,
    check_memory,
    choose_dtype,
    decoded_memory,
    feed_rows,
    ledgers_of,
)
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.plan import (
    Plan,
    Ratio,
    make_plan,
    stack_ratios,
    warn_beyond_training,
)
from beacon_jax.inference.sampling import Sampling, make_sampling, seen_tokens
from beacon_jax.inference.spans import Spans, token_spans
from beacon_jax.inference.text import Streamer, finisher
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import variable_axes
from beacon_jax.model.partition import Partition, make_partition, partitioned

Text = str | Sequence[int] | np.ndarray
Texts = Text | Sequence[Text]


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Model.complete` returns for one prompt.

    Attributes:
      text: the new text, without the end token and in front of a stop string ("" for a
        model without tokenizer).
      tokens: its token ids, int32 [n].
      finish: "stop" (an end token or a stop string) or "length" (max_new_tokens).
      note: what was decided about ratios, "" if nothing was.
      prompt_tokens: tokens read, context and prompt.
      prefill_seconds, decode_seconds: wall time of the batch, compilation included.
      batch, row: the memory of the batch and this prompt's row of it.
    """

    text: str
    tokens: np.ndarray
    finish: str
    note: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    batch: Memory = dataclasses.field(repr=False)
    row: int = 0

    @functools.cached_property
    def memory(self) -> Memory:
        """Holds the context, the prompt and the new tokens: pass it on to continue."""
        return self.batch if len(self.batch) == 1 else self.batch[self.row]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to use: `load` makes one.

    A text is a str or token ids. Where one is taken, a list of them makes a batch, with
    rows of any lengths: each gets what it would get alone.

    Attributes:
      config: the model and its beacons.
      variables: {"params": tree, "beacon": tree} of jax arrays.
      tokenizer: a transformers tokenizer; None: only token ids go in and out.
      identity: which weights they are, for beacon packs.
      partition: the devices that it is split over; None: one.
    """

    config: ModelConfig
    variables: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)
    identity: Identity = dataclasses.field(default_factory=Identity, repr=False)
    partition: Partition | None = dataclasses.field(default=None, repr=False)

    def compress(
        self,
        context: Texts,
        ratio: Ratio = None,
        *,
        memory: Memory | None = None,
        max_slots: int | None = None,
        max_bytes: int | str | None = None,
        spans: Spans | None = None,
        lossless: str = "windows",
        capacity: int | None = None,
        reserve: int = 0,
        memory_dtype: str | None = None,
        seed: int = 0,
        on_note: Callable[[str], None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Memory:
        """Reads contexts of any length into a memory.

        Args:
          context: one text, or a list of them for a memory of as many rows.
          ratio: raw tokens per memory slot: one number, a list with one per window, a
            function (window, start, stop) -> ratio; 0 or "full" keeps everything;
            "auto" takes the smallest trained ratio whose positions fit, or "auto-8"
            x8, but no compression where that needs fewer FLOPs. None: as `memory` was
            compressed, else the mix of the config.
          memory: is continued, not changed; None: a new one.
          max_slots, max_bytes: in place of `ratio`, a budget per row: the smallest
            uniform ratio that fits, then lower ones for the latest windows.
          spans: what must not be compressed: a regex, or token ranges of the context.
          lossless: "windows" keeps every window that a span touches at ratio 0;
            "slots" only the span's own entries beside the beacons, which no model was
            trained for.
          capacity: slots of the buffer; None: as many as needed.
          reserve: tokens that are to follow (questions, answers), which "auto", budgets
            and the buffer leave room for.
          memory_dtype: of keys and values: "int8" takes about half of bfloat16; None:
            what the model computes in. A memory that is continued stays what it is.
          seed: of a random ratio mix.
          on_note: called, before anything is fed, with each line on what was decided:
            by "auto", for a budget, and what `spans` cost.
          on_progress: called with (tokens fed, of how many) after each piece of 16
            windows, rows of a batch together; None: a row is fed as one piece.

        Raises:
          ValueError: an empty context, a ratio that the model cannot use, a budget
            that nothing fits into, or another dtype than `memory` has.
          CapacityError: `capacity` is too small; it states what is needed.
        """
        contexts, _ = as_batch(context)
        dtype = choose_dtype(self, memory, memory_dtype)
        rows = [self.encode(c, "context", first=memory is None) for c in contexts]
        plans = self._plans(
            rows,
            memory,
            dtype,
            reserve,
            ratio=ratio,
            max_slots=max_slots,
            max_bytes=max_bytes,
            spans=[self._spans(spans, c, memory is None) for c in contexts],
            lossless=lossless,
            seed=seed,
        )
        if on_note:
            for note in dict.fromkeys(plan.note for plan in plans if plan.note):
                on_note(note)
        after = feed_rows(
            self, rows, plans, memory, capacity, reserve, on_progress, dtype
        )
        return after[1]

    def complete(
        self,
        prompt: Any,
        *,
        context: Texts | None = None,
        memory: Memory | None = None,
        ratio: Ratio = None,
        max_slots: int | None = None,
        max_bytes: int | str | None = None,
        spans: Spans | None = None,
        lossless: str = "windows",
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        repetition_penalty: float | Sequence[float] = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        capacity: int | None = None,
        memory_dtype: str | None = None,
        on_text: Callable[..., None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Any:
        """Continues [memory | context | prompt]; see `compress` and `Sampling`.

        Args:
          prompt: one text, or a list of them: a Generation or a list of Generations.
          context: read before the prompt; one for all prompts, or one for each.
          memory: of one row, which all prompts are asked against, or one for each.
          max_new_tokens: at most; an end token or a stop string ends earlier. This and
            the settings of sampling are one number, or one per prompt.
          stop: strings that end the text, which does not contain them.
          seed: of sampling, one per prompt (row i of one seed gets seed + i), and of a
            random ratio mix.
          on_text: called with each piece of the text as it is ready; for a list of
            prompts with (row, piece).
          on_progress: as in `compress`, while the context and the prompts are read.

        Raises:
          ValueError: a prompt of 0 tokens, or an argument out of range (named).
          CapacityError: `capacity` is too small; it states what is needed.
        """
        sampling = make_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        prompts, single = as_batch(prompt)
        count = len(prompts)
        new = np.broadcast_to(np.asarray(max_new_tokens, int), (count,))
        if new.min(initial=1) < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
        show = [_shown(on_text, None if single else i) for i in range(count)]
        streams = [Streamer(self.tokenizer, s, stop) for s in show]
        start = time.perf_counter()
        dtype = choose_dtype(self, memory, memory_dtype)
        memory = _rows_for(memory, count)
        rows, marked = self._prompt_rows(prompts, context, memory, spans)
        plans = self._plans(
            rows,
            memory,
            dtype,
            int(new.max()),
            ratio=ratio,
            max_slots=max_slots,
            max_bytes=max_bytes,
            spans=marked,
            lossless=lossless,
            seed=int(np.atleast_1d(seed)[0]),
        )
        logits, after = feed_rows(
            self, rows, plans, memory, capacity, new, on_progress, dtype
        )
        jax.block_until_ready(logits)
        middle = time.perf_counter()
        result = self._decode(after, logits, plans, sampling, streams, new, seed)
        after = decoded_memory(after, plans, result)
        texts = [stream.finish() for stream in streams]
        end = time.perf_counter()
        made = [
            Generation(
                text=texts[i],
                tokens=result.tokens[i, : result.lengths[i]],
                finish="stop"
                if streams[i].keep is not None or result.lengths[i] < new[i]
                else "length",
                note=plans[i].note,
                prompt_tokens=len(rows[i]),
                prefill_seconds=middle - start,
                decode_seconds=end - middle,
                batch=after,
                row=i,
            )
            for i in range(count)
        ]
        return made[0] if single else made

    def generate(self, prompt: Any, **options: Any) -> Any:
        """The text of `complete`, which documents the options; texts for a list."""
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer=None: text cannot be returned. Use complete(...).tokens, or "
                "put the tokenizer files into the model's folder."
            )
        made = self.complete(prompt, **options)
        return [m.text for m in made] if isinstance(made, list) else made.text

    def encode(self, text: Text, name: str, *, first: bool) -> np.ndarray:
        """Token ids [n]; `first` adds what the tokenizer puts before a text (bos)."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} is text, but the model's folder has no tokenizer files: "
                    "copy them there from the base model, or give token ids."
                )
            # `verbose` would warn about the base model's length, which is the point.
            ids = self.tokenizer(text, add_special_tokens=first, verbose=False)
            text = ids["input_ids"] if text else []
        ids = np.asarray(text, np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(
                f"{name} has shape {list(ids.shape)}, 0 tokens or a batch: give at "
                "least one token, in one row."
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"{name} has token ids from {ids.min()} to {ids.max()}, the model has "
                f"0 to {self.config.vocab_size - 1}: is the tokenizer the model's own?"
            )
        return ids.astype(np.int32)

    # --- the rows of a batch -----------------------------------------------------

    def _prompt_rows(
        self,
        prompts: list[Text],
        context: Any,
        memory: Memory | None,
        spans: Spans | None,
    ) -> tuple[list[np.ndarray], list[Any]]:
        """[context | prompt] of each row, and the token ranges of its spans."""
        contexts: list[Any] = [None] * len(prompts)
        if context is not None:
            given, single = as_batch(context)
            contexts = given * len(prompts) if single else given
            if len(contexts) != len(prompts):
                raise ValueError(
                    f"context has {len(contexts)} texts for {len(prompts)} prompts: "
                    "give one for all, or one for each."
                )
        elif spans is not None:
            raise ValueError("spans mark parts of the context: give context=...")
        rows, marked, first = [], [], memory is None
        for prompt, before in zip(prompts, contexts, strict=True):
            tokens = self.encode(prompt, "prompt", first=first and before is None)
            if before is not None:
                tokens = np.concatenate(
                    [self.encode(before, "context", first=first), tokens]
                )
            rows.append(tokens)
            marked.append(self._spans(spans, before, first))
        return rows, marked

    def _spans(self, spans: Spans | None, text: Any, first: bool) -> Any:
        """Token ranges of what `spans` marks in a text."""
        if spans is None:
            return ()
        text = text if isinstance(text, str) else None
        return token_spans(spans, text, self.tokenizer, first=first)

    def _plans(
        self,
        rows: list[np.ndarray],
        memory: Memory | None,
        dtype: str,
        new: int,
        **options: Any,
    ) -> list[Plan]:
        check_memory(self, memory, len(rows))
        ledgers, spans = ledgers_of(memory, len(rows)), options.pop("spans")
        slot = slot_nbytes(self.config, dtype)
        plans = []
        for row, ledger, marked in zip(rows, ledgers, spans, strict=True):
            plan = make_plan(
                self.config,
                length=len(row),
                before=ledger,
                new_tokens=new,
                slot_nbytes=slot,
                spans=marked,
                **options,
            )
            warn_beyond_training(self.config, plan, len(row) + new, ledger)
            plans.append(plan)
        return plans

    def _decode(
        self,
        memory: Memory,
        logits: jax.Array,
        plans: list[Plan],
        sampling: Sampling,
        streams: list[Streamer],
        new: np.ndarray,
        seed: int | Sequence[int],
    ) -> Decoded:
        seen = None
        if (np.asarray(sampling.repetition_penalty) != 1).any():
            seen = self._seen(memory)
        with partitioned(self.partition):
            return decode(
                self.config,
                self.variables,
                memory.state,
                logits,
                stack_ratios(plans),
                max_new_tokens=new,
                sampling=sampling,
                seeds=seed,
                seen=seen,
                finished=finisher(streams) if self.tokenizer else None,
                donate=True,
            )

    def _seen(self, memory: Memory) -> np.ndarray:
        tokens = [row.tokens for row in memory.rows]
        known = [t for t in tokens if t is not None]
        if len(known) < len(tokens):
            raise ValueError(
                "repetition_penalty needs the tokens that the memory was made of, but "
                "they were not kept: save with tokens=True, or leave the penalty at 1."
            )
        return seen_tokens(known, self.config.vocab_size)


def as_batch(texts: Any) -> tuple[list[Any], bool]:
    """Texts as a list, and whether it was a single one.

    Raises:
      ValueError: an empty list of texts.
    """
    if isinstance(texts, str):
        return [texts], True
    if isinstance(texts, np.ndarray) or not isinstance(texts, Sequence):
        return [texts], True
    if len(texts) and isinstance(texts[0], str | Sequence | np.ndarray):
        return list(texts), False
    return [texts], True


def _rows_for(memory: Memory | None, count: int) -> Memory | None:
    """A memory of one row is asked all of `count` prompts."""
    if memory is None or len(memory) == count or len(memory) != 1:
        return memory
    return memory.repeat(count)


def _shown(
    on_text: Callable[..., None] | None, row: int | None
) -> Callable[[str], None] | None:
    if on_text is None or row is None:
        return on_text
    return functools.partial(on_text, row)


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    beacon: BeaconConfig | None = None,
    ignore_sliding_window: bool = False,
    mesh: str | Mesh | None = None,
) -> Model:
    """A model from an HF folder or a converted folder.

    Args:
      path: a folder with config.json, weights and tokenizer files.
      dtype: "float32", "bfloat16" or "float16"; None: as stored.
      beacon: other beacon settings; a plain model gets untrained beacons.
      ignore_sliding_window: attend to everything although config.json has a window.
      mesh: devices to split over, "tensor:8" (attention heads, MLP and vocabulary) or
        "data:2,tensor:4" (rows of a batch too), or a `jax.sharding.Mesh` with these
        axes; None: the default device.

    Raises:
      ValueError, FileNotFoundError: what is missing or does not fit, by name.
    """
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"path={path} is not a model folder: it has no config.json."
        )
    runtime.prepare()
    partition = make_partition(mesh) if mesh is not None else None
    place = None if partition is None else placed_on(partition)
    found = checkpoint.load(
        path,
        dtype=dtype,
        beacon=beacon,
        ignore_sliding_window=ignore_sliding_window,
        place=place,
    )
    try:
        tokenizer = checkpoint.load_tokenizer(path)
    except FileNotFoundError:
        tokenizer = None
    variables = jax.tree.map(jnp.asarray, found.variables)
    return Model(found.config, variables, tokenizer, found.identity, partition)


def placed_on(partition: Partition) -> Place:
    """Where `hf.checkpoint.load` puts each tensor: as its logical axes say."""

    def place(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Any:
        axes: Any = variable_axes(config)
        for key in name.split("/"):
            axes = axes[key]
        return partition.sharding(axes, shape, name), None

    return place
