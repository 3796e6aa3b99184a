"""Reads the rows of CSV: fields between commas, semicolons, tabs or bars."""

import csv
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from beacon_jax.data.fields import COLUMNS, INVALID
from beacon_jax.data.packed import Bad, chunks
from beacon_jax.data.streams import lines, longer

DELIMITERS = (",", ";", "\t", "|")


def csv_rows(
    path: str, name: str, limit: int
) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """Yields rows as dicts by the names in the first row.

    A row has the number of the line that it begins on. What stands between fields is
    found from the names: that which makes the most known ones of them, else a tab for
    `name.tsv` and a comma for others.

    Args:
      limit: bytes of the longest line and row.
    """
    csv.field_size_limit(limit)  # the default, 131,072, is less than a chapter
    source = _Lines(path, limit)
    text = iter(source)
    names = list(itertools.islice(text, 1))
    delimiter = _delimiter(names, name)
    reader = csv.reader(itertools.chain(names, text), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # A quote that never closes runs up to the limit.
            far = "field limit" in str(error)
            reason = longer("row", limit) if far else Bad("not CSV")
            yield first, source.take_bad() or reason
            continue
        bad = source.take_bad()
        if bad:
            yield first, bad
        elif not row:
            continue
        elif header is None:
            header = [field.strip() for field in row]
        elif twice(header):
            yield first, Bad("a column twice")
        elif len(row) != len(header):
            yield first, Bad("another number of fields than the header")
        else:
            yield first, dict(zip(header, row, strict=True))
    if source.ended:
        yield reader.line_num + 1, source.ended


def twice(names: Sequence[str]) -> bool:
    """Tells whether a column that is read is there twice: which one is meant?"""
    known = [name.lower() for name in names if name.lower() in COLUMNS]
    return len(set(known)) < len(known)


def _delimiter(names: Sequence[str], name: str) -> str:
    def known(delimiter: str) -> int:
        fields = next(csv.reader(names, delimiter=delimiter), [])
        return sum(field.strip().lower() in COLUMNS for field in fields)

    usual = "\t" if ".tsv" in name.lower() else ","
    try:
        return max((usual, *DELIMITERS), key=known)
    except csv.Error:  # the names are no CSV: the reader says so
        return usual


class _Lines:
    """Decoded lines for csv.reader.

    Attributes:
      ended: what is wrong with the file, if reading it ended early.
    """

    def __init__(self, path: str, limit: int):
        self.ended: Bad | None = None
        self._bad: Bad | None = None
        self._lines = lines(chunks(path), limit)

    def take_bad(self) -> Bad | None:
        """Returns what is wrong with a line since the last call; None: nothing is."""
        bad, self._bad = self._bad, None
        return bad

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            if isinstance(line, Bad):
                if line.whole:
                    self.ended = line
                    return
                self._bad = line
                yield "\n"
                continue
            try:
                yield line.decode("utf-8") + "\n"
            except UnicodeDecodeError:
                self._bad = Bad(INVALID)
                yield line.decode("utf-8", "replace") + "\n"
