"""The handle that notebooks and command lines use: a model with its tokenizer."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.core.loop import check_capacity
from beacon_jax.core.memory import (
    CapacityError,
    MemoryState,
    default_window,
    init_memory,
)
from beacon_jax.hf import checkpoint
from beacon_jax.inference.decode import decode
from beacon_jax.inference.plan import Ratio, plan_ratios, warn_beyond_training
from beacon_jax.inference.prefill import buffer_size, compute_dtype, prefill
from beacon_jax.inference.sampling import make_sampling
from beacon_jax.model.config import BeaconConfig, ModelConfig

Text = str | Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Model.complete` returns.

    Attributes:
      text: the new text, without the end token ("" for a model without tokenizer).
      tokens: its token ids, int32 [n].
      memory: holds the context, the prompt and these tokens; pass it on to continue.
      prompt_tokens: tokens read, context and prompt.
      prefill_seconds, decode_seconds: wall time, compilation included.
    """

    text: str
    tokens: np.ndarray
    memory: MemoryState
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to use: `load` makes one.

    Attributes:
      config: the model and its beacons.
      variables: {"params": tree, "beacon": tree} of jax arrays.
      tokenizer: a transformers tokenizer; None: only token ids go in and out.
    """

    config: ModelConfig
    variables: dict[str, Any] = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)

    def compress(
        self,
        context: Text,
        ratio: Ratio = None,
        *,
        memory: MemoryState | None = None,
        capacity: int | None = None,
        seed: int = 0,
    ) -> MemoryState:
        """Reads a context of any length into a memory (batch of 1).

        Args:
          context: text or token ids.
          ratio: raw tokens per memory slot, one number or a list with one per window;
            0 or "full" keeps everything. None: as `memory` was compressed, else the
            mix of the config.
          memory: is continued, not changed; None: a new one.
          capacity: slots of the buffer; None: as many as needed.
          seed: of a random ratio mix.

        Raises:
          ValueError: an empty context, or a ratio that the model cannot use.
          CapacityError: `capacity` is too small; it states what is needed.
        """
        tokens = self.encode(context, "context", first=memory is None)
        ratios = self._plan(ratio, memory, len(tokens), 0, seed)
        memory = self._room(memory, ratios, len(tokens), capacity)
        return prefill(self.config, self.variables, memory, tokens[None], ratios)[1]

    def complete(
        self,
        prompt: Text,
        *,
        context: Text | None = None,
        memory: MemoryState | None = None,
        ratio: Ratio = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        capacity: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continues [memory | context | prompt]; see `compress` and `Sampling`.

        Args:
          context: read before the prompt; None: nothing.
          max_new_tokens: at most; an end token stops earlier.
          seed: of sampling, and of a random ratio mix.
          on_text: called with each piece of the text as it is ready.

        Raises:
          ValueError: a prompt of 0 tokens, or an argument out of range (named).
          CapacityError: `capacity` is too small; it states what is needed.
        """
        sampling = make_sampling(temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
        start = time.perf_counter()
        first = memory is None and context is None
        tokens = self.encode(prompt, "prompt", first=first)
        if context is not None:
            before = self.encode(context, "context", first=memory is None)
            tokens = np.concatenate([before, tokens])
        ratios = self._plan(ratio, memory, len(tokens), max_new_tokens, seed)
        total = len(tokens) + max_new_tokens
        memory = self._room(memory, ratios, total, capacity)
        logits, memory = prefill(
            self.config, self.variables, memory, tokens[None], ratios
        )
        jax.block_until_ready(logits)
        middle = time.perf_counter()
        show = _Shown(self.tokenizer, on_text)
        result = decode(
            self.config,
            self.variables,
            memory,
            logits,
            ratios,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            on_tokens=show.add if on_text else None,
        )
        new = result.tokens[0, : result.lengths[0]]
        text = self.tokenizer.decode(new) if self.tokenizer else ""
        show.finish(text)
        end = time.perf_counter()
        return Generation(
            text, new, result.memory, len(tokens), middle - start, end - middle
        )

    def generate(self, prompt: Text, **options: Any) -> str:
        """The text of `complete`, which documents the options."""
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer=None: text cannot be returned. Use complete(...).tokens, or "
                "put the tokenizer files into the model's folder."
            )
        return self.complete(prompt, **options).text

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

    def _plan(
        self, ratio: Ratio, memory: MemoryState | None, tokens: int, new: int, seed: int
    ) -> np.ndarray:
        """The ratio of every window, counted from the first of the sequence."""
        before = int(memory.lengths[0]) if memory is not None else 0
        if ratio is None and memory is not None and before:
            ratio = int(memory.ratio[0])
        ratios = plan_ratios(
            self.config, ratio, length=before + tokens, new_tokens=new, seed=seed
        )
        warn_beyond_training(self.config, ratios, before + tokens + new)
        return ratios

    def _room(
        self,
        memory: MemoryState | None,
        ratios: np.ndarray,
        new: int,
        capacity: int | None,
    ) -> MemoryState:
        """A buffer that `new` tokens fit into: `capacity`, or large enough."""
        if memory is None:
            dtype = compute_dtype(self.variables)
            memory = init_memory(self.config, 1, capacity or 1, dtype)
        elif capacity:
            memory = memory.resized(capacity)
        try:
            check_capacity(self.config, memory, np.array([new]), ratios)
        except CapacityError as error:
            if capacity:
                raise
            size = buffer_size(error.needed, default_window(self.config))
            memory = memory.resized(size)
        return memory


class _Shown:
    """Turns blocks of tokens into text, keeping back what may still change."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.done = ""

    def add(self, block: np.ndarray) -> None:
        self.tokens += [int(t) for t in block[0] if t >= 0]
        # A character cut in two decodes to U+FFFD until its other bytes are there.
        self.finish(self.tokenizer.decode(self.tokens).rstrip("\ufffd"))

    def finish(self, text: str) -> None:
        if self.on_text and len(text) > len(self.done):
            self.on_text(text[len(self.done) :])
            self.done = text


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    beacon: BeaconConfig | None = None,
    ignore_sliding_window: bool = False,
) -> Model:
    """A model from an HF folder or a converted folder, on the default device.

    Args:
      path: a folder with config.json, weights and tokenizer files.
      dtype: "float32", "bfloat16" or "float16"; None: as stored.
      beacon: other beacon settings; a plain model gets untrained beacons.
      ignore_sliding_window: attend to everything although config.json has a window.

    Raises:
      ValueError, FileNotFoundError: what is missing or does not fit, by name.
    """
    if not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"path={path} is not a model folder: it has no config.json."
        )
    found = checkpoint.load(
        path, dtype=dtype, beacon=beacon, ignore_sliding_window=ignore_sliding_window
    )
    try:
        tokenizer = checkpoint.load_tokenizer(path)
    except FileNotFoundError:
        tokenizer = None
    return Model(found.config, jax.tree.map(jnp.asarray, found.variables), tokenizer)
