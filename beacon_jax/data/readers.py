"""Cuts sources into parts and reads the rows of each kind of file.

What the fields of a row mean is decided elsewhere (`fields`). Every reader yields
(number, value). The number is the 1-based line or row of its file. The value is bytes
(JSON), a dict of fields, a str (text) or a `Bad`. Memory is one row, one record batch
or one block, whatever the size of the file.
"""

import codecs
import csv
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
from jaxtyping import Int64

from beacon_jax.data.fields import COLUMNS, UNKNOWN
from beacon_jax.data.heldout import kept_runs
from beacon_jax.data.streams import (
    Bad,
    chunks,
    elements,
    first_after,
    is_array,
    lines,
    longer,
    newlines,
)
from beacon_jax.decoding import SHOWN, disguised
from beacon_jax.paths import is_pointer

PART_BYTES = 16 * 2**20
ROW_LIMIT = 64 * 2**20  # bytes
# A text longer than this is cut: about 15,000 tokens of English, below the max_length
# of the paper's stages (20,480), so that nothing of it is truncated.
TEXT_BYTES = 2**16
BATCH = 16  # rows of columns or records in memory at a time

JSON_ENDINGS = (".jsonl", ".json")
TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
ENDINGS = (
    *(json + packed for packed in ("", ".gz", ".zst") for json in JSON_ENDINGS),
    ".parquet",
    ".arrow",
    ".csv",
    *TEXT_ENDINGS,
    ".array_record",
)

type Value = bytes | dict[str, Any] | str | Bad


class Subset(NamedTuple):
    """A choice of `count` of `rows` rows, drawn with `seed`."""

    rows: int
    count: int
    seed: int


class Piece(NamedTuple):
    """A file, or a piece of one, that one process reads at a time. Picklable.

    Attributes:
      source: index of the URI.
      name: the file, relative to the source.
      size: bytes of the source that the part covers (compressed ones; 0: unknown).
      kind, path: which reader, and its file.
      start, stop: the piece, in bytes (lines), blocks (text), row groups (parquet),
        batches (arrow) or rows; None: to the end.
      first: number of the first line or row of the part.
      before: rows of the source in front of the part, known if there is a subset.
      limit: bytes of the longest line.
      detail: what else the reader needs: the reason (unusable), the share that is held
        out (kept), or the name, split and folder (tfds).
    """

    source: int
    name: str
    size: int
    kind: str
    path: str
    start: int = 0
    stop: int | None = None
    first: int = 1
    before: int = 0
    subset: Subset | None = None
    limit: int = ROW_LIMIT
    detail: tuple[str, ...] = ()


def ending(name: str) -> str:
    """Returns the supported ending of a file name, else ""."""
    return next((e for e in ENDINGS if name.lower().endswith(e)), "")


def cut(part: Piece, part_bytes: int = PART_BYTES) -> list[Piece]:
    """Cuts a whole file or data set into pieces of about `part_bytes`.

    The kind of a whole file is ""; it is found from the name.
    """
    if part.kind not in ("", "kept"):
        return _cut_tfds(part, part_bytes) if part.kind == "tfds" else [part]
    if is_pointer(part.path):
        return [unusable(part, "a pointer of git-lfs: fetch the file (git lfs pull)")]
    end = ending(part.name)
    kind = "text" if end in TEXT_ENDINGS else end[1:]
    if kind == "text":
        with open(part.path, "rb") as file:
            found = disguised(file.read(SHOWN))
        if found:
            return [unusable(part, found)]
    if part.kind:
        return [part]
    if end.startswith(JSON_ENDINGS):
        kind = "array" if is_array(part.path) else "lines"
    part = part._replace(kind=kind)
    try:
        return _CUTTERS[kind](part, part_bytes) if kind in _CUTTERS else [part]
    except (pyarrow.ArrowException, OSError, RuntimeError, ValueError) as error:
        return [unusable(part, _broken(error, f"damaged {kind}").reason)]


def read(part: Piece) -> Iterator[tuple[int, Value]]:
    """Yields the rows of a part, in order."""
    yield from _READERS[part.kind](part)


def count(part: Piece) -> int:
    """Returns how many rows `read` gives, without parsing a row."""
    return sum(1 for _, row in read(part) if not (isinstance(row, Bad) and row.whole))


def chosen(part: Piece) -> Int64[np.ndarray, " n"] | None:
    """Returns the chosen rows int64 [n] of a piece, None if it has no subset.

    They are sorted numbers, counted from 0 at the first row of the piece; those behind
    its last row belong to later pieces. The subset has the
    rows that the release's `file[COUNT]` takes (train_test_split of `datasets`). Needs
    8 bytes per row of the source for a moment.
    """
    if part.subset is None:
        return None
    rows = _drawn(part.subset)
    return rows[np.searchsorted(rows, part.before) :] - part.before


@functools.lru_cache(maxsize=1)
def _drawn(subset: Subset) -> Int64[np.ndarray, " n"]:
    order = np.random.default_rng(subset.seed).permutation(subset.rows)
    return np.sort(order[: subset.count])


def unusable(part: Piece, reason: str) -> Piece:
    """Returns a piece in place of this one, which is only reported with the reason."""
    return part._replace(kind="unusable", detail=(reason,))


def _pieces(part: Piece, sizes: list[tuple[int, int]], part_bytes: int) -> list[Piece]:
    """Puts consecutive units of a file together until they have `part_bytes`.

    Args:
      sizes: (rows, bytes) of each unit.
    """
    parts: list[Piece] = []
    start = size = rows = 0
    first = 1
    for unit, (unit_rows, unit_bytes) in enumerate(sizes):
        rows += unit_rows
        size += unit_bytes
        if size >= part_bytes or unit == len(sizes) - 1:
            parts.append(
                part._replace(start=start, stop=unit + 1, first=first, size=size)
            )
            start, first, rows, size = unit + 1, first + rows, 0, 0
    return parts


# Lines


def _cut_lines(part: Piece, part_bytes: int) -> list[Piece]:
    if part.size <= part_bytes or ending(part.name) not in JSON_ENDINGS:
        return [part]  # small or compressed
    return [
        part._replace(start=start, stop=stop, first=line, size=stop - start)
        for start, stop, line in newlines(part.path, part_bytes)
    ]


def _read_lines(part: Piece) -> Iterator[tuple[int, Value]]:
    source = chunks(part.path, part.start, part.stop)
    for number, line in enumerate(lines(source, part.limit), part.first):
        if isinstance(line, Bad) or line.strip():
            yield number, line


# Text


def _cut_text(part: Piece, part_bytes: int) -> list[Piece]:
    starts = range(0, part.size, TEXT_BYTES)
    sizes = [(1, min(TEXT_BYTES, part.size - start)) for start in starts]
    return _pieces(part, sizes, part_bytes) or [part]


def _read_text(part: Piece) -> Iterator[tuple[int, Value]]:
    """Yields the blocks of a text.

    Block i reaches from the first line end after i * TEXT_BYTES to that of the next, so
    that blocks can be read in any order.
    """
    with open(part.path, "rb") as file:
        size = file.seek(0, 2)
        blocks = -(-size // TEXT_BYTES) if part.stop is None else part.stop
        if not size:
            yield 1, Bad("empty")
        for i in range(part.start, blocks):
            begin = first_after(file, i * TEXT_BYTES, TEXT_BYTES)
            end = (i + 1) * TEXT_BYTES
            end = first_after(file, end, TEXT_BYTES) if end < size else size
            file.seek(begin)
            if data := file.read(end - begin):
                yield i + 1, _text(_unmarked(data) if i == 0 else data)


def _unmarked(data: bytes) -> bytes:
    """Takes off the byte order mark that a file may begin with."""
    return data.removeprefix(codecs.BOM_UTF8)


def _text(data: bytes) -> str | Bad:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Bad("invalid UTF-8")
    if "\0" in text:
        return Bad("binary: a NUL byte")
    # Line ends as open() translates them.
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


# CSV


def _read_csv(part: Piece) -> Iterator[tuple[int, Value]]:
    """Yields rows as dicts by the names in the first row.

    A row has the number of the line that it begins on.
    """
    csv.field_size_limit(part.limit)  # the default, 131,072, is less than a chapter
    source = _CsvLines(part)
    reader = csv.reader(source)
    header: list[str] | None = None
    while True:
        first, source.bad = reader.line_num + 1, None
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            # A quote that never closes runs up to the limit.
            far = "field limit" in str(error)
            reason = longer("row", part.limit) if far else Bad("not CSV")
            yield first, source.bad or reason
            continue
        if source.bad:
            yield first, source.bad
        elif not row:
            continue
        elif header is None:
            header = row
        elif _twice(header):
            yield first, Bad("a column twice")
        elif len(row) != len(header):
            yield first, Bad("another number of fields than the header")
        else:
            yield first, dict(zip(header, row, strict=True))
    if source.ended:
        yield reader.line_num + 1, source.ended


def _twice(names: Sequence[str]) -> bool:
    """Tells whether a column that is read is there twice: which one is meant?"""
    known = [name for name in names if name in COLUMNS]
    return len(set(known)) < len(known)


class _CsvLines:
    """Decoded lines for csv.reader.

    Attributes:
      bad: what is wrong with a line of the present row; None if nothing is.
      ended: what is wrong with the file, if reading it ended early.
    """

    def __init__(self, part: Piece):
        self.bad: Bad | None = None
        self.ended: Bad | None = None
        self._lines = lines(chunks(part.path), part.limit)

    def __iter__(self) -> Iterator[str]:
        for i, line in enumerate(self._lines):
            if isinstance(line, Bad):
                if line.whole:
                    self.ended = line
                    return
                self.bad = line
                yield "\n"
                continue
            try:
                yield (line if i else _unmarked(line)).decode("utf-8") + "\n"
            except UnicodeDecodeError:
                self.bad = Bad("invalid UTF-8")
                yield line.decode("utf-8", "replace") + "\n"


# Columns: parquet and arrow


def _cut_parquet(part: Piece, part_bytes: int) -> list[Piece]:
    with pyarrow.parquet.ParquetFile(part.path) as file:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        # Compressed sizes of all columns: those of the file.
        sizes = [
            (
                group.num_rows,
                sum(
                    group.column(c).total_compressed_size
                    for c in range(group.num_columns)
                ),
            )
            for group in groups
        ]
    return _pieces(part, sizes, part_bytes) or [part]


def _read_parquet(part: Piece) -> Iterator[tuple[int, Value]]:
    try:
        # A buffer, and no pre-buffering: pages, not whole row groups, are in memory.
        with pyarrow.parquet.ParquetFile(
            part.path, buffer_size=2**20, pre_buffer=False
        ) as file:
            names = [name for name in file.schema_arrow.names if name in COLUMNS]
            if not names:
                yield part.first, Bad(UNKNOWN, whole=True)
                return
            groups = list(range(part.start, part.stop or file.num_row_groups))
            batches = file.iter_batches(BATCH, row_groups=groups, columns=names)
            yield from _batches(part, batches)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield part.first, _broken(error, "damaged parquet")


def _cut_arrow(part: Piece, part_bytes: int) -> list[Piece]:
    # Not `nbytes`, which trusts offsets in the file: wrong ones end the process.
    sizes = [(x.num_rows, x.get_total_buffer_size()) for x in _arrow(part.path)]
    return _pieces(part, sizes, part_bytes) or [part]


def _arrow(path: str) -> Iterator[pyarrow.RecordBatch]:
    """Yields the record batches of an Arrow stream (what `datasets` saves) or file.

    The file is memory-mapped, not read.
    """
    with pyarrow.memory_map(path) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            for i in range(file.num_record_batches):
                yield file.get_batch(i)
            return
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)


def _read_arrow(part: Piece) -> Iterator[tuple[int, Value]]:
    try:
        batches = itertools.islice(_arrow(part.path), part.start, part.stop)
        yield from _batches(part, map(_validated, batches))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield part.first, _broken(error, "damaged arrow")


def _validated(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Returns a batch whose offsets lie in its buffers: pyarrow reads any others.

    Text that is no UTF-8 is left for its row, unless it lies in a list or an object.

    Raises:
      ArrowInvalid: the batch is damaged.
    """
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error) or pyarrow.types.is_nested(column.type):
                raise
    return batch


def _broken(error: Exception, reason: str) -> Bad:
    """Returns a Bad for a damaged file; raises the error if the disk failed."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return Bad(reason, whole=True)


def _batches(
    part: Piece, batches: Iterator[pyarrow.RecordBatch]
) -> Iterator[tuple[int, Value]]:
    number = part.first
    for batch in batches:
        columns = {
            name: batch.column(i)
            for i, name in enumerate(batch.schema.names)
            if name in COLUMNS
        }
        twice = _twice(batch.schema.names)
        for row in range(batch.num_rows):
            if twice:
                yield number, Bad("a column twice")
                number += 1
                continue
            try:
                yield number, {name: _cell(c[row]) for name, c in columns.items()}
            except UnicodeDecodeError:
                yield number, Bad("invalid UTF-8")
            except (ValueError, OverflowError):  # a date beyond those of Python
                yield number, Bad("wrong type")
            number += 1


def _cell(scalar: Any) -> Any:
    """Returns the Python value of a cell.

    A list of integers becomes an array, which is 100 times as fast.
    """
    kind = scalar.type
    if (
        pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    ) and pyarrow.types.is_integer(kind.value_type):
        values = scalar.values
        if values is not None and not values.null_count:
            return values.to_numpy(zero_copy_only=False)
    return scalar.as_py()


# ArrayRecord and TFDS


def _open_records(path: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    # Without its own threads and 16 MB of readahead for each of them.
    return ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")


def _cut_records(part: Piece, part_bytes: int) -> list[Piece]:
    reader = _open_records(part.path)
    if not reader.ok():
        return [unusable(part, "damaged array_record")]
    return _cut_rows(part, reader.num_records(), part_bytes)


def _cut_rows(part: Piece, rows: int, part_bytes: int) -> list[Piece]:
    """Cuts a part into equal ranges of rows."""
    pieces = max(1, min(rows, -(-part.size // part_bytes)))
    edges = [rows * i // pieces for i in range(pieces + 1)]
    return [
        part._replace(
            start=a,
            stop=b,
            first=a + 1,
            size=part.size * b // max(1, rows) - part.size * a // max(1, rows),
        )
        for a, b in itertools.pairwise(edges)
    ]


def _read_records(part: Piece) -> Iterator[tuple[int, Value]]:
    number = part.start
    try:
        reader = _open_records(part.path)
        stop = reader.num_records() if part.stop is None else part.stop
        for at in range(part.start, stop, BATCH):
            for data in reader.read(at, min(at + BATCH, stop)):
                number += 1
                yield number, data
    except (RuntimeError, ValueError, IndexError):
        yield number + 1, Bad("damaged array_record", whole=True)


def tfds_size(path: str, root: str) -> tuple[int, tuple[str, ...]]:
    """Returns the size of a `name/config:split`, and its (name, split, data_dir).

    The size is in bytes, and approximate.

    Raises:
      ValueError: no split in it, or one that the data set does not have.
      FileNotFoundError: the data set is not there; it is not downloaded.
    """
    import tensorflow_datasets as tfds

    name, _, split = path.partition(":")
    while ":" in split and "[" not in split.partition(":")[0]:
        version, _, split = split.partition(":")
        name = f"{name}:{version}"
    if not name or not split:
        raise ValueError(
            f"uri='tfds:{path}' names no split; write 'tfds:name/config:split', as in "
            "'tfds:pg19:train'"
        )
    folder = Path(root).expanduser() if root else None
    data_dir = str(folder) if folder and (folder / name.split("/")[0]).is_dir() else ""
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        splits = builder.info.splits
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError) as error:
        raise FileNotFoundError(_tfds_missing(path, data_dir)) from error
    if not splits:
        raise FileNotFoundError(_tfds_missing(path, data_dir))
    try:
        rows = splits[split].num_examples
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"uri='tfds:{path}': split={split!r} is unknown; it has "
            f"{', '.join(sorted(splits))}"
        ) from error
    total = max(1, sum(info.num_examples for info in splits.values()))
    size = (builder.info.dataset_size or 0) * rows // total
    return size, (name, split, data_dir)


def _tfds_missing(path: str, data_dir: str) -> str:
    place = data_dir or "TFDS's data_dir (TFDS_DATA_DIR)"
    return (
        f"uri='tfds:{path}' is not prepared in {place}; build it there with "
        f"`tfds build {path.partition(':')[0]} --file_format=array_record`, or set "
        "data.root to the folder that holds it"
    )


@functools.lru_cache(maxsize=4)
def _data_source(name: str, split: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    return tfds.data_source(
        name, split=split, data_dir=data_dir or None, download=False
    )


def _cut_tfds(part: Piece, part_bytes: int) -> list[Piece]:
    return _cut_rows(part, len(_data_source(*part.detail)), part_bytes)


def _read_tfds(part: Piece) -> Iterator[tuple[int, Value]]:
    rows = _data_source(*part.detail)
    for row in range(part.start, len(rows) if part.stop is None else part.stop):
        yield row + 1, rows[row]


_CUTTERS: dict[str, Callable[[Piece, int], list[Piece]]] = {
    "lines": _cut_lines,
    "text": _cut_text,
    "parquet": _cut_parquet,
    "arrow": _cut_arrow,
    "array_record": _cut_records,
}
_READERS: dict[str, Callable[[Piece], Iterable[tuple[int, Value]]]] = {
    "lines": _read_lines,
    "array": lambda part: enumerate(elements(chunks(part.path), part.limit), 1),
    "text": _read_text,
    "kept": lambda part: kept_runs(
        part.path, part.name, float(part.detail[0]), TEXT_BYTES
    ),
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "array_record": _read_records,
    "tfds": _read_tfds,
    "unusable": lambda part: [(part.first, Bad(part.detail[0], whole=True))],
}
