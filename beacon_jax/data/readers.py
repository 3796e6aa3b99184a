"""Cuts sources into parts and reads the rows of each kind of file.

What the fields of a row mean is decided elsewhere (`fields`). Every reader yields
(number, value). The number is the 1-based line or row of its file. The value is bytes
(JSON), a dict of fields, a str (text) or a `Bad`. Memory is one row, one record batch
or one block, whatever the size of the file.
"""

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

from beacon_jax.data.csv_rows import csv_rows, twice
from beacon_jax.data.fields import COLUMNS, INVALID, unknown
from beacon_jax.data.heldout import kept_runs
from beacon_jax.data.packed import BOM, Bad, chunks, look, other_encoding, refusal
from beacon_jax.data.streams import (
    elements,
    first_after,
    json_kind,
    lines,
    newlines,
    text_blocks,
)
from beacon_jax.paths import is_pointer

PART_BYTES = 16 * 2**20
ROW_LIMIT = 64 * 2**20  # bytes
# A text longer than this is cut: about 15,000 tokens of English, below the max_length
# of the paper's stages (20,480), so that nothing of it is truncated.
TEXT_BYTES = 2**16
UNREAD = ...  # in place of a cell of a column that no record needs
BATCH = 16  # rows of columns or records in memory at a time

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
# Reader of each ending; that of JSON is found from the content (`json_kind`).
_KINDS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys(TEXT_ENDINGS, "text"),
    **{f".{kind}": kind for kind in ("parquet", "arrow", "array_record")},
}
ENDINGS = tuple(_KINDS)
# Endings of compressed files: whether they are, and by what, the first bytes say.
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# Kinds of files that are one document: those that are cut, and "packed" ones.
WHOLE_TEXTS = ("text", "packed")
# First bytes of files of columns, which a name may not tell.
_COLUMNS = {b"PAR1": "parquet", b"ARROW1": "arrow"}

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
    """Returns the supported ending of a file name without that of its packing."""
    bare = name.lower()
    for packed in PACKED_ENDINGS:
        bare = bare.removesuffix(packed)
    return next((e for e in ENDINGS if bare.endswith(e)), "")


def cut(part: Piece, part_bytes: int = PART_BYTES) -> list[Piece]:
    """Cuts a whole file or data set into pieces of about `part_bytes`.

    The kind of a whole file is "", or "kept"; it is found from the name and the first
    bytes.
    """
    if part.kind == "tfds":
        return _cut_tfds(part, part_bytes)
    if part.kind == "unusable":
        return [part]
    if is_pointer(part.path):
        return [unusable(part, "a pointer of git-lfs: fetch the file (git lfs pull)")]
    found, kind = look(part.path), _KINDS[ending(part.name)]
    kind = next(
        (k for mark, k in _COLUMNS.items() if found.head.startswith(mark)), kind
    )
    if kind in ("json", "csv", "text"):
        if reason := refusal(found, prose=kind == "text"):
            return [unusable(part, reason)]
        if part.kind == "kept":
            return [part]
        kind = json_kind(found.head) if kind == "json" else kind
        if not found.plain:
            return [part._replace(kind="packed" if kind == "text" else kind)]
    elif found.packed:
        return [unusable(part, f"compressed by {found.packed}: unpack the {kind} file")]
    part = part._replace(kind=kind)
    try:
        return _CUTTERS[kind](part, part_bytes) if kind in _CUTTERS else [part]
    except (pyarrow.ArrowException, OSError, RuntimeError, ValueError) as error:
        return [unusable(part, _broken(error, f"damaged {kind}").reason)]


def read(part: Piece) -> Iterator[tuple[int, Value]]:
    """Yields the rows of a part, in order."""
    yield from _READERS[part.kind](part)


def explained(part: Piece, reason: str) -> str:
    """Returns a reason, with the encoding of a file whose bytes are no UTF-8."""
    of_text = part.kind not in ("parquet", "arrow", "array_record", "tfds")
    more = other_encoding(part.path) if reason == INVALID and of_text else ""
    return f"{reason}{more}"


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
    if part.size <= part_bytes:
        return [part]
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
                yield i + 1, _text(data if i else data.removeprefix(BOM))


def _read_packed(part: Piece) -> Iterator[tuple[int, Value]]:
    """Yields the blocks of a text that is compressed or not in UTF-8, as `_read_text`.

    It is one part.
    """
    number = 0
    for number, block in enumerate(text_blocks(chunks(part.path), TEXT_BYTES), 1):
        if block:
            yield number, block if isinstance(block, Bad) else _text(block)
    if not number:
        yield 1, Bad("empty")


def _text(data: bytes) -> str | Bad:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return Bad(INVALID)
    if "\0" in text:
        return Bad("binary: a NUL byte")
    # Line ends as open() translates them.
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


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
            every = file.schema_arrow.names
            names = [name for name in every if name.lower() in COLUMNS]
            if not names:
                yield part.first, Bad(unknown(every), whole=True)
                return
            groups = list(range(part.start, part.stop or file.num_row_groups))
            batches = file.iter_batches(BATCH, row_groups=groups, columns=names)
            yield from _batches(part, batches, every)
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
    part: Piece, batches: Iterator[pyarrow.RecordBatch], every: Sequence[str] = ()
) -> Iterator[tuple[int, Value]]:
    """Yields the rows of batches, with UNREAD in the place of columns of no use.

    Args:
      every: names of the file's columns, if the batches do not have all of them.
    """
    number = part.first
    for batch in batches:
        names = batch.schema.names
        columns = {
            name: batch.column(i)
            for i, name in enumerate(names)
            if name.lower() in COLUMNS
        }
        unread = dict.fromkeys({*names, *every} - {*columns}, UNREAD)
        repeated = twice(names)
        for row in range(batch.num_rows):
            if repeated:
                yield number, Bad("a column twice")
                number += 1
                continue
            try:
                cells = {name: _cell(column[row]) for name, column in columns.items()}
                yield number, {**cells, **unread}
            except UnicodeDecodeError:
                yield number, Bad(INVALID)
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


def tfds_files(name: str, split: str, data_dir: str) -> list[Path]:
    """Returns the files that hold a split, all of its rows and perhaps others."""
    import tensorflow_datasets as tfds

    found = tfds.builder(name, data_dir=data_dir or None).info.splits[split]
    return sorted({Path(piece.filename) for piece in found.file_instructions})


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
    "values": lambda part: enumerate(
        elements(chunks(part.path), part.limit, array=False), 1
    ),
    "text": _read_text,
    "packed": _read_packed,
    "kept": lambda part: kept_runs(
        part.path, part.name, float(part.detail[0]), TEXT_BYTES
    ),
    "csv": lambda part: csv_rows(part.path, part.name, part.limit),
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "array_record": _read_records,
    "tfds": _read_tfds,
    "unusable": lambda part: [(part.first, Bad(part.detail[0], whole=True))],
}
