"""The handle that notebooks and command lines use: a model with its tokenizer."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack, overload

import jax
import numpy as np

from beacon_jax.core.law import default_window
from beacon_jax.core.memory import slot_nbytes
from beacon_jax.hf.identify import Identity
from beacon_jax.inference import room, stream, validate
from beacon_jax.inference.account import ID_NBYTES
from beacon_jax.inference.budget import Budget
from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.decode import Decoded, Decoding, decode
from beacon_jax.inference.ends import named
from beacon_jax.inference.feeding import (
    Fit,
    check_memory,
    choose_dtype,
    choose_recent,
    decoded_memory,
    feed_rows,
    histories,
)
from beacon_jax.inference.generation import Generation
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.options import (
    Batch,
    CompleteOptions,
    Completion,
    Reading,
    ReadOptions,
    Stream,
    Text,
    Texts,
    collect,
    documented,
)
from beacon_jax.inference.piecewise import (
    choose_compressor,
    feed_compressed,
    planning,
)
from beacon_jax.inference.plan import (
    Plan,
    Ratio,
    make_plan,
    stack_ratios,
    warn_beyond_training,
    warn_of_ratios,
)
from beacon_jax.inference.sampling import make_sampling, seen_tokens
from beacon_jax.inference.spans import token_spans
from beacon_jax.inference.template import (
    check_template,
    encode_question,
    ended_at_once,
    turn_ends,
)
from beacon_jax.inference.text import Streamer, finisher
from beacon_jax.inference.timing import AnswerWatch
from beacon_jax.inference.validate_ratio import check_ratios
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from beacon_jax.model.partition import Partition
from beacon_jax.tokenise import check_ids, encode


@dataclasses.dataclass(frozen=True, repr=False)
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
      path: the folder that it was loaded from; None: it was made in memory.
    """

    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Any = None
    identity: Identity = dataclasses.field(default_factory=Identity)
    partition: Partition | None = None
    path: Path | None = None

    def __repr__(self) -> str:
        c, b = self.config, self.config.beacon
        leaves = jax.tree.leaves(self.variables)
        devices = self.partition.mesh.size if self.partition else 1
        kind = next(iter(leaves[0].devices())).device_kind
        parts = [
            f"{c.family}: {sum(x.size for x in leaves):,} parameters",
            f"{c.num_layers} layers",
            self.net.dtype.name,
            f"{c.trained_positions:,} positions",
            f"window {b.window}, ratios {', '.join(map(str, b.ratios))}"
            if b
            else "no beacons",
            f"{devices} x {kind}" if devices > 1 else kind,
        ]
        return f"Model({', '.join(parts)})"

    def describe(self) -> str:
        """Describes the model in lines of text: what it is, and what ends its answers.

        End tokens are those of config.json, generation_config.json and the tokenizer.
        """
        ends = named(self.config.eos_ids, self.tokenizer)
        where = [f"from {self.path}"] if self.path else []
        return "\n".join([repr(self), f"end tokens: {ends}", *where])

    @functools.cached_property
    def net(self) -> Net:
        """What its programs depend on besides arrays."""
        return Net.of(self.config, self.variables, self.partition)

    @property
    def window(self) -> int:
        """W, the tokens that are compressed at a time."""
        return default_window(self.config)

    @documented(Reading)
    def compress(
        self,
        context: Texts | Stream,
        ratio: Ratio = None,
        *,
        memory: Memory | None = None,
        reserve: int = 0,
        on_note: Callable[[str], None] | None = None,
        **options: Unpack[ReadOptions],
    ) -> Memory:
        """Reads contexts of any length into a memory.

        Args:
          context: one text, or a list of them for a memory of as many rows; or a file
            (a `Path`, UTF-8) or an iterator of pieces of one text, of any length: it is
            read as it comes, and its tokens are not kept (`stream`).
          ratio: raw tokens per memory slot: one number, a list with one per window, a
            function (window, start, stop) -> ratio; 0 or "full" keeps everything;
            "auto" takes the smallest trained ratio whose positions fit, or "auto-8"
            x8, but no compression where that needs fewer FLOPs. None: as `memory` was
            compressed, else the mix of the config.
          memory: is continued, not changed; None: a new one.
          method: "beacon" (None: if the model has beacons), or what needs no training
            and works on any model: "streaming", "snapkv", "expected-attention",
            "kvzip", "attention-matching", "mean-pool", or a `Compressor` of one's own;
            "retention:FOLDER" has weights for one model (`beacon-jax retain`). These
            leave as many slots as beacons; what does not fill a window, and what is
            generated, they leave as it is.
          max_slots, max_bytes: in place of `ratio`, a budget per row: the smallest
            uniform ratio that fits, then lower ones for the latest windows.
          slot_cap: most slots of one text of any length, at one ratio. When there would
            be more, the older half is thinned: of two neighbours the later one stays.
          spans: what must not be compressed: a regex, or token ranges of the context.
          lossless: "windows" keeps every window that a span touches at ratio 0;
            "slots" only the span's own entries beside the beacons, which no model was
            trained for.
          capacity: slots of the buffer; None: as many as needed.
          reserve: tokens that are to follow (questions, answers), which "auto", budgets
            and the buffer leave room for.
          memory_dtype: of keys and values: "int8" takes about half of bfloat16; None:
            what the model computes in. A memory that is continued stays what it is.
          recent: True keeps the last full window of each row raw: exact recent tokens,
            W slots more. When the next window is full, it is compressed, and that one
            stays raw. None: as `memory` was made, which goes on so; without one, False.
          seed: of a random ratio mix.
          on_note: called, before anything is fed, with each line on what was decided:
            by "auto", for a budget, and what `spans` cost.
          on_progress: called with (tokens fed, of how many) after each piece of
            `progress_windows` windows, rows of a batch together; None: a row is fed as
            one piece. What it raises ends the call.
          progress_windows: windows of a piece.

        Raises:
          TypeError: an argument of another type, or one that does not exist.
          ValueError: an empty context, a ratio that the model cannot use, a budget
            that nothing fits into, or another dtype than `memory` has.
          CapacityError: `capacity` is too small; it states what is needed.
        """
        validate.model(self, Model, "compress")
        asked = collect(Reading, "compress", {"ratio": ratio, **options})
        if stream.wanted(context, asked.slot_cap):
            validate.options(asked, 1)
            return stream.compress(self, context, memory, asked, reserve)
        contexts, _ = validate.texts("context", context)
        validate.options(asked, len(contexts))
        validate.memory(memory, Memory)
        method = choose_compressor(self.config, memory, asked)
        config = planning(self.config) if method else self.config
        check_ratios(asked.ratio, config)
        validate.numbers("reserve", reserve)
        validate.callback("on_note", on_note, "line of text")
        dtype = choose_dtype(self, memory, asked.memory_dtype)
        rows, marked = [], []
        for row, each in enumerate(contexts):
            first, after = _before(memory, row)
            rows.append(self.encode(each, "context", first=first, after=after))
            spans = asked.spans, each, self.tokenizer
            marked.append(token_spans(*spans, first=first, after=after))
        recent = choose_recent(self, memory, asked, any(map(len, marked)))
        plans = self._plans(rows, marked, memory, asked, dtype, reserve, method)
        if on_note:
            for note in dict.fromkeys(plan.note for plan in plans if plan.note):
                on_note(note)
        piece = asked.progress_windows
        fit = Fit(asked.capacity, reserve, dtype, recent, logits=False, piece=piece)
        if method is not None:
            shown = asked.on_progress
            return feed_compressed(self, method, rows, plans, memory, fit, shown)
        return feed_rows(self, rows, plans, memory, fit, asked.on_progress)[1]

    @overload
    def complete(
        self,
        prompt: Text,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Generation: ...

    @overload
    def complete(
        self,
        prompt: Batch,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> list[Generation]: ...

    @overload
    def complete(
        self,
        prompt: Texts,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Generation | list[Generation]: ...

    @documented(Completion)
    def complete(
        self,
        prompt: Texts,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> Generation | list[Generation]:
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
          instruct: each prompt is a question, written in the tokenizer's chat template
            behind the context, as `Chat` does; instruct models expect it.
          on_text: called with each piece of the text as it is ready; for a list of
            prompts with (row, piece).
          on_tokens: called with the number of new tokens of all rows as they come.
          on_progress: as in `compress`, while the context and the prompts are read.

        Raises:
          TypeError: an argument of another type, or one that does not exist.
          ValueError: a prompt of 0 tokens, an argument out of range (named), or
            `instruct` with a tokenizer that has no template.
          CapacityError: `capacity` is too small; it states what is needed.
        """
        validate.model(self, Model, "complete")
        asked = collect(Completion, "complete", options)
        prompts, single = validate.texts("prompt", prompt)
        count = len(prompts)
        validate.options(asked, count, single=single)
        validate.memory(memory, Memory)
        method = choose_compressor(self.config, memory, asked)
        if method is None:
            check_ratios(asked.ratio, self.config)
        if asked.instruct:
            check_template(self.tokenizer)
        if method is not None or stream.wanted(context, asked.slot_cap):
            memory = self._context_memory(context, memory, asked, count)
            asked, context = asked.read(), None
        streams = self._streams(asked, None if single else count)
        start, watch = time.perf_counter(), AnswerWatch(asked.on_tokens)
        dtype = choose_dtype(self, memory, asked.memory_dtype)
        if memory is not None and len(memory) == 1 < count:
            memory = memory.repeat(count)
        new = np.broadcast_to(np.asarray(asked.max_new_tokens, int), (count,))
        rows, marked = self._prompt_rows(prompts, context, memory, asked)
        recent = choose_recent(self, memory, asked, any(map(len, marked)))
        plans = self._plans(rows, marked, memory, asked, dtype, int(new.max()))
        fit = Fit(asked.capacity, new, dtype, recent, piece=asked.progress_windows)
        logits, after = feed_rows(self, rows, plans, memory, fit, asked.on_progress)
        jax.block_until_ready(logits)
        middle = time.perf_counter()
        result = self._decode(after, logits, plans, asked, streams, watch.block)
        after = decoded_memory(after, plans, result)
        texts = [stream.finish() for stream in streams]
        end, timing = time.perf_counter(), watch.timing(result.lengths)
        ended = (result.lengths < new) | [s.keep is not None for s in streams]
        made = [
            Generation(
                text=texts[i],
                tokens=result.tokens[i, : result.lengths[i]],
                finish="stop" if ended[i] else "length",
                note=self._note(plans[i], streams[i], asked.instruct),
                prompt_tokens=len(rows[i]),
                prefill_seconds=middle - start,
                decode_seconds=end - middle,
                batch=after,
                row=i,
                timing=timing,
            )
            for i in range(count)
        ]
        return made[0] if single else made

    @overload
    def generate(
        self,
        prompt: Text,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Batch,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: Texts,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> str | list[str]: ...

    @documented(Completion)
    def generate(
        self,
        prompt: Texts,
        *,
        context: Texts | Stream | None = None,
        memory: Memory | None = None,
        **options: Unpack[CompleteOptions],
    ) -> str | list[str]:
        """Returns the text of `complete`, which has the options; texts for a list."""
        validate.model(self, Model, "generate")
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer=None: text cannot be returned. Use complete(...).tokens, or "
                "put the tokenizer files into the model's folder."
            )
        made = self.complete(prompt, context=context, memory=memory, **options)
        return [m.text for m in made] if isinstance(made, list) else made.text

    def encode(
        self, text: Text, name: str, *, first: bool, after: int | str | None = None
    ) -> np.ndarray:
        """Returns the token ids [n] of a text, or those that are given.

        Args:
          name: what it is, for messages.
          first: the text is the first of its row and begins as the tokenizer begins
            texts (bos); else it goes on behind what the row has (`tokenise`).
          after: the text of that, or its last token; None: neither is known.

        Raises:
          ValueError: no token, no row of tokens, one that the model has no embedding
            of, or a text with half of a character.
        """
        given = text
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} is text, but the model's folder has no tokenizer files: "
                    "copy them there from the base model, or give token ids."
                )
            validate.readable(name, text)
            at = "start" if first else "behind"
            text = encode(self.tokenizer, text, at, after)
        ids = np.asarray(text)
        if ids.size == 0:
            raise validate.empty(name, given)
        if ids.ndim != 1:
            raise ValueError(
                f"{name} has shape {list(ids.shape)}, it is no row of tokens: give the "
                "token ids of one text, or a list of texts."
            )
        check_ids(ids, self.config.vocab_size, name, self.tokenizer)
        return ids.astype(np.int32)

    # --- the rows of a batch -----------------------------------------------------

    def _context_memory(
        self, context: Any, memory: Memory | None, asked: Completion, rows: int
    ) -> Memory:
        """Returns the memory of contexts that are read before there are prompts."""
        if context is None:
            name = "method" if asked.slot_cap is None else "slot_cap"
            raise validate.ArgumentError(
                name,
                getattr(asked, name),
                "compresses a context",
                remedy=f"give context=..., or leave {name} out: a memory goes on",
                flags=f"give --context, or leave --{name} out: a memory goes on",
            )
        given, single = [context], True
        if not stream.wanted(context, asked.slot_cap):
            given, single = validate.texts("context", context)
        if not single and len(given) not in (1, rows):
            raise validate.per_prompt(len(given), rows)
        if memory is not None and len(memory) == 1 < len(given):
            memory = memory.repeat(len(given))
        names = [field.name for field in dataclasses.fields(Reading)]
        options: Any = {n: getattr(asked, n) for n in names if n != "capacity"}
        options["seed"] = int(np.atleast_1d(asked.seed)[0])
        new = int(np.max(asked.max_new_tokens))
        given = context if stream.wanted(context, asked.slot_cap) else given
        return self.compress(given, memory=memory, reserve=new, **options)

    def _prompt_rows(
        self,
        prompts: list[Text],
        context: Any,
        memory: Memory | None,
        asked: Completion,
    ) -> tuple[list[np.ndarray], list[Any]]:
        """Returns each row's tokens [context | prompt], and the ranges of its spans."""
        contexts: list[Any] = [None] * len(prompts)
        if context is not None:
            given, single = validate.texts("context", context)
            contexts = given * len(prompts) if single else given
            if len(contexts) != len(prompts):
                raise validate.per_prompt(len(contexts), len(prompts))
        elif asked.spans is not None:
            raise ValueError("spans mark parts of the context: give context=...")
        rows, marked = [], []
        for row, (prompt, before) in enumerate(zip(prompts, contexts, strict=True)):
            place = _before(memory, row)
            first, after = place
            tokens = np.zeros(0, np.int32)
            if before is not None:
                tokens = self.encode(before, "context", first=first, after=after)
                known = before if isinstance(before, str) else int(tokens[-1])
                first, after = False, known
            if asked.instruct:
                rest = encode_question(self, prompt, first=first, after=after)
            else:
                rest = self.encode(prompt, "prompt", first=first, after=after)
            rows.append(np.concatenate([tokens, rest]))
            first, after = place
            spans = asked.spans, before, self.tokenizer
            marked.append(token_spans(*spans, first=first, after=after))
        return rows, marked

    def _streams(self, asked: Completion, rows: int | None) -> list[Streamer]:
        """Makes a streamer per row; rows=None: of one text, without its number."""
        stop = turn_ends(self, asked.stop) if asked.instruct else asked.stop
        show = [asked.on_text] * (rows or 1)
        if asked.on_text and rows is not None:
            show = [functools.partial(asked.on_text, row) for row in range(rows)]
        return [Streamer(self.tokenizer, each, stop) for each in show]

    def _note(self, plan: Plan, stream: Streamer, instruct: bool) -> str:
        """Says what there is to say about one row."""
        notes = [plan.note] if plan.note else []
        # A stop string of the user may come first too; that needs no explanation.
        if not len(stream) and (stream.keep is None or instruct):
            notes.append(ended_at_once(self, instruct=instruct))
        return "; ".join(notes)

    def _plans(
        self,
        rows: list[np.ndarray],
        spans: list[Any],
        memory: Memory | None,
        asked: Reading,
        dtype: str,
        new: int,
        method: Compressor | None = None,
    ) -> list[Plan]:
        """Makes the plan of each row; warns of what was probably not meant."""
        check_memory(self, memory, len(rows))
        validate.matched(asked.spans, spans)
        before = histories(memory, len(rows), bool(asked.recent))
        lengths = [len(row) for row in rows]
        config = self.config
        if method is None:
            room.check_request(self, asked, lengths, new, before, dtype)
        else:
            config = planning(config)
        biased = memory is not None and memory.state.biased
        biased = biased or (method is not None and method.biased)
        slot = slot_nbytes(self.config, dtype, biased)
        ids = ID_NBYTES * self.window if before[0].recent else 0
        budget = Budget.read(asked.max_slots, asked.max_bytes, slot, ids)
        plans = []
        for row, history, marked in zip(rows, before, spans, strict=True):
            plan = make_plan(
                config,
                asked.ratio,
                length=len(row),
                before=history,
                new_tokens=new,
                budget=budget,
                spans=marked,
                lossless=asked.lossless,
                seed=int(np.atleast_1d(asked.seed)[0]),
                untrained=method is not None,
            )
            warn_beyond_training(config, plan, len(row) + new, history)
            plans.append(plan)
        if method is None:
            warn_of_ratios(config, asked.ratio, plans, lengths, before, new)
        return plans

    def _decode(
        self,
        memory: Memory,
        logits: jax.Array,
        plans: list[Plan],
        asked: Completion,
        streams: list[Streamer],
        on_tokens: Callable[[np.ndarray], None],
    ) -> Decoded:
        """Draws the new tokens of all rows, as `asked` says."""
        seen = None
        if (np.asarray(asked.repetition_penalty) != 1).any():
            seen = self._seen(memory)
        return decode(
            self.net,
            self.variables,
            memory.state,
            logits,
            stack_ratios(plans),
            Decoding(
                max_new_tokens=asked.max_new_tokens,
                sampling=make_sampling(
                    asked.temperature,
                    asked.top_k,
                    asked.top_p,
                    asked.min_p,
                    asked.repetition_penalty,
                ),
                seeds=asked.seed,
                seen=seen,
                finished=finisher(streams) if self.tokenizer else None,
                on_tokens=on_tokens,
            ),
            donate=True,
        )

    def _seen(self, memory: Memory) -> np.ndarray:
        """Marks the tokens of each row [B, V], which the repetition penalty needs."""
        tokens = [row.tokens for row in memory.rows]
        known = [t for t in tokens if t is not None]
        if len(known) < len(tokens):
            raise ValueError(
                "repetition_penalty needs the tokens that the memory was made of, but "
                "they were not kept: save with tokens=True, or leave the penalty at 1."
            )
        return seen_tokens(known, self.config.vocab_size)


def _before(memory: Memory | None, row: int) -> tuple[bool, int | None]:
    """Says behind what the text of a row begins: `first` and `after` of `encode`."""
    if memory is None or row >= len(memory) or not memory.rows[row].length:
        return True, None
    return False, memory.rows[row].last
