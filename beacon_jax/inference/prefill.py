"""Sizes the buffer, and feeds a prompt of any length into the memory.

A prompt is fed in pieces of a power-of-two number of windows, at most `PIECE_WINDOWS`:
one compile per size, and all longer prompts share the largest.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.core.loop import check_capacity, feed
from beacon_jax.core.memory import MemoryState, default_window
from beacon_jax.model.config import ModelConfig

PIECE_WINDOWS = 16  # 16K tokens for Llama-2; a shorter prompt takes a smaller piece


def buffer_size(needed: int, window: int) -> int:
    """Slots to allocate: `needed`, rounded up to 4 sizes per doubling (at most 25 %
    more), so that sequences of similar length share a compiled program."""
    step = max(2 ** (max(math.ceil(math.log2(max(needed, 1))), 3) - 3), 1)
    return max(-(-needed // step) * step, window)


def compute_dtype(variables: dict[str, Any]) -> Any:
    """Activations and memory take the dtype that the weights are stored in."""
    return variables["params"]["embed"]["embedding"].dtype


def prefill(
    config: ModelConfig,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[np.ndarray, "B T"],
    ratios: Int[np.ndarray, " P"],
    lengths: Int[np.ndarray, " B"] | None = None,
) -> tuple[Float[Array, "B V"], MemoryState]:
    """Feeds the tokens behind what the memory holds.

    Args:
      tokens: right padded; T is free.
      ratios: of the windows of the whole sequence, counted from its first token.
      lengths: real tokens per row, at least 1; None: T for all.

    Returns:
      The logits after each row's last token, and the new memory; the one passed in is
      not changed.

    Raises:
      ValueError: a row of 0 tokens.
      CapacityError: the memory is too small; it states the capacity needed.
    """
    tokens = np.asarray(tokens, np.int32)
    rows, total = tokens.shape
    lengths = np.full(rows, total) if lengths is None else np.asarray(lengths)
    if total == 0 or lengths.min() < 1:
        raise ValueError(
            f"tokens has rows of lengths {lengths.tolist()}: each needs at least 1."
        )
    # `feed` checks each piece; a text that does not fit is to fail before the first.
    check_capacity(config, memory, lengths, ratios)
    window = default_window(config)
    size = window * min(_power_of_two(-(-total // window)), PIECE_WINDOWS)
    logits = None
    for start in range(0, total, size):
        piece = np.zeros((rows, size), np.int32)
        part = tokens[:, start : start + size]
        piece[:, : part.shape[1]] = part
        count = np.clip(lengths - start, 0, size).astype(np.int32)
        out, memory = feed(
            config,
            variables,
            memory,
            jnp.asarray(piece),
            jnp.asarray(count),
            jnp.asarray(ratios),
            dtype=compute_dtype(variables),
        )
        last = out.last_logits
        # A row that ended in an earlier piece keeps the logits it had there.
        logits = last if logits is None else jnp.where(count[:, None] > 0, last, logits)
    assert logits is not None
    return logits, memory


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
