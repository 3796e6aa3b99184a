"""Finds the tokens of a text that are to be kept whole: by pattern or by number.

Patterns are those of the `regex` package, which has all that Python's `re` has, and a
limit of time: an expression such as (a+)+$ tries 2^n ways to match n letters.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
from jaxtyping import Bool, Int

from beacon_jax.names import short
from beacon_jax.tokenise import encode_spans

type Spans = str | re.Pattern[str] | Sequence[tuple[int, int]] | Int[np.ndarray, "S 2"]

# Seconds of the processor for a search, and more for a long text: a million matches of
# \d{5} in ten million characters take 2.2.
PATIENCE, MORE = 5.0, 1e-6
# `regex` writes out what is repeated, at 300 bytes each: (a{6000}){6000} takes 10 GB.
MOST_REPEATS = 100_000
_PARTS = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<count>\d+)(?:,\d*)?\}|.", re.DOTALL
)


def token_spans(
    spans: Spans | None,
    text: Any = None,
    tokenizer: Any = None,
    *,
    first: bool = True,
    after: int | str | None = None,
) -> Int[np.ndarray, "S 2"]:
    """Finds the token ranges [start, stop) of a text that `spans` marks.

    Args:
      spans: a regular expression: every token is taken that shares a character with a
        match. Ranges are returned as they are; None: none.
      text: where the expression is searched; an error if it is no str.
      tokenizer: a fast tokenizer of transformers.
      first, after: where the text begins, as in `Model.encode`.

    Raises:
      ValueError: an expression without text or fast tokenizer, or not a valid one, or
        one whose search does not end.
    """
    check_spans(spans)
    if spans is None or not isinstance(spans, str | re.Pattern):
        given = np.asarray([] if spans is None else spans)
        return given.reshape(-1, 2) if not given.size else given
    if not isinstance(text, str):
        raise ValueError(
            f"spans={_shown(spans)} is an expression, but token ids were given: give "
            "the text itself, or token ranges as (start, stop)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"spans={_shown(spans)} needs a fast tokenizer (tokenizer.json), which "
            "knows the characters of each token: give token ranges as (start, stop)."
        )
    return tokens_of(search(spans, text), text, tokenizer, first=first, after=after)


def search(spans: str | re.Pattern[str], text: str) -> list[tuple[int, int]]:
    """Finds the characters [start, stop) of a text that an expression matches.

    Raises:
      ValueError: not a valid expression, or one whose search does not end.
    """
    seconds = PATIENCE + MORE * len(text)
    remedy = "write it without, or give token ranges as (start, stop)."
    try:
        matches = _compiled(spans).finditer(text, timeout=seconds)
        return [match.span() for match in matches]
    except TimeoutError:
        raise ValueError(
            f"spans={_shown(spans)} is neither found nor ruled out in {seconds:.0f} s, "
            f"in {len(text):,} characters of text: it repeats what repeats itself, as "
            f"(a+)+ does; {remedy}"
        ) from None
    except MemoryError:
        raise ValueError(
            f"spans={_shown(spans)} calls itself without end, as (?R) does; {remedy}"
        ) from None


def tokens_of(
    found: Sequence[tuple[int, int]] | Int[np.ndarray, "M 2"],
    text: str,
    tokenizer: Any,
    *,
    first: bool,
    after: int | str | None,
) -> Int[np.ndarray, "S 2"]:
    """Returns the ranges of tokens that share a character with what was found."""
    marked = np.zeros(len(text) + 1, np.int32)
    for start, stop in found:
        marked[start + 1 : stop + 1] = 1
    # Marked characters in front of each; a token has some if its ends differ. Tokens
    # that the tokenizer adds have the range (0, 0).
    count = np.cumsum(marked)
    at = "start" if first else "behind"
    ends = encode_spans(tokenizer, text, at, after).spans
    return _runs(count[ends[:, 1]] > count[ends[:, 0]])


def check_spans(spans: Any) -> None:
    """Checks `spans` as far as that needs no text.

    Raises:
      ValueError: no valid expression, one for bytes, one that repeats too often, or no
        token ranges.
    """
    if spans is None:
        return
    if isinstance(spans, str | re.Pattern):
        _compiled(spans)
        return
    try:
        ranges = np.asarray(spans)
    except ValueError:  # of different lengths
        ranges = np.asarray("")
    pairs = ranges.ndim == 2 and ranges.shape[1] == 2 and ranges.dtype.kind in "iu"
    if not pairs and (ranges.size or not isinstance(spans, Sequence | np.ndarray)):
        raise ValueError(
            f"spans={_shown(spans)} must be token ranges (start, stop), or a regular "
            "expression: give [(10, 20)] for the tokens 10 to 19."
        )


def _compiled(spans: str | re.Pattern[str]) -> regex.Pattern[str]:
    """Compiles an expression; ValueError as `check_spans`."""
    text: Any = spans.pattern if isinstance(spans, re.Pattern) else spans
    flags = 0
    if isinstance(spans, re.Pattern):
        for name in ("ASCII", "IGNORECASE", "MULTILINE", "DOTALL", "VERBOSE"):
            flags |= getattr(regex, name) if spans.flags & getattr(re, name) else 0
    if isinstance(text, bytes):
        raise ValueError(
            f"spans={_shown(spans)} is an expression for bytes: leave out the b."
        )
    if _repeats(text) > MOST_REPEATS:
        raise ValueError(
            f"spans={_shown(spans)} repeats something {_repeats(text):,} times, at "
            f"most {MOST_REPEATS:,} are possible: use smaller numbers in {{}}."
        )
    try:
        return regex.compile(text, flags)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"spans={_shown(spans)} is not a regular expression: {error}."
        ) from None


def _repeats(pattern: str) -> int:
    """Counts how often an expression repeats something at least, groups in groups."""
    most, last = [1], 1  # of the groups that are open; of the part in front
    for part in _PARTS.finditer(pattern):
        if part[0] == "(":
            most.append(1)
        elif part[0] == ")" and len(most) > 1:
            last = most.pop()
        else:
            count = part["count"]
            last = last * int(count[:12]) if count else 1
        most[-1] = max(most[-1], last)
    return max(most)


def marked_tokens(spans: Any, length: int) -> Bool[np.ndarray, " T"]:
    """Marks those of `length` tokens that lie in one of the ranges.

    Raises:
      ValueError: something else than ranges of at least one token within the text.
    """
    marked = np.zeros(length, bool)
    ranges = np.asarray(spans)
    if not ranges.size:
        return marked
    if ranges.ndim != 2 or ranges.shape[1] != 2 or ranges.dtype.kind not in "iu":
        raise ValueError(f"spans={_shown(spans)} must be token ranges (start, stop).")
    for start, stop in ranges.tolist():
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"spans has ({start}, {stop}): a range must hold at least one of the "
                f"{length} tokens of the text, and no others."
            )
        marked[start:stop] = True
    return marked


def _runs(marked: Bool[np.ndarray, " T"]) -> Int[np.ndarray, "S 2"]:
    """Returns the ranges of neighbours that are marked."""
    edges = np.diff(marked.astype(np.int8), prepend=0, append=0)
    return np.stack([np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)], axis=1)


def _shown(spans: Any) -> str:
    return short(repr(spans.pattern if isinstance(spans, re.Pattern) else spans))
