"""Cuts long texts into segments that end where paragraphs, sentences or words end."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from beacon_jax.resources import load_tokenizer
from beacon_jax.tokenise import encode_all

# Where a text may be cut, best first: behind a paragraph, a line, a sentence, a word.
BOUNDARIES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\n[^\S\n]*\n\s*",
        r"\n",
        r"[.!?…][\"')\]”’»]*\s+|[。！？][”’」』）]*\s*",
        r"\s+",
    )
)
# Without a tokenizer: English takes 4 to 5 bytes a token, Chinese 3 to 5 (1 to 1.5
# characters), so this counts too many rather than too few.
BYTES_PER_TOKEN = 3
Count = Callable[[Sequence[str]], list[int]]


def token_counter(tokenizer: str | Path | None = None) -> Count:
    """Returns a function that counts the tokens of texts, without specials.

    Args:
      tokenizer: a folder; without one, tokens are guessed as BYTES_PER_TOKEN of UTF-8.

    Raises:
      ValueError: there is no tokenizer in the folder.
    """
    if not tokenizer:
        return lambda texts: [
            -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
            for text in texts
        ]
    try:
        loaded = load_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r}: no tokenizer could be loaded from it "
            f"({error}); name a folder with tokenizer.json"
        ) from error

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in encode_all(loaded, texts)]

    return count


def split(text: str, size: int, count: Count) -> list[str]:
    """Cuts a text into pieces of at most `size` tokens that joined are the text.

    A piece ends at the best boundary that lets it fit: a paragraph's if its paragraphs
    fit, else a line's, a sentence's, a word's. A word is only cut if it alone is longer
    than `size`.

    Raises:
      ValueError: size is below 8.
    """
    if size < 8:
        raise ValueError(f"segment_tokens={size} must be at least 8")
    if not text:
        return []
    units = list(_units(text, size, count, 0))
    budget = size
    while True:
        pieces = _joined(units, budget)
        # Joined, a piece may have other tokens than its units: count it as it is.
        over = max(count(pieces)) - size
        if over <= 0 or budget <= 1:
            return pieces
        budget = max(1, budget - over)


def _units(text: str, size: int, count: Count, level: int) -> Iterator[tuple[str, int]]:
    """Yields pieces of at most `size` tokens, and their tokens.

    A piece is cut at the next boundary of BOUNDARIES only if it is longer.
    """
    pieces = list(_cut(text, level, size))
    for piece, tokens in zip(pieces, count(pieces), strict=True):
        if tokens <= size or len(piece) == 1:
            yield piece, tokens
        else:
            yield from _units(piece, size, count, level + 1)


def _cut(text: str, level: int, size: int) -> Iterator[str]:
    if level >= len(BOUNDARIES):
        # A word longer than a segment. Halves get short enough for any tokenizer.
        step = max(1, size >> (level - len(BOUNDARIES) + 1))
        yield from (text[i : i + step] for i in range(0, len(text), step))
        return
    last = 0
    for match in BOUNDARIES[level].finditer(text):
        yield text[last : match.end()]
        last = match.end()
    if last < len(text):
        yield text[last:]


def _joined(units: Sequence[tuple[str, int]], budget: int) -> list[str]:
    pieces: list[list[str]] = []
    left = 0
    for unit, tokens in units:
        if not pieces or tokens > left:
            pieces.append([])
            left = budget
        pieces[-1].append(unit)
        left -= tokens
    return ["".join(piece) for piece in pieces]
