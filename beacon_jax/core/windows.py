"""Index arithmetic on the host: cutting into windows, drawing ratios."""

import math
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from beacon_jax.core.memory import default_window
from beacon_jax.model.config import ModelConfig, check_ratio


def window_slots(config: ModelConfig, ratio: int, *, first: bool, window: int) -> int:
    """Counts the slots that a full window leaves (docs/specification.md section 2)."""
    if ratio == 0:
        return window
    sink = config.beacon.sink if config.beacon and first else 0
    return window // ratio + sink


def open_room(config: ModelConfig, ratios: Sequence[int], window: int) -> int:
    """Counts the entries of an open window and of its beacons at any of the ratios."""
    most = max((window // r for r in set(ratios) if r > 0), default=0)
    sink = config.beacon.sink if config.beacon else 0
    return window + max(most, sink)


def capacity(
    config: ModelConfig, ratios: Sequence[int] | Int[np.ndarray, " N"], *, window=None
) -> int:
    """Counts the slots that these full windows and an open one behind them need."""
    w = window or default_window(config)
    ratios = [int(r) for r in ratios]
    slots = sum(
        window_slots(config, r, first=i == 0, window=w) for i, r in enumerate(ratios)
    )
    return slots + open_room(config, ratios, w)


def plan_slots(config: ModelConfig, plan: Int[np.ndarray, " N"]) -> int:
    """Counts the slots that a plan appends; its last window is not compressed."""
    w = default_window(config)
    closed = enumerate(int(r) for r in plan[:-1])
    return sum(window_slots(config, r, first=i == 0, window=w) for i, r in closed)


def memory_slots(config: ModelConfig, windows: int, *, likely: bool = False) -> int:
    """Counts the slots that a training plan of `windows` windows may append.

    Args:
      likely: enough for all but a few of the plans with a ratio drawn for every window
        (mean + 3 standard deviations of the sum, 1 plan in 700 and fewer); the others
        are to be drawn again. At 128 windows and ratios 2 to 32 half of the worst case.
    """
    assert config.beacon is not None
    w, closed = default_window(config), max(windows - 1, 0)
    ratios = [r for r in config.beacon.ratios if r > 0]
    sizes = np.asarray([w // r for r in ratios] or [0])
    most = closed * int(sizes.max())
    if likely:
        spread = 3 * sizes.std() * closed**0.5
        most = min(most, math.ceil(sizes.mean() * closed + spread))
    zero = w - int(sizes.min()) if 0 in config.beacon.ratios and closed else 0
    return most + zero + (config.beacon.sink if closed else 0)


def adaptive_ratio(
    config: ModelConfig, ratios: Sequence[int], length: int, future: int
) -> int:
    """Returns the ratio of the smallest capacity that holds length + future tokens.

    The rule `adapt-F` of docs/specification.md section 3.
    """
    p, w = config.trained_positions, default_window(config)
    room = {r: (p if r == 0 else (p - w) * r + w) for r in ratios}
    enough = [r for r in ratios if room[r] >= length + future]
    return int(min(enough, key=room.__getitem__) if enough else max(ratios))


def draw_ratios(
    config: ModelConfig,
    windows: int,
    *,
    mix: str | None = None,
    ratios: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    length: int | None = None,
    training: bool = False,
) -> Int[np.ndarray, " N"]:
    """Draws the ratio of each window of a sequence: a function of the arguments.

    Args:
      windows: N, windows to draw for.
      mix: step-random (a draw per window; the paper's choice), instance-random (one
        per sequence), sequence (cycle), adapt-F, or "list": `ratios` are the windows'
        ratios themselves, the last one going on. Default: the config's.
      ratios: to draw from; default: the config's. 0 means "do not compress".
      seed: of numpy's generator, a number or a sequence of numbers.
      length: tokens of the sequence (training) or of its first call (adapt-F); N * W if
        not given.
      training: keeps 0 to one window per sequence, where start + 2 W <= length.

    Raises:
      ValueError: an unknown mix, no ratio, or a ratio that does not divide the window.
    """
    w = default_window(config)
    length = windows * w if length is None else length
    if config.beacon is None:
        if ratios is not None and any(r != 0 for r in ratios):
            raise ValueError(
                f"ratios={list(ratios)} need beacons, but this model has none: use "
                "ratio 0, which keeps everything, or train beacons first."
            )
        return np.zeros(windows, np.int32)
    choices = [int(r) for r in (config.beacon.ratios if ratios is None else ratios)]
    if not choices:
        raise ValueError(f"ratios={choices} is empty: give at least one ratio.")
    for ratio in choices:
        check_ratio(ratio, w)
    mix = config.beacon.ratio_mix if mix is None else mix
    if mix == "list":
        tail = [choices[-1]] * max(windows - len(choices), 0)
        return np.asarray((choices + tail)[:windows], np.int32)
    adaptive = re.fullmatch(r"adapt-(\d+)", mix)
    if adaptive:
        ratio = adaptive_ratio(config, choices, length, int(adaptive[1]))
        return np.full(windows, ratio, np.int32)
    if mix not in ("step-random", "instance-random", "sequence"):
        raise ValueError(
            f"mix={mix!r} is unknown: use step-random, instance-random, sequence, "
            f"adapt-N or list."
        )
    rng = np.random.default_rng(seed)
    nonzero = [r for r in choices if r] or choices
    once = int(rng.choice(choices))
    drawn: list[int] = []
    for i in range(windows):
        zero_allowed = not training or (0 not in drawn and (i + 2) * w <= length)
        if mix == "sequence":
            ratio = choices[i % len(choices)]
            if ratio == 0 and not zero_allowed:
                ratio = nonzero[i % len(nonzero)]
        elif mix == "instance-random":
            ratio = once if once or zero_allowed else nonzero[0]
        else:
            ratio = int(rng.choice(choices if zero_allowed else nonzero))
        drawn.append(ratio)
    return np.asarray(drawn, np.int32)


def split_windows(
    tokens: np.ndarray,
    lengths: np.ndarray | None,
    window: int,
    *,
    count: int | None = None,
    align: str = "left",
    fill: float = 0,
) -> tuple[np.ndarray, Int[np.ndarray, "N B"]]:
    """Cuts right-padded rows [B, T] into windows [N, B, W] and counts valid entries.

    Args:
      lengths: real entries per row; T if not given.
      count: N, at least the windows that the longest row needs.
      align: "left", or "right": every row's LAST window is the last one (training,
        docs/specification.md section 3), shorter rows having empty windows in front.
      fill: value of entries that no row has.

    Returns:
      windows [N, B, W] and valid [N, B], the real entries of each.
    """
    b, t = tokens.shape
    lengths = np.full(b, t, np.int32) if lengths is None else np.asarray(lengths)
    needed = -(-lengths // window)
    n = int(needed.max(initial=1)) if count is None else count
    if n < needed.max(initial=0):
        raise ValueError(
            f"count={count} windows are too few: the longest row needs {needed.max()}."
        )
    out = np.full((b, n * window), fill, tokens.dtype)
    valid = np.zeros((b, n), np.int32)
    for row in range(b):
        skip = n - needed[row] if align == "right" else 0
        out[row, skip * window :][: lengths[row]] = tokens[row, : lengths[row]]
        valid[row] = np.clip(lengths[row] - window * (np.arange(n) - skip), 0, window)
        valid[row, :skip] = 0
    return out.reshape(b, n, window).transpose(1, 0, 2), valid.T
