"""Sources of training data: a URI becomes rows of text, turns or tokens.

See `parse_uri` for the URIs and `fields.record` for the rows that are understood.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ROW_LIMIT = 64 * 2**20  # bytes


class Record(NamedTuple):
    """One usable row; exactly one of text, turns and tokens is not None.

    where: "folder/file.jsonl:17", the 1-based line or row of a file, relative to the
      source. turns: (role, content) in order; roles are "user", "assistant", "system".
      tokens: int32 [n] of a row that is tokenised, and its labels int32 [n] (-100:
      none; labels[t] belongs to token t, as in transformers: not shifted) or None.
    """

    where: str
    text: str | None = None
    turns: tuple[tuple[str, str], ...] | None = None
    tokens: tuple[np.ndarray, np.ndarray | None] | None = None


class Dropped(NamedTuple):
    """A row, or a file, that was left out, and why in a few words."""

    where: str
    reason: str


class Part(NamedTuple):
    """What one process reads at a time: a file or a piece of one. Picklable.

    source: index of the URI. name: the file, relative to the source. size: bytes of the
    source that it covers (compressed ones; 0: unknown).
    """

    source: int
    name: str
    size: int


class Uri(NamedTuple):
    """A parsed URI; count: rows of the subset, None: all."""

    text: str
    scheme: str
    path: str
    count: int | None


def parse_uri(uri: str) -> Uri:
    """Parts of `[scheme:]path[COUNT]`."""
    raise NotImplementedError(uri)


def open_parts(
    uris: Sequence[str], root: str = "", seed: int = 42, row_limit: int = ROW_LIMIT
) -> list[Part]:
    """All parts of all sources in a fixed order."""
    raise NotImplementedError(uris)


def read_part(part: Part) -> Iterator[Record | Dropped]:
    """The rows of a part in order; never raises for bad data."""
    raise NotImplementedError(part)
