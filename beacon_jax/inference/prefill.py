"""Plans the ratios and the buffer, and feeds a prompt of any length into the memory."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.core.loop import check_capacity, feed
from beacon_jax.core.memory import MemoryState, default_window
from beacon_jax.core.windows import draw_ratios
from beacon_jax.model.config import ModelConfig

Ratio = int | Sequence[int] | str | None


def plan_ratios(
    config: ModelConfig,
    ratio: Ratio,
    *,
    length: int,
    new_tokens: int = 0,
    seed: int = 0,
) -> Int[np.ndarray, " P"]:
    """The ratio of every window of a sequence of length + new_tokens tokens.

    Args:
      ratio: a number for all windows; a list with one per window, whose last goes on;
        0 or "full" for full attention; None for the mix of the config (SPEC section 3).
      length: tokens of the first call, which adapt-F chooses by.
      seed: of the random mixes.

    Returns:
      [P], P the next power of two of the number of windows, so that few programs serve
      all lengths.

    Raises:
      ValueError: a ratio that does not divide the window (naming those that do), or
        any but 0 for a model without beacons.
    """
    count = _power_of_two(-(-(length + new_tokens) // default_window(config)))
    if ratio is None:
        return draw_ratios(config, count, seed=seed, length=length)
    if isinstance(ratio, str):
        if ratio != "full":
            raise ValueError(f"ratio={ratio!r} must be a number, a list or 'full'.")
        ratio = 0
    return draw_ratios(
        config, count, mix="list", ratios=np.atleast_1d(ratio).astype(int).tolist()
    )


def positions(
    config: ModelConfig, ratios: Int[np.ndarray, " P"], length: int, used: int = 0
) -> int:
    """The most positions that a row of `length` tokens takes at once (SPEC section 2).

    Args:
      ratios: of the windows of those tokens, the first being the one after `used`.
      used: slots that the memory has before them.
    """
    window = default_window(config)
    most = used
    for w in range(-(-length // window)):
        r = int(ratios[min(w, len(ratios) - 1)])
        raw = min(window, length - w * window)
        most = max(most, used + raw + (raw // r if r else 0))
        used += window // r if r else window
    return most


def fitting_ratio(config: ModelConfig, length: int) -> int | None:
    """The smallest uniform ratio whose positions stay within those trained."""
    window = default_window(config)
    for r in range(1, window + 1 if config.beacon else 0):
        plan = np.array([r])
        if window % r == 0 and (
            positions(config, plan, length) <= config.trained_positions
        ):
            return r
    return None


def warn_beyond_training(
    config: ModelConfig,
    ratios: Int[np.ndarray, " P"],
    length: int,
    memory: MemoryState | None = None,
) -> None:
    """Warns, once per model and process, if positions pass those trained.

    Args:
      ratios: of all windows of the sequence.
      length: all its tokens, those in the memory too.
    """
    done, used = 0, 0
    if memory is not None:
        done, used = int(memory.windows.max()), int(memory.slots.max())
    rest = length - done * default_window(config)
    most = positions(config, ratios[min(done, len(ratios) - 1) :], rest, used)
    if most > config.trained_positions:
        fits = fitting_ratio(config, length)
        plain = dataclasses.replace(config, beacon=None)
        _warn_once(plain, f"{length} tokens take {most} positions", fits)


@functools.cache
def _warned(config: ModelConfig) -> list[str]:
    return []


def _warn_once(config: ModelConfig, what: str, fits: int | None) -> None:
    if not _warned(config):
        warnings.warn(
            f"{what}, the model was trained for {config.trained_positions}: it "
            "extrapolates, expect worse text. "
            + (f"ratio={fits} would fit." if fits else "No ratio would fit."),
            stacklevel=5,
        )
        _warned(config).append(what)


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
    ratios: Int[np.ndarray, "*B P"],
    lengths: Int[np.ndarray, " B"] | None = None,
    *,
    close: bool = True,
    donate: bool = False,
    piece: int | None = None,
    on_piece: Callable[[int], None] | None = None,
) -> tuple[Float[Array, "B V"], MemoryState]:
    """Feeds the tokens behind what the memory holds: one scan over all windows.

    The scan's length is the next power of two of the windows, those past a row's end
    cost nothing, and so one compiled program serves a doubling of lengths.

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
    window = default_window(config)
    if piece is not None and (piece < 1 or piece % window):
        raise ValueError(f"piece={piece} must be a multiple of the window, {window}.")
    # `feed` checks each piece; a text that does not fit is to fail before the first.
    check_capacity(config, memory, lengths, ratios)
    whole = window * _power_of_two(-(-total // window))
    size = whole if piece is None else min(piece, whole)
    memory = memory if donate else memory.copy()
    logits = None
    for start in range(0, total, size):
        part = np.zeros((rows, size), np.int32)
        here = tokens[:, start : start + size]
        part[:, : here.shape[1]] = here
        count = np.clip(lengths - start, 0, size).astype(np.int32)
        out, memory = feed(
            config,
            variables,
            memory,
            jnp.asarray(part),
            jnp.asarray(count),
            jnp.asarray(ratios),
            dtype=compute_dtype(variables),
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


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
