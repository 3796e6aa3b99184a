"""Checks the arguments of the public functions at the door.

Every check is here, and all of them come before any work on a device. A message names
the argument, its value and the remedy. It does so in the words of the caller: Python's
arguments, or the flags of a command line (`in_flags`).
"""

import math
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.inference.options import Completion, Reading
from beacon_jax.model.config import BeaconConfig, ModelConfig

PACKAGE = str(Path(__file__).parents[1])
SEEDS = 2**32  # seeds are 32-bit words
_LONGEST_NAME = 1024  # characters of a text that may be the name of a file


class ArgumentError(ValueError):
    """An argument that cannot be used: its name, its value, why, and the remedy."""

    def __init__(
        self, name: str, value: Any, why: str, *, remedy: str = "", flags: str = ""
    ):
        """Makes the message, and the same in the words of a command line.

        Args:
          why: in words that follow "name=value".
          remedy: what to do, in Python.
          flags: what to do on the command line, where it differs.
        """
        shown, end = _shown(value), f": {remedy}." if remedy else "."
        super().__init__(f"{name}={shown} {why}{end}")
        end = f": {flags or remedy}." if remedy or flags else "."
        several = value if isinstance(value, list | tuple) else [value]
        self.in_flags = f"--{name}={','.join(map(str, several))} {why}{end}"


class ArgumentWarning(UserWarning):
    """An argument that works, but probably not as it was meant."""

    def __init__(self, text: str, in_flags: str = ""):
        super().__init__(text)
        self.in_flags = in_flags or text


def warn(text: str, in_flags: str = "") -> None:
    """Warns at the line of the user's program that called us, once per line."""
    warnings.warn(ArgumentWarning(text, in_flags), skip_file_prefixes=(PACKAGE,))


# --- texts and memories ----------------------------------------------------------


def texts(name: str, given: Any) -> tuple[list[Any], bool]:
    """Returns the texts as a list, and whether a single one was given.

    Raises:
      TypeError: something that is neither text nor token ids.
    """
    if isinstance(given, list | tuple) and not all(_is_number(x) for x in given):
        for i, text in enumerate(given):
            _check_text(f"{name}[{i}]", text)
        return list(given), False
    _check_text(name, given)
    return [given], True


def _check_text(name: str, text: Any) -> None:
    if isinstance(text, str):
        _hint_at_file(name, text)
        return
    remedy = "give text or token ids, or a list of them"
    if isinstance(text, bytes | bytearray):
        remedy = f"give text, {name}.decode('utf-8')"
    elif isinstance(text, os.PathLike):
        remedy = f"give the text in it, {name}.read_text(encoding='utf-8')"
    elif isinstance(text, Sequence | np.ndarray) or hasattr(text, "__array__"):
        ids = np.asarray(text)
        if not ids.size or ids.dtype.kind in "iu":
            return  # `Model.encode` checks shape and range
        remedy = "token ids are whole numbers"
    raise TypeError(f"{name}={_shown(text)} is {_kind(text)}: {remedy}.")


def _hint_at_file(name: str, text: str) -> None:
    if len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return
    if os.path.isfile(text):
        warn(
            f"{name}={text!r} is taken as text, and there is a file of that name: for "
            f"what is in it give Path({text!r}).read_text(encoding='utf-8').",
            f"--{name}={text} is taken as text, and there is a file of that name: for "
            f"what is in it give --{name}_file={text}.",
        )


def memory(given: Any, kind: type) -> None:
    """Raises TypeError unless `given` is None or of the class `Memory`."""
    if given is None or isinstance(given, kind):
        return
    remedy = "give what model.compress returned"
    if isinstance(given, str | os.PathLike):
        remedy = f"load it, Memory.load({str(given)!r}, model)"
    elif isinstance(getattr(given, "memory", None), kind):
        remedy = "give its memory, .memory"
    raise TypeError(f"memory={_shown(given)} is {_kind(given)}: {remedy}.")


# --- numbers ---------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]
_RULES: dict[str, Rule] = {
    "max_new_tokens": (lambda x: 1 <= x < 2**31, "must be at least 1, below 2^31"),
    "temperature": (
        lambda x: math.isfinite(x) and x >= 0,
        "must be 0 (greedy) or a positive number",
    ),
    "top_k": (lambda x: x >= 0, "must be positive, or 0 for all tokens"),
    "top_p": (lambda x: 0 < x <= 1, "must be above 0 and at most 1 (all)"),
    "min_p": (lambda x: 0 <= x <= 1, "must be between 0 (all) and 1"),
    "repetition_penalty": (
        lambda x: math.isfinite(x) and x > 0,
        "must be a positive number (1 changes nothing)",
    ),
    "seed": (lambda x: 0 <= x < SEEDS, f"must be between 0 and {SEEDS - 1}"),
    "capacity": (lambda x: x >= 1, "must be at least 1, or None for what is needed"),
    "reserve": (lambda x: x >= 0, "must not be negative"),
}
_WHOLE = ("max_new_tokens", "top_k", "seed", "capacity", "reserve")


def numbers(name: str, given: Any, rows: int | None = None) -> None:
    """Checks a number, or one per row.

    Args:
      rows: of the batch; None: any number of them.

    Raises:
      TypeError: no number, or a fraction where whole ones are needed.
      ArgumentError: out of range, or a list that does not have one per row.
    """
    several, shape = _several(given)
    fits, rule = _RULES[name]
    for x in several:
        if not _is_number(x):
            raise TypeError(f"{name}={_shown(x)} is {_kind(x)}: give a number.")
        if not fits(x):
            raise ArgumentError(name, x, rule)
        if name in _WHOLE and x % 1:
            raise TypeError(f"{name}={x} must be a whole number.")
    if shape and rows is not None and shape != (rows,):
        count = f"{len(several)} numbers" if len(several) != 1 else "1 number"
        raise ArgumentError(
            name,
            given,
            f"has {count} for {rows} texts",
            remedy="give one for all, or one for each",
        )


def options(asked: Reading, rows: int) -> None:
    """Checks everything that does not depend on the model or the texts.

    Raises:
      TypeError, ArgumentError: as `numbers`; or something that cannot be called.
    """
    numbers("seed", asked.seed, rows)
    if asked.capacity is not None:
        numbers("capacity", asked.capacity)
    callback("on_progress", asked.on_progress)
    if not isinstance(asked, Completion):
        return
    callback("on_text", asked.on_text)
    callback("on_tokens", asked.on_tokens)
    for name in (
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
    ):
        numbers(name, getattr(asked, name), rows)
    ends = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if not isinstance(ends, Sequence) or not all(isinstance(s, str) for s in ends):
        raise TypeError(
            f"stop={_shown(asked.stop)} is {_kind(asked.stop)}: give a string, or a "
            "list of strings, each of which ends every text."
        )
    if not all(ends):
        raise ArgumentError(
            "stop",
            asked.stop,
            "has an empty string, which every text begins with",
            remedy="leave it out",
        )


def callback(name: str, given: Any) -> None:
    """Raises TypeError unless `given` is None or can be called."""
    if given is not None and not callable(given):
        raise TypeError(f"{name}={_shown(given)} is {_kind(given)}: give a function.")


# --- ratios ----------------------------------------------------------------------


def ratio(given: Any, config: ModelConfig) -> None:
    """Checks what is asked for, before a plan is made of it.

    Raises:
      TypeError: no number, list, callable or text.
      ArgumentError: text that means nothing, an empty list, or any ratio but 0 for a
        model without beacons.
    """
    if given is None or callable(given):
        return
    if isinstance(given, str):
        if given.removeprefix("-").isdigit():
            raise TypeError(f"ratio={given!r} is text: give the number {given}.")
        number = given.removeprefix("auto-")
        _check_beacons(given, [int(number)] if number.isdigit() else [], config)
        return
    several, shape = _several(given)
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
        if not _is_number(x):
            raise TypeError(
                f"ratio={_shown(given)} is {_kind(given)}: give a whole number, a list "
                "with one per window, 'full', 'auto', 'auto-8', or a function."
            )
    _check_beacons(given, several, config)


def _check_beacons(given: Any, several: Sequence[Any], config: ModelConfig) -> None:
    if config.beacon is None and any(several):
        raise ArgumentError(
            "ratio",
            given,
            "needs beacons, but this model has none",
            remedy="use ratio=0, which keeps everything, or train beacons first "
            "(python -m beacon_jax.train; load(path, beacon=BeaconConfig()) adds them "
            "untrained)",
            flags="use --ratio=full, which keeps everything, or train beacons first "
            "(python -m beacon_jax.train)",
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
    warn(f"ratio={_shown(asked)} {said}", f"--ratio {said}")


# --- words -----------------------------------------------------------------------


def _several(given: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Returns the numbers of one or of many, and their shape, () for one."""
    if not (isinstance(given, list | tuple) or hasattr(given, "__array__")):
        return [given], ()
    array = np.asarray(given, object)
    return np.ravel(array).tolist(), array.shape


def _is_number(x: Any) -> bool:
    if isinstance(x, bool | np.bool_):
        return False
    if isinstance(x, int | float | np.number):
        return True
    try:
        operator.index(x)  # a 0-d array of jax
    except TypeError:
        return False
    return True


def _kind(x: Any) -> str:
    return "None" if x is None else f"of type {type(x).__name__}"


def _shown(x: Any) -> str:
    if isinstance(x, np.ndarray):
        x = x.tolist()
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."
