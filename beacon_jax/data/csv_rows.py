"""Reads the rows of CSV: fields between commas, semicolons, tabs or bars.

Quotes are those of RFC 4180: around a whole field, and doubled inside of it. A file
that has others would give fields of several rows without a word, so such rows are
named. Between tabs or bars, many files have no quotes around fields at all: there a
quote that would join lines, each of which is a row by itself, is a letter.
"""

import csv
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from beacon_jax.data.fields import COLUMNS, INVALID
from beacon_jax.data.packed import Bad, chunks
from beacon_jax.data.streams import lines, longer
from beacon_jax.data.turns import Cell

BARE = "\t|"  # between which fields often stand without quotes
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
    reader = csv.reader(
        itertools.chain(names, text),
        delimiter=delimiter,
        strict=True,
        # "a", "b": a quote behind a blank opens a field, if the names have blanks, too.
        skipinitialspace=bool(names)
        and 0 < names[0].count(delimiter) == names[0].count(f"{delimiter} "),
    )
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        row: list[str] | Bad
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # A quote that never closes runs up to the limit.
            far = "field limit" in str(error)
            row = longer("row", limit) if far else Bad("not CSV")
        bad, raw = source.take()
        row = bad or (_quoted(row, raw) if isinstance(row, Bad) else row)
        letters = []
        if header and not bad and (isinstance(row, Bad) or len(raw) > 1):
            letters = _letters(raw, delimiter, len(header))
        if letters and header:
            for number, fields in enumerate(letters, first):
                yield number, _named(header, fields)
        elif isinstance(row, Bad) and header is None:
            yield first, row._replace(whole=True)  # what is below has no names
            return
        elif isinstance(row, Bad):
            yield first, row
        elif not row:
            continue
        elif header is None:
            header = [field.strip() for field in row]
        elif twice(header):
            yield first, Bad("a column twice")
        elif len(row) != len(header):
            yield first, Bad("another number of fields than the header")
        else:
            yield first, _named(header, row)
    if source.ended:
        yield reader.line_num + 1, source.ended


def _named(header: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    return dict(zip(header, map(Cell, row), strict=True))


def _letters(raw: Sequence[str], delimiter: str, count: int) -> list[list[str]]:
    """Returns the rows of lines in which a quote is a letter; none: it is none."""
    if delimiter not in BARE or count < 2 or any('\\"' in line for line in raw):
        return []
    rows = []
    for line in raw:
        try:
            row = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error:
            row = line.rstrip("\r\n").split(delimiter)
        if len(row) != count:
            return []
        rows.append(row)
    return rows


def _quoted(bad: Bad, raw: Sequence[str]) -> Bad:
    """Says more of a row that is no CSV, if it is the quotes."""
    if bad.reason != "not CSV" or not any('"' in line for line in raw):
        return bad
    if any('\\"' in line for line in raw):
        return Bad(
            r'not CSV: a quote inside of a field is "", not \" (pandas.read_csv with '
            "escapechar reads it: write it anew, or as .jsonl)"
        )
    return Bad(
        'not CSV: a quote inside of a field is "" and a field with one in quotes'
    )


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
        self._taken: list[str] = []
        self._lines = lines(chunks(path), limit)

    def take(self) -> tuple[Bad | None, list[str]]:
        """Returns what is wrong with a line since the last call, and the lines."""
        taken = self._bad, self._taken
        self._bad, self._taken = None, []
        return taken

    def __iter__(self) -> Iterator[str]:
        for line in self._decoded():
            self._taken.append(line)
            yield line

    def _decoded(self) -> Iterator[str]:
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
