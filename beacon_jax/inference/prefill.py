"""Sizes the buffer, and feeds a prompt of any length into the memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.core.law import default_window
from beacon_jax.core.loop import feed
from beacon_jax.core.memory import MemoryState
from beacon_jax.core.plan import check_capacity
from beacon_jax.model.net import Net


def buffer_size(needed: int, window: int) -> int:
    """Returns the slots to allocate, so that similar lengths share a compiled program.

    They are `needed`, rounded up to 4 sizes per doubling (at most 25 % more).
    """
    step = max(2 ** (max(math.ceil(math.log2(max(needed, 1))), 3) - 3), 1)
    return max(-(-needed // step) * step, window)


def prefill(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[np.ndarray, "B T"],
    ratios: Int[np.ndarray, "*B P"],
    lengths: Int[np.ndarray, " B"] | None = None,
    *,
    close: bool = True,
    donate: bool = False,
    piece: int | None = None,
    on_piece: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B V"], MemoryState]:
    """Feeds the tokens behind what the memory holds: one scan over all windows.

    The scan's length is the number of windows, rounded up to a power of two, so one
    compiled program serves a doubling of lengths. Windows past a row's end cost
    nothing.

    Args:
      tokens: right padded; T is free.
      ratios: of the windows of the whole sequence, counted from its first token; one
        plan for all rows or one per row (equal in every step of this call).
      lengths: real tokens per row, at least 1; None: T for all.
      close: False leaves a last window that is exactly full open, uncompressed.
      donate: the memory passed in is not needed again: its buffer is written in place.
      piece: tokens per scan, a multiple of the window: several scans of one program,
        so that a long prompt can show its progress and be saved on the way.
      on_piece: called with the number of tokens fed so far after each scan.

    Returns:
      The logits after each row's last token, and the new memory; the one passed in is
      not changed unless it is donated.

    Raises:
      ValueError: a row of 0 tokens, or a piece that is no multiple of the window.
      CapacityError: the memory is too small; it states the capacity needed.
    """
    tokens = np.asarray(tokens, np.int32)
    rows, total = tokens.shape
    lengths = np.full(rows, total) if lengths is None else np.asarray(lengths)
    if total == 0 or lengths.min() < 1:
        raise ValueError(
            f"tokens has rows of lengths {lengths.tolist()}: each needs at least 1."
        )
    window = default_window(net.config)
    if piece is not None and (piece < 1 or piece % window):
        raise ValueError(f"piece={piece} must be a multiple of the window, {window}.")
    # `feed` checks each piece; a text that does not fit is to fail before the first.
    check_capacity(net.config, memory, lengths, ratios)
    whole = window * power_of_two(-(-total // window))
    size = whole if piece is None else min(piece, whole)
    memory = memory if donate else memory.copy()
    logits = None
    for start in range(0, total, size):
        part = np.zeros((rows, size), np.int32)
        here = tokens[:, start : start + size]
        part[:, : here.shape[1]] = here
        count = np.clip(lengths - start, 0, size).astype(np.int32)
        out, memory = feed(
            net,
            variables,
            memory,
            jnp.asarray(part),
            jnp.asarray(count),
            jnp.asarray(ratios),
            close=close or start + size < total,
            donate=True,
        )
        last = out.last_logits
        # A row that ended in an earlier piece keeps the logits it had there.
        logits = last if logits is None else jnp.where(count[:, None] > 0, last, logits)
        if on_piece:
            jax.block_until_ready(logits)
            on_piece(min(start + size, total))
    assert logits is not None
    return logits, memory


def power_of_two(n: int) -> int:
    """Returns the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()
