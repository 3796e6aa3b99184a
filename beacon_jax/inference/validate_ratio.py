"""Checks ratios; `validate` checks all other arguments."""

import operator
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from beacon_jax.core.law import default_window
from beacon_jax.inference.compressors import METHODS
from beacon_jax.inference.validate import (
    ArgumentError,
    callback,
    is_number,
    kind_of,
    several_of,
    shown,
    warn,
)
from beacon_jax.model.config import (
    BeaconConfig,
    ModelConfig,
    check_ratio,
    ratio_choices,
)


def check_ratios(given: Any, config: ModelConfig) -> None:
    """Checks the argument `ratio`, before a plan is made of it.

    Raises:
      TypeError: no number, list, callable or text.
      ArgumentError: text that means nothing, an empty list, or any ratio but 0 for a
        model without beacons.
    """
    if given is None:
        return
    if callable(given) and not isinstance(given, type):
        takes = ("number of the window", "its first token", "the one behind it")
        callback("ratio", given, *takes)
        return
    if isinstance(given, str):
        if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", given):
            number = shown(given).strip("'")
            raise TypeError(f"ratio={shown(given)} is text: give the number {number}.")
        number = named_ratio(given)
        numbers = [] if number is None else [number]
        _check_beacons(given, numbers, config)
        for number in numbers:
            _check_one(number, config)
        return
    several, shape = several_of(given)
    if len(shape) > 1:
        raise ArgumentError(
            "ratio",
            given,
            "is a list of lists",
            remedy="give one number per window, which is for all texts of the call",
        )
    if not several:
        raise ArgumentError("ratio", given, "is empty", remedy="give at least one")
    for x in several:
        if not is_number(x):
            raise TypeError(
                f"ratio={shown(given)} is {kind_of(given)}: give a whole number, a "
                "list with one per window, 'full', 'auto', 'auto-8', or a function."
            )
    _check_beacons(given, several, config)
    for x in several:
        _check_one(x, config)


def named_ratio(given: str) -> int | None:
    """Returns N of "auto-N"; None for "full" and "auto".

    Raises:
      ArgumentError: other text.
    """
    named = re.fullmatch(r"full|auto(?:-([1-9][0-9]{0,8}))?", given)
    if not named:
        raise ArgumentError(
            "ratio",
            given,
            "must be a number, a list or a function, 'full', 'auto' or 'auto-N' "
            "(xN or uncompressed)",
            flags="use 8, or 2,4,8 (per window), full, auto or auto-8",
        )
    return int(named[1]) if named[1] else None


def _check_one(x: Any, config: ModelConfig) -> None:
    """Raises ArgumentError unless `x` is 0 or divides the window."""
    w = default_window(config)
    try:
        number = operator.index(x)
    except TypeError:
        remedy = f"use {ratio_choices(w)}"
        if x % 1 == 0:
            remedy = f"write it as {int(x)}"
        raise ArgumentError("ratio", x, "is no whole number", remedy=remedy) from None
    if config.beacon is not None:
        check_ratio(number, w)


def check_returned(given: Any, window: int, config: ModelConfig) -> int:
    """Checks the ratio that a function gives to a window.

    Raises:
      TypeError, ArgumentError: no ratio.
    """
    if not is_number(given):
        raise TypeError(
            f"ratio(window {window}) returned {shown(given)}, {kind_of(given)}: return "
            f"{ratio_choices(default_window(config))}."
        )
    _check_beacons(given, [given], config)
    _check_one(given, config)
    return operator.index(given)


def _check_beacons(given: Any, several: Sequence[Any], config: ModelConfig) -> None:
    """Raises ArgumentError for any ratio but 0 if the model has no beacons."""
    if config.beacon is None and any(several):
        methods = ", ".join(METHODS)
        raise ArgumentError(
            "ratio",
            given,
            "needs beacons, but this model has none",
            remedy="use ratio=0, which keeps everything, or what needs no training, "
            f"method= one of {methods}; or train beacons first (python -m "
            "beacon_jax.train; load(path, beacon=BeaconConfig()) adds them untrained)",
            flags="use --ratio=full, which keeps everything, or what needs no "
            f"training, --method= one of {methods}; or train beacons first (python -m "
            "beacon_jax.train)",
        )


def warn_about_ratios(
    asked: Any,
    beacon: BeaconConfig | None,
    used: set[int],
    windows: tuple[int, int, int],
) -> None:
    """Warns of ratios that were not trained, and of a list of another length.

    Args:
      asked: the argument; None and budgets choose by themselves.
      used: ratios of the windows of this call.
      windows: numbers of the first window of this call, of the one behind the text and
        of the one behind the new tokens.
    """
    if asked is None or beacon is None:
        return
    trained = sorted({r for r in beacon.ratios if r})
    unknown = sorted(used - {0, *trained})
    if unknown and trained:
        known, them = ", ".join(map(str, trained)), ", ".join(map(str, unknown))
        said = f"={them} was not trained: this model's beacons know {known}. Expect "
        said += "worse text."
        warn(f"ratio{said}", f"--ratio{said}")
    if not isinstance(asked, list | tuple | np.ndarray) or np.size(asked) < 2:
        return
    count, (first, text, last) = np.size(asked), windows
    if count > last:
        said = f"has {count} numbers, the text has {last} windows of {beacon.window} "
        said += f"tokens: the last {count - last} are not used."
    elif first < count < text:
        said = f"has {count} numbers, the text has {text} windows of {beacon.window} "
        said += f"tokens: the last, {asked[-1]}, goes on."
    else:
        return
    warn(f"ratio={shown(asked)} {said}", f"--ratio {said}")
