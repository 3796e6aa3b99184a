"""Reads the rows of CSV: fields between commas, semicolons, tabs or bars.

Quotes are those of RFC 4180: around a whole field, and doubled inside of it. A file
that has others would give fields of several rows without a word, so such rows are
named. Between tabs or bars, many files have no quotes around fields at all: there a
quote that joins lines, each of which is a row by itself, is a letter if quotes of the
file stand where RFC 4180 has none, and else the rows are named.
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
NOT_CSV = "not CSV"
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
    quotes = _Quotes(delimiter, 0, False)
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
            row = longer("row", limit) if far else Bad(NOT_CSV)
        bad, raw = source.take()
        row = bad or row
        if header is None:
            if isinstance(row, Bad):  # what is below has no names
                yield first, row._replace(whole=True)
                return
            header = [field.strip() for field in row] or None
            # Who puts quotes around names does so around all fields.
            bare = delimiter in BARE and not raw[-1].startswith('"')
            quotes = _Quotes(delimiter, len(row), bare)
            continue
        made = bad or quotes.read(row, raw)
        if isinstance(made, Bad) and made.whole:
            yield first, made
            return
        rows = [made] if isinstance(made, Bad) else made
        for number, fields in enumerate(rows, first):
            if isinstance(fields, Bad):
                yield number, fields
            elif twice(header):
                yield number, Bad("a column twice")
            elif len(fields) == len(header):
                yield number, dict(zip(header, map(Cell, fields), strict=True))
            elif fields:
                yield number, Bad("another number of fields than the header")
    if source.ended:
        yield reader.line_num + 1, source.ended


class _Quotes:
    """What quotes are in a file: around fields, or letters.

    Args:
      count: fields of a row.
      bare: whether fields with letters of all kinds may stand without quotes.
    """

    def __init__(self, delimiter: str, count: int, bare: bool):
        self._delimiter, self._count, self._bare = delimiter, count, bare
        self._odd = False  # whether a quote stood where RFC 4180 has none

    def read(self, row: list[str] | Bad, raw: Sequence[str]) -> list[list[str]] | Bad:
        """Returns the rows of lines that csv.reader took for one.

        It is a Bad of the whole file if the next line may be within a field.
        """
        if isinstance(row, Bad):
            self._odd = True
            return self._mended(row, raw)
        # Who doubles quotes has none in a field without quotes around it.
        inside = any('"' in field for field in row)
        if inside and not any('""' in line for line in raw):
            if not self._bare and any('\\"' in line for line in raw):
                return self._mended(Bad(NOT_CSV), raw)
            self._odd = self._odd or self._bare
        if len(raw) == 1:
            return [row]
        rows = self._alone(raw) if self._bare or self._odd else []
        if any(len(x) != self._count for x in rows) or len(rows) < 2:
            return [row]
        if self._odd and self._bare:
            return rows
        return Bad(f"{NOT_CSV}: a quote joins lines, each of which is a row by itself")

    def _mended(self, bad: Bad, raw: Sequence[str]) -> list[list[str]] | Bad:
        if bad.reason != NOT_CSV or not any('"' in line for line in raw):
            return bad
        if any('\\"' in line for line in raw):
            return Bad(
                f'{NOT_CSV}: a quote inside of a field is "", not \\", from here on '
                "nothing is read (pandas.read_csv with escapechar reads it: write it "
                "anew, or as .jsonl)",
                whole=True,
            )
        if self._bare and self._count > 1:
            return self._alone(raw)
        said = (
            f'{NOT_CSV}: a quote inside of a field is "" and a field with one in quotes'
        )
        if len(raw) == 1:
            (lax,) = csv.reader(raw, delimiter=self._delimiter)
            if len(lax) == self._count:  # the quotes are closed
                return Bad(said)
        return Bad(f"{said}, from here on nothing is read", whole=True)

    def _alone(self, raw: Sequence[str]) -> list[list[str]]:
        """Returns what each line is by itself."""
        if self._count < 2 or any('\\"' in line for line in raw):
            return []
        rows = []
        for line in raw:
            try:
                row = next(csv.reader([line], delimiter=self._delimiter, strict=True))
            except csv.Error:
                row = line.rstrip("\r\n").split(self._delimiter)
            rows.append(row)
        return rows


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
