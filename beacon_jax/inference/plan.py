"""Decides, before anything is fed, at which ratio each window is compressed.

This is pure arithmetic on the host. A text's length, the memory it is put behind and
what the user asks for (a ratio, a budget, spans to keep) become one ratio per window.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax.core.feed import power_of_two
from beacon_jax.core.plan import agreeing, at, draw_ratios
from beacon_jax.inference.budget import Budget, spend
from beacon_jax.inference.history import History
from beacon_jax.inference.options import Ratio
from beacon_jax.inference.row import Row
from beacon_jax.inference.validate import alone, warn
from beacon_jax.inference.validate_ratio import (
    check_returned,
    named_ratio,
    warn_about_ratios,
)
from beacon_jax.model.config import ModelConfig, divisors


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The plan of one row: what its windows become.

    Attributes:
      ratios: of each window of the row by its number from the row's first token, the
        last one going on; P is a power of two, so that few programs serve all lengths.
        Windows closed before have the ratio of the first that is not.
      keep: window number -> offsets in the window, ascending, of the raw entries that
        stay beside its beacons (lossless="slots"). Windows at ratio 0 are not listed.
      note: what was decided, one line; "" if nothing was.
    """

    ratios: Int[np.ndarray, " P"]
    keep: Mapping[int, Int[np.ndarray, " k"]] = dataclasses.field(default_factory=dict)
    note: str = ""


def make_plan(
    config: ModelConfig,
    ratio: Ratio = None,
    *,
    length: int,
    new_tokens: int = 0,
    before: History | None = None,
    budget: Budget | None = None,
    spans: Sequence[tuple[int, int]] | Int[np.ndarray, "S 2"] = (),
    lossless: str = "windows",
    seed: int = 0,
    untrained: bool = False,
) -> Plan:
    """Makes the plan of one row that gets `length` tokens and then generates.

    An open window keeps the ratio it began with; closed windows are what they are.

    Args:
      ratio: raw tokens per slot. A number; a list with one per window of the row, whose
        last goes on; a callable of (window number, start, stop), the row's tokens that
        are the window; 0 or "full" for no compression. None: as the memory was
        compressed last, for a new one the mix of the config (docs/specification.md
        section 3). "auto": the smallest ratio of the config whose positions stay
        within those trained (0 if the config has it), or no compression if that is
        fewer FLOPs and fits too; "auto-8": x8 or no compression in the same way.
      length: tokens given, without those that `before` has pending.
      new_tokens: most that are generated behind them.
      before: the row's history so far; None: an empty memory.
      budget: the most entries the row may hold, from the end of the text to that of
        the new tokens: slots, those of `before` too, and the open window with its
        beacons. While the text is read, the window at work takes W + W / ratio on top.
        The smallest ratio for all windows that fits is chosen (of the config's, or
        with a warning of larger divisors of W), then the next smaller one for as many
        of the latest windows as fit. Never 0. No `ratio` may be given with it.
      spans: ranges [start, stop) of the `length` tokens that nothing may be lost of,
        see `spans.token_spans`.
      lossless: "windows": a window that a span touches is not compressed. "slots": it
        is compressed, and the span's raw entries stay beside the beacons; only a window
        that the text does not fill is kept whole.
      seed: of the random mixes.
      untrained: a compressor closes the windows that the text fills, and only those.

    Raises:
      ValueError: an argument out of range, a ratio that does not divide the window
        (naming those that do) or any but 0 for a model without beacons, a budget that
        is too small (naming the smallest that works), a span in an open window that is
        being compressed.
    """
    row = Row(config, length, new_tokens, before).with_spans(spans, lossless)
    row.untrained = untrained
    if budget is not None:
        alone(ratio)
        wished, note = spend(row, budget)
    elif isinstance(ratio, str) and ratio != "full":
        wished, note = _auto(row, ratio)
    else:
        wished, note = _stated(row, ratio, seed), ""
    ratios = row.applied(wished)
    padded = np.full(power_of_two(row.first + row.count), wished[-1], np.int32)
    padded[: row.first] = ratios[0]
    padded[row.first : row.first + row.count] = ratios
    keep = {row.first + i: at for i, at in row.offsets.items() if ratios[i]}
    notes = [note, row.cost(wished, ratios)]
    if untrained and not row.full:
        notes.append(
            f"the text fills no window of {row.window} tokens: nothing is compressed"
        )
    return Plan(padded, keep, "; ".join(text for text in notes if text))


def plan_ratios(
    config: ModelConfig,
    ratio: Ratio,
    *,
    length: int,
    new_tokens: int = 0,
    seed: int = 0,
) -> Int[np.ndarray, " P"]:
    """Returns the ratios of `make_plan` for a new memory."""
    plan = make_plan(config, ratio, length=length, new_tokens=new_tokens, seed=seed)
    return plan.ratios


def _stated(row: Row, ratio: Ratio, seed: int) -> Int[np.ndarray, " n"]:
    """Returns ratios that the user, the memory or the config gives."""
    draw = functools.partial(draw_ratios, row.config, row.first + row.count)
    if ratio is None:
        ratio = _own_ratio(row.before)
    if ratio is None:
        drawn = draw(seed=seed, length=row.text)
        return drawn[row.first :]
    if callable(ratio):
        edges = row.start + row.window * np.arange(row.count + 1)
        given = [
            check_returned(
                ratio(row.first + i, int(edges[i]), int(edges[i + 1])),
                row.first + i,
                row.config,
            )
            for i in range(row.count)
        ]
        return draw(mix="list", ratios=[given[0]] * row.first + given)[row.first :]
    full = isinstance(ratio, str) and ratio == "full"
    given = [0] if full else np.atleast_1d(np.asarray(ratio)).tolist()
    return draw(mix="list", ratios=_whole(given))[row.first :]


def _whole(ratios: Sequence[Any]) -> list[int]:
    """Returns ratios as ints; ValueError for a fraction."""
    try:
        return [operator.index(r) for r in ratios]
    except TypeError:
        raise ValueError(f"ratio={ratios} must be of whole numbers.") from None


def _own_ratio(before: History) -> int | None:
    """Returns the ratio that a memory goes on with; None if it has none yet.

    A window may have been lossless, so the last one that was compressed counts.
    """
    if before.length and before.ratio:
        return before.ratio
    compressed = before.ratios[before.ratios > 0]
    if len(compressed):
        return int(compressed[-1])
    return 0 if before.length or before.slots else None


def _auto(row: Row, ratio: str) -> tuple[Int[np.ndarray, " n"], str]:
    """Returns the ratios of "auto" and "auto-N", and why they were chosen."""
    number = named_ratio(ratio)
    config, zeros = row.config, row.uniform(0)
    trained = config.trained_positions
    choices = [number or 0]
    if number is None and config.beacon:
        choices = sorted(set(config.beacon.ratios))
    # Refuses a number that does not divide the window, or any for a plain model.
    draw_ratios(config, 1, mix="list", ratios=choices[:1])
    use = lambda r: row.applied(row.uniform(r))
    fits = (r for r in choices if row.positions(use(r)) <= trained)
    best = next(fits, choices[-1])
    plain = row.positions(row.applied(zeros))
    if best == 0:
        return zeros, f"{ratio}: uncompressed, {plain:,} of {trained:,} positions"
    ours, full = row.flops(use(best)), row.flops(row.applied(zeros))
    if full < ours and plain <= trained:
        why = f"{_flop(full)} against {_flop(ours)} at x{best}"
        return zeros, f"{ratio}: uncompressed, {why}"
    why = f"{_flop(ours)} against {_flop(full)} uncompressed"
    if plain > trained:
        why += f", which takes {plain:,} positions of the {trained:,} trained"
    return row.uniform(best), f"{ratio}: x{best}, {why}"


def _flop(count: int) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}FLOP"
    return f"{count / 1e6:.3g} MFLOP"


def positions(
    config: ModelConfig,
    plan: Plan | Int[np.ndarray, " P"],
    length: int,
    before: History | None = None,
) -> int:
    """Counts the most positions that a row takes while `length` more tokens are fed.

    Generated tokens are among them (docs/specification.md section 2).

    Args:
      plan: of the row, or only its ratios; windows counted from the row's first token.
      before: the row's history so far; None: an empty memory.
    """
    ratios = plan.ratios if isinstance(plan, Plan) else np.asarray(plan)
    row = Row(config, length, 0, before)
    if isinstance(plan, Plan):
        row.offsets = {
            w - row.first: at
            for w, at in plan.keep.items()
            if 0 <= w - row.first < row.count
        }
    return row.positions(row.before.ahead(ratios, row.count))


def fitting_ratio(
    config: ModelConfig, length: int, before: History | None = None
) -> int | None:
    """Finds the smallest ratio whose positions stay within those trained.

    It is one ratio for all further windows; None if there is none.
    """
    row = Row(config, length, 0, before)
    fits = lambda r: (
        row.positions(row.applied(row.uniform(r))) <= config.trained_positions
    )
    choices = divisors(row.window) if config.beacon else []
    return next(filter(fits, choices), None)


def warn_beyond_training(
    config: ModelConfig,
    plan: Plan | Int[np.ndarray, " P"],
    length: int,
    before: History | None = None,
) -> None:
    """Warns, once per model and process, if positions pass those trained.

    Args:
      plan, length, before: as in `positions`.
    """
    most = positions(config, plan, length, before)
    key = dataclasses.replace(config, beacon=None)
    if most <= config.trained_positions or _warned(key):
        return
    fits = fitting_ratio(config, length, before)
    tokens = length + (before.length if before else 0)
    _warned(key).append(most)
    said = f"{tokens} tokens take {most} positions, the model was trained for "
    said += f"{config.trained_positions}: it extrapolates, expect worse text. "
    fit = f"ratio={fits} would fit." if fits else "No ratio would fit."
    warn(said + fit, said + (f"--{fit}" if fits else fit))


def warn_of_ratios(
    config: ModelConfig,
    asked: Ratio,
    plans: Sequence[Plan],
    lengths: Sequence[int],
    before: Sequence[History],
    new_tokens: int,
) -> None:
    """Warns of ratios that were not trained, and of a list that is too short or long.

    Args:
      asked: as the user gave it; None: nothing was asked for.
      plans, lengths, before: of each row, as in `group_rows`.
    """
    used, windows = set(), []
    for plan, length, history in zip(plans, lengths, before, strict=True):
        row = Row(config, length, new_tokens, history)
        used.update(history.ahead(plan.ratios, row.count).tolist())
        text = row.first + max(-(-row.text // row.window), 1)
        windows.append((row.first, text, row.first + row.count))
    longest = max(windows, key=lambda each: each[1])
    warn_about_ratios(asked, config.beacon, used, longest)


@functools.cache
def _warned(config: ModelConfig) -> list[int]:
    """Returns the list of a model, which has a number once there was a warning."""
    return []


def group_rows(
    config: ModelConfig,
    plans: Sequence[Plan],
    lengths: Sequence[int] | Int[np.ndarray, " B"],
    before: Sequence[History] | None = None,
) -> list[list[int]]:
    """Groups rows that may share the calls of `feed`.

    Args:
      plans, before: of each row; before=None: all memories are empty.
      lengths: tokens to feed per row, without pending ones.

    Returns:
      As few groups of row numbers as possible, ascending, by their first row. Two rows
      of a group have equal ratios in every step that both have.
    """
    steps = []
    for i, plan in enumerate(plans):
        row = Row(config, int(lengths[i]), 0, before[i] if before else None)
        steps.append(row.steps(plan.ratios))
    return agreeing(steps)


def stack_ratios(plans: Sequence[Plan]) -> Int[np.ndarray, "B P"]:
    """Stacks the ratios of several rows, all as long as the longest."""
    size = max(len(plan.ratios) for plan in plans)
    return np.stack([at(plan.ratios, np.arange(size)) for plan in plans])
