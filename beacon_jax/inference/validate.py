"""Checks the arguments of the public functions at the door.

Every check is here, and all of them come before any work on a device. A message names
the argument, its value and the remedy. It does so in the words of the caller: Python's
arguments, or the flags of a command line (`in_flags`).
"""

import inspect
import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.inference.options import Completion, Reading
from beacon_jax.inference.spans import check_spans
from beacon_jax.names import nearest, short

PACKAGE = str(Path(__file__).parents[1])
SEEDS = 2**32  # seeds are 32-bit words
LOSSLESS = ("windows", "slots")
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
        end = f": {remedy}." if remedy else "."
        super().__init__(f"{name}={shown(value)} {why}{end}")
        end = f": {flags or remedy}." if remedy or flags else "."
        several = value if isinstance(value, list | tuple) else [value]
        given = short(",".join(map(str, several)))
        # Half a surrogate pair cannot be printed.
        given = given.encode("utf-8", "backslashreplace").decode()
        self.in_flags = f"--{name}={given} {why}{end}"


class ArgumentWarning(UserWarning):
    """An argument that works, but probably not as it was meant."""

    def __init__(self, text: str, in_flags: str = ""):
        super().__init__(text)
        self.in_flags = in_flags or text


def warn(text: str, in_flags: str = "") -> None:
    """Warns at the line of the user's program that called us, once per line."""
    warnings.warn(ArgumentWarning(text, in_flags), skip_file_prefixes=(PACKAGE,))


# --- types -----------------------------------------------------------------------


def is_a(name: str, given: Any, kind: Any, remedy: str) -> None:
    """Raises TypeError with the remedy unless `given` is of the kind."""
    if not isinstance(given, kind):
        raise TypeError(f"{name}={shown(given)} is {kind_of(given)}: {remedy}.")


def switch(name: str, given: Any) -> None:
    """Raises TypeError unless `given` is True or False."""
    is_a(name, given, bool | np.bool_, "give True or False")


def model(given: Any, kind: type, call: str) -> None:
    """Raises TypeError unless `given`, the first argument of `call`, is a model."""
    remedy = 'give what load("...") returned'
    if isinstance(given, str | os.PathLike):
        remedy = f"{remedy}, as in {call}(load({str(given)!r}), ...)"
    is_a("model", given, kind, f"it is the first argument; {remedy}")


def whole(name: str, given: Any, least: int, remedy: str) -> int:
    """Returns one whole number.

    Raises:
      TypeError: something else, with the remedy.
      ArgumentError: a number below `least`.
    """
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise TypeError(
            f"{name}={shown(given)} is {kind_of(given)}: {remedy}."
        ) from None
    if number < least:
        raise ArgumentError(name, number, f"must be at least {least}", remedy=remedy)
    return number


def rows(given: Any, count: int) -> np.ndarray:
    """Returns the numbers of the rows that memory[given] names.

    Raises:
      TypeError: no number, slice or list of numbers.
      IndexError: a row that there is not, or none at all.
    """
    if is_number(given) and not isinstance(given, float) and abs(given) > count:
        raise IndexError(f"memory[{shown(given)}]: {numbered(count)}.")
    try:
        index: Any = given
        if not isinstance(given, slice):
            index = np.asarray(given)
            kinds = "iub" if index.ndim else "iu"  # True is no number of a row
            if index.ndim > 1 or (index.size and index.dtype.kind not in kinds):
                raise TypeError
            index = index if index.size else index.astype(int)
        found = np.atleast_1d(np.arange(count)[index])
    except IndexError:
        raise IndexError(f"memory[{shown(given)}]: {numbered(count)}.") from None
    except (TypeError, ValueError):
        raise TypeError(
            f"memory[{shown(given)}] is {kind_of(given)}: give the number of a row, a "
            "slice, or a list of numbers."
        ) from None
    if not len(found):
        raise IndexError(f"memory[{shown(given)}] takes no row: {numbered(count)}.")
    return found


def numbered(count: int) -> str:
    """Says which rows a memory has."""
    if count == 1:
        return "the memory has 1 row, number 0"
    return f"the memory has {count} rows, numbers 0 to {count - 1}"


# --- texts and memories ----------------------------------------------------------


def texts(name: str, given: Any) -> tuple[list[Any], bool]:
    """Returns the texts as a list, and whether a single one was given.

    Raises:
      TypeError: something that is neither text nor token ids.
      ArgumentError: one without a token, or characters that are no text.
    """
    if isinstance(given, list | tuple) and not all(is_number(x) for x in given):
        for i, text in enumerate(given):
            _check_text(f"{name}[{i}]", text)
        return list(given), False
    _check_text(name, given)
    return [given], True


def _check_text(name: str, text: Any) -> None:
    if isinstance(text, str):
        readable(name, text)
        hint_at_file(name, text)
        return
    remedy = "give text or token ids, or a list of them"
    if isinstance(text, bytes | bytearray):
        remedy = f"give text, {name}.decode('utf-8')"
    elif isinstance(text, os.PathLike):
        remedy = f"give the text in it, {name}.read_text(encoding='utf-8')"
    elif isinstance(text, Sequence | np.ndarray) or hasattr(text, "__array__"):
        try:
            ids = np.asarray(text)
        except ValueError:
            raise ArgumentError(
                name,
                text,
                "is a list of lists of different lengths",
                remedy="give the token ids of one text, or a list of texts",
            ) from None
        if not ids.size:
            raise empty(name, text)
        if ids.dtype.kind in "iu" and ids.dtype != np.uint64:
            return  # `Model.encode` checks shape and range
        # Larger numbers than any model has: `Model.encode` says so.
        large = ids.dtype.kind in "uO"
        if large and all(isinstance(x, int) for x in np.ravel(ids).tolist()):
            return
        remedy = "token ids are whole numbers"
    raise TypeError(f"{name}={shown(text)} is {kind_of(text)}: {remedy}.")


def readable(name: str, text: str) -> None:
    """Raises ArgumentError for a text without a character, or one that is no text."""
    if not text:
        raise empty(name, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        letter = text[error.start]
        why = f"has {letter!a} at character {error.start}, half of a surrogate pair, "
        why += "which is no character"
        if "\udc80" <= letter <= "\udcff":  # what Python makes of an argument's bytes
            why = f"has byte {ord(letter) - 0xDC00:#04x} at character {error.start}, "
            why += f"which is not UTF-8 ({letter!a} stands for it)"
        raise ArgumentError(
            name,
            text,
            why,
            remedy=f"leave it out, {name}.encode('utf-8', 'ignore').decode()",
            flags="leave it out, or give the text as a file in UTF-8",
        ) from None


def empty(name: str, text: Any) -> ArgumentError:
    """Makes the error of a text that has no tokens."""
    if isinstance(text, str) and text:
        why, remedy = "has no tokens", "the tokenizer makes none of it: give more text"
        return ArgumentError(name, text, why, remedy=remedy)
    return ArgumentError(
        name, text, "is empty, it has no tokens", remedy="give at least one"
    )


def per_prompt(contexts: int, prompts: int) -> ValueError:
    """Makes the error of contexts that do not belong to the prompts."""
    return ValueError(
        f"context has {contexts} texts for {prompts} prompts: give one for all, or one "
        "for each."
    )


def message(name: str, given: Any) -> None:
    """Checks a text that can be nothing but a str.

    Raises:
      TypeError: something else.
      ArgumentError: an empty one, or characters that are no text.
    """
    is_a(name, given, str, "give a text, a str")
    if name == "text" or given:
        readable(name, given)


def hint_at_file(name: str, text: str) -> None:
    """Warns of a text that is the name of a file, which is not read."""
    if len(text) > _LONGEST_NAME or "\n" in text or "\0" in text:
        return
    if os.path.isfile(text):
        warn(
            f"{name}={text!r} is taken as text, and there is a file of that name: for "
            f"what is in it give Path({text!r}).read_text(encoding='utf-8').",
            f"--{name}={text} is taken as text, and there is a file of that name: for "
            f"what is in it give --{name}_file={text}.",
        )


def memory(
    given: Any, kind: type, name: str = "memory", *, needed: bool = False
) -> None:
    """Raises TypeError unless `given` is of the class `Memory`, or None if it may."""
    if isinstance(given, kind) or (given is None and not needed):
        return
    remedy = "give what model.compress returned"
    if isinstance(given, str | os.PathLike):
        remedy = f"load it, Memory.load({str(given)!r}, model)"
    elif isinstance(getattr(given, "memory", None), kind):
        remedy = "give its memory, .memory"
    raise TypeError(f"{name}={shown(given)} is {kind_of(given)}: {remedy}.")


# --- numbers ---------------------------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]
_RULES: dict[str, Rule] = {
    "max_new_tokens": (lambda x: 1 <= x < 2**31, "must be at least 1, below 2^31"),
    "temperature": (
        lambda x: math.isfinite(x) and x >= 0,
        "must be 0 (greedy) or a positive number",
    ),
    "top_k": (lambda x: 0 <= x < 2**31, "must be 0 (all tokens) or more, below 2^31"),
    "top_p": (lambda x: 0 < x <= 1, "must be above 0 and at most 1 (all)"),
    "min_p": (lambda x: 0 <= x <= 1, "must be between 0 (all) and 1"),
    "repetition_penalty": (
        lambda x: math.isfinite(x) and x > 0,
        "must be a positive number (1 changes nothing)",
    ),
    "seed": (lambda x: 0 <= x < SEEDS, f"must be between 0 and {SEEDS - 1}"),
    "capacity": (
        lambda x: 1 <= x < 2**31,
        "must be at least 1, or None for what is needed, and below 2^31",
    ),
    "reserve": (lambda x: 0 <= x < 2**31, "must not be negative, and below 2^31"),
}
_WHOLE = ("max_new_tokens", "top_k", "seed", "capacity", "reserve")
_ONE = ("capacity", "reserve")  # for all rows together


def numbers(name: str, given: Any, rows: int | None = None) -> None:
    """Checks a number, or one per row.

    Args:
      rows: of the batch; None: any number of them.

    Raises:
      TypeError: no number, or a fraction where whole ones are needed.
      ArgumentError: out of range, or a list that does not have one per row.
    """
    several, shape = several_of(given)
    fits, rule = _RULES[name]
    if name in _ONE:
        whole(name, given, -(2**63), "give one whole number, for all rows")
    for x in several:
        if not is_number(x):
            raise TypeError(f"{name}={shown(x)} is {kind_of(x)}: give a number.")
        try:
            fit = fits(x)
        except OverflowError:  # more than a float can be
            fit = False
        if not fit:
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


def options(asked: Reading, rows: int, *, single: bool = True) -> None:
    """Checks everything that does not depend on the model or the texts.

    Args:
      rows: of the batch.
      single: a text was given, and no list.

    Raises:
      TypeError, ArgumentError: as `numbers`; or something that cannot be called.
    """
    for name in (name for name in _RULES if hasattr(asked, name)):
        given = getattr(asked, name)
        if name != "capacity" or given is not None:
            numbers(name, given, rows)
    if asked.max_slots is not None:
        whole("max_slots", asked.max_slots, 1, "give a number of slots, from 1 on")
    if asked.max_bytes is not None:
        remedy = "give a number of bytes, or text such as '512MiB'"
        is_a("max_bytes", asked.max_bytes, str | int | float | np.number, remedy)
        parse_bytes(asked.max_bytes)
    if asked.max_slots is not None or asked.max_bytes is not None:
        alone(asked.ratio)
    if asked.slot_cap is not None:
        whole("slot_cap", asked.slot_cap, 1, "give a number of slots, from 1 on")
    if asked.memory_dtype is not None:
        is_a("memory_dtype", asked.memory_dtype, str, "give 'int8', or None")
    if asked.recent is not None:
        switch("recent", asked.recent)
    one_of("lossless", asked.lossless, LOSSLESS)
    check_spans(asked.spans)
    if isinstance(asked.spans, str) and asked.spans:
        readable("spans", asked.spans)
    callback("on_progress", asked.on_progress, "tokens fed", "of how many")
    remedy = "give the number of windows between two calls of on_progress"
    whole("progress_windows", asked.progress_windows, 1, remedy)
    if not isinstance(asked, Completion):
        return
    takes = ["piece of text"] if single else ["number of the row", "piece of text"]
    callback("on_text", asked.on_text, *takes)
    callback("on_tokens", asked.on_tokens, "number of new tokens")
    switch("instruct", asked.instruct)
    ends = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if not isinstance(ends, Sequence) or not all(isinstance(s, str) for s in ends):
        raise TypeError(
            f"stop={shown(asked.stop)} is {kind_of(asked.stop)}: give a string, or a "
            "list of strings, each of which ends every text."
        )
    if "" in ends:
        raise ArgumentError(
            "stop",
            asked.stop,
            "has an empty string, which every text contains",
            remedy="leave it out",
        )
    for end in ends:
        readable("stop", end)


def alone(ratio: Any) -> None:
    """Raises ArgumentError for a ratio beside the budget that chooses one."""
    if ratio is not None:
        raise ArgumentError(
            "ratio",
            ratio,
            "together with max_slots or max_bytes",
            remedy="a budget chooses the ratio, give one of them",
        )


def callback(name: str, given: Any, *takes: str) -> None:
    """Raises TypeError unless `given` is None or can be called.

    Args:
      takes: what it is called with, in words.
    """
    if given is None:
        return
    with_ = f"a function of ({', '.join(takes)})"
    if not callable(given):
        raise TypeError(f"{name}={shown(given)} is {kind_of(given)}: give {with_}.")
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):
        return  # some of those written in C do not tell
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise TypeError(
            f"{name}={shown(given)} cannot be called ({error}): give {with_}."
        ) from None


def one_of(name: str, given: Any, choices: Sequence[str]) -> None:
    """Raises ArgumentError unless `given` is one of the words."""
    if isinstance(given, str) and given in choices:
        return
    near = nearest(given, choices) if isinstance(given, str) else None
    hint = f"did you mean {near}? " if near else ""
    remedy = f"{hint}use {' or '.join(choices)}"
    raise ArgumentError(name, given, "is unknown", remedy=remedy)


def parse_bytes(size: Any, name: str = "max_bytes") -> int:
    """Reads a number of bytes, or text such as "512MiB", "2 GB" or "1.5GiB".

    Raises:
      ValueError: another unit, or not even one byte.
    """
    if is_number(size) and size >= 0 and size != math.inf:
        if size < 1:
            raise ValueError(f"{name}={shown(size)} must be at least one byte.")
        return int(size)
    powers = {u: i for i, u in enumerate(("", "k", "m", "g", "t"))}
    found = re.fullmatch(
        r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*(?:([kmgt]?)(i?)b)?\s*",
        str(size),
        re.IGNORECASE,
    )
    if not found or (found[3] and not found[2]):
        raise ValueError(
            f"{name}={shown(size)} must be a number of bytes, or one with a unit: "
            "'512MiB', '2GB', '1.5 GiB'."
        )
    unit = (1024 if found[3] else 1000) ** powers[(found[2] or "").lower()]
    # A product of floats is exact to 2**53 bytes, 8 PiB.
    count = int(float(found[1]) * unit)
    if count < 1:
        raise ValueError(f"{name}={shown(size)} must be at least one byte.")
    return count


def matched(asked: Any, found: Sequence[Any]) -> None:
    """Warns of an expression that marks nothing in any of the texts.

    Args:
      asked: the argument `spans`.
      found: ranges of tokens in each text.
    """
    if not isinstance(asked, str | re.Pattern) or any(len(x) for x in found):
        return
    text = asked if isinstance(asked, str) else asked.pattern
    said = "matches nothing in the context, so that nothing is kept: look at the "
    said += "expression."
    warn(f"spans={shown(text)} {said}", f"--spans={short(str(text))} {said}")


# --- words -----------------------------------------------------------------------


def several_of(given: Any) -> tuple[list[Any], tuple[int, ...]]:
    """Returns the numbers of one or of many, and their shape, () for one."""
    sequence = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not (sequence or hasattr(given, "__array__")):
        return [given], ()
    try:
        array = np.asarray(given, object)
    except ValueError:  # arrays of different shapes
        return list(given), (len(given), 0)
    return np.ravel(array).tolist(), array.shape


def is_number(x: Any) -> bool:
    """Says whether x is one number, of Python, numpy or jax, and no bool."""
    if isinstance(x, bool | np.bool_):
        return False
    if isinstance(x, int | float | np.number):
        return True
    try:
        operator.index(x)  # a 0-d array of jax
    except TypeError:
        return False
    return True


def kind_of(x: Any) -> str:
    """Says of which type x is, for a message."""
    return "None" if x is None else f"of type {type(x).__name__}"


def shown(x: Any) -> str:
    """Returns a value as the user wrote it, on one line, or its first 60 characters."""
    if isinstance(x, np.ndarray):
        x = x.tolist()
    return short(" ".join(repr(x).split()))
