"""Plans: the ratio of every window of a text, drawn, looked up and measured in slots.

A plan is an array [P]: the ratio of each window by its number from the text's first
token. Its last one goes on. Several rows have one plan for all, or one each [B, P].
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law, default_window
from beacon_jax.core.memory import CapacityError, MemoryState
from beacon_jax.model.config import ModelConfig, check_ratio

type Ratios = Int[np.ndarray, "*B P"] | Int[jax.Array, "*B P"]

# --- looking a window up ---------------------------------------------------------


def at(ratios: Any, windows: Any) -> Any:
    """Returns the ratios of windows, by their numbers; the last one of a plan goes on.

    Args:
      ratios: a plan [P], or one per row [B, P]; of numpy or jax, traced or not.
      windows: numbers of any shape, or with several plans [B, n].
    """
    arrays = isinstance(ratios, jax.Array) or isinstance(windows, jax.Array)
    xp: Any = jnp if arrays else np
    number = xp.minimum(windows, ratios.shape[-1] - 1)
    if ratios.ndim == 1:
        return ratios[number]
    return xp.take_along_axis(ratios, number, axis=1)


def ahead(
    plan: Int[np.ndarray, " P"], windows: int, count: int, opened: int | None
) -> Int[np.ndarray, " n"]:
    """Returns the ratios of the next `count` windows of a row, the open one first.

    Args:
      windows: closed so far.
      opened: ratio of the open window, which it keeps; None: none is open.
    """
    used = at(plan, windows + np.arange(count)).astype(np.int32)
    if opened is not None:
        used[:1] = opened
    return used


def of_rows(ratios: Ratios, rows: int) -> Int[np.ndarray, "B P"]:
    """Returns a plan for each row, from one for all of them or one for each."""
    plan = np.asarray(ratios, np.int32)
    return np.broadcast_to(plan, (rows, plan.shape[-1]))


# --- what is to come behind a memory ---------------------------------------------


def coming(
    memory: MemoryState, tokens: Any, ratios: Ratios
) -> list[tuple[int, Int[np.ndarray, " n1"]]]:
    """Lists the windows that `tokens` more tokens per row close, and the one behind.

    Reads B small numbers back from the device.

    Args:
      tokens: per row [B], or one number for all.

    Returns:
      For each row its slots, and the ratios of these windows. An open window keeps its
      own ratio. Where windows close of a row that keeps its last full one raw, they
      begin with the one that is raw so far, and end with one at ratio 0.
    """
    again = (0, 0)
    if memory.recent is not None:
        again = (memory.recent.ratio, memory.recent.length)
    state = (memory.slots, memory.raw, memory.ratio, memory.windows, tokens, *again)
    columns = [np.broadcast_to(np.asarray(x), memory.slots.shape) for x in state]
    found = []
    for slots, raw, ratio, windows, new, own, length, plan in zip(
        *columns, of_rows(ratios, memory.rows), strict=True
    ):
        count = (int(raw) + int(new)) // memory.window + 1
        used = ahead(plan, int(windows), count, int(ratio) if raw else None)
        if memory.recent is not None and count > 1:
            used = np.append([own], used)[0 if length else 1 :].astype(np.int32)
            used[-2], slots = 0, slots - length
        found.append((int(slots), used))
    return found


def needed_slots(
    config: ModelConfig, memory: MemoryState, tokens: Any, ratios: Ratios
) -> int:
    """Returns the capacity that `tokens` more per row [B] need."""
    law = Law.of(config, memory.window)
    return max(
        int(law.after(used[:-1], slots)[-1]) + law.room(set(used.tolist()))
        for slots, used in coming(memory, tokens, ratios)
    )


def check_capacity(
    config: ModelConfig, memory: MemoryState, tokens: Any, ratios: Ratios
) -> None:
    """Raises CapacityError unless `tokens` more per row [B] fit."""
    needed = needed_slots(config, memory, tokens, ratios)
    if needed > memory.capacity:
        raise CapacityError(memory.capacity, needed)


def check_shared(memory: MemoryState, tokens: Any, ratios: Ratios) -> None:
    """Raises ValueError if rows need different ratios in one step.

    A step has one ratio for all its rows (`lax.switch` on a scalar).
    """
    w, total = memory.window, np.asarray(memory.raw) + np.asarray(tokens)
    rows = [used for _, used in coming(memory, tokens, ratios)]
    for step in range(int(-(-total.max(initial=0) // w))):
        used = {int(r[step]) for r, t in zip(rows, total, strict=True) if t > step * w}
        if len(used) > 1:
            raise ValueError(
                f"ratios={np.asarray(ratios).tolist()} give the rows of this batch "
                f"different ratios {sorted(used)} in one step: feed rows with equal "
                f"plans together."
            )


def agreeing(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups rows whose ratios agree in every step that both have.

    Args:
      steps: of each row, the ratios of its windows.

    Returns:
      As few groups of row numbers as possible, ascending, by their first row.
    """
    groups: list[list[int]] = []
    # Longest first: a group's first row has all steps of the group, so that a row that
    # agrees with it agrees with the others.
    for i in sorted(range(len(steps)), key=lambda i: -len(steps[i])):
        mine = list(steps[i])
        for group in groups:
            if list(steps[group[0]][: len(mine)]) == mine:
                group.append(i)
                break
        else:
            groups.append([i])
    return sorted(sorted(group) for group in groups)


def static_ratios(memory: MemoryState, ratios: Ratios) -> tuple[int, ...]:
    """Lists the ratios that feeding may meet: planned ones and open windows'."""
    plans, windows = of_rows(ratios, memory.rows), np.asarray(memory.windows)
    opened = np.asarray(memory.ratio)[np.asarray(memory.raw) > 0]
    rest = [p[min(w, len(p) - 1) :] for p, w in zip(plans, windows, strict=True)]
    return tuple(sorted({int(r) for r in np.concatenate([*rest, opened])}))


def capacity(
    config: ModelConfig,
    ratios: Sequence[Any] | Ratios,
    *,
    window: int | None = None,
    recent: bool = False,
) -> int:
    """Counts the slots that these full windows and an open one behind them need.

    Args:
      window: in place of the model's own.
      recent: the last of them stays raw.
    """
    law, given = Law.of(config, window), np.array(ratios, np.int64).reshape(-1)
    room = law.room(set(given.tolist()))
    if recent:
        given[-1:] = 0
    return int(law.after(given)[-1]) + room


# --- slots of training plans -----------------------------------------------------


def plan_slots(config: ModelConfig, plan: Int[np.ndarray, " N"]) -> int:
    """Counts the slots that a plan appends; its last window is not compressed."""
    return int(Law.of(config).after(plan[:-1])[-1])


def memory_slots(config: ModelConfig, windows: int, *, likely: bool = False) -> int:
    """Counts the slots that a training plan of `windows` windows may append.

    Args:
      likely: enough for all but a few of the plans with a ratio drawn for every window
        (mean + 3 standard deviations of the sum, 1 plan in 700 and fewer); the others
        are to be drawn again. At 128 windows and ratios 2 to 32 half of the worst case.
    """
    assert config.beacon is not None
    law, closed = Law.of(config), max(windows - 1, 0)
    ratios = np.asarray([r for r in config.beacon.ratios if r > 0], np.int64)
    sizes = law.kept(ratios, 1) if len(ratios) else np.zeros(1, np.int64)
    most = closed * int(sizes.max())
    if likely:
        spread = 3 * sizes.std() * closed**0.5
        most = min(most, math.ceil(sizes.mean() * closed + spread))
    zero = law.window - int(sizes.min()) if 0 in config.beacon.ratios and closed else 0
    return most + zero + (law.sink if closed else 0)


# --- drawing ---------------------------------------------------------------------


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
        return at(np.asarray(choices, np.int32), np.arange(windows))
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
