"""Writes the same rows as every kind of file that `data.sources` reads."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet

from beacon_jax.data.sources import Record, open_parts, read_part

ROWS = [{"text": f"row {i} é\n{'x' * (i % 7)}"} for i in range(60)]
TEXTS = [row["text"] for row in ROWS]


def rows_of(*uris, **options):
    return [row for part in open_parts(uris, **options) for row in read_part(part)]


def texts_of(*uris, **options):
    rows = rows_of(*uris, **options)
    assert all(isinstance(row, Record) for row in rows), rows
    return [row.text for row in rows]


def json_lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


def write_records(path, rows):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(row)
    writer.close()


def write_csv(path, rows, **options):
    encoding = options.pop("encoding", "utf-8")
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def write_stream(path, table, batch=8):
    """An Arrow stream, as save_to_disk writes them."""
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def write_arrow_file(path, table):
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=8)


def write_saved_dataset(folder, table):
    """What `datasets.Dataset.save_to_disk` leaves, caches of `map` included."""
    folder.mkdir(parents=True)
    half = len(table) // 2
    write_stream(folder / "data-00000-of-00002.arrow", table[:half])
    write_stream(folder / "data-00001-of-00002.arrow", table[half:])
    write_stream(folder / "cache-0123456789abcdef.arrow", table)
    (folder / "dataset_info.json").write_text('{\n "features": {}\n}')
    (folder / "state.json").write_text('{\n "_split": null\n}')


NUMBERED = [{"n": i, **row} for i, row in enumerate(ROWS)]  # two columns


def indented(rows=ROWS, ensure_ascii=True):
    """Objects over several lines, one after the other."""
    made = (json.dumps(row, indent=2, ensure_ascii=ensure_ascii) for row in rows)
    return "\n".join(made).encode()


def commas():
    """Lines of JSON, each with the commas that an array would need, and more."""
    return b"".join(line[:-1] + b", },\n" for line in json_lines().splitlines())


def array(rows=ROWS, **options):
    return json.dumps(rows, **options).encode()


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(json_lines()),
    "lines.json": lambda path: path.write_bytes(json_lines()),
    "a.json": lambda path: path.write_bytes(array()),
    "indented.json": lambda path: path.write_bytes(b"\n " + array(indent=2)),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json_lines()),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + array()),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(array())),
    "lines.json.gz": lambda path: path.write_bytes(gzip.compress(json_lines())),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(json_lines(ROWS[:9])) + gzip.compress(json_lines(ROWS[9:]))
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstd(json_lines(ROWS[:9])) + zstd(json_lines(ROWS[9:]))
    ),
    "a.json.zst": lambda path: path.write_bytes(zstd(array())),
    "a.csv": lambda path: write_csv(path, ROWS),
    "a.parquet": lambda path: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=7
    ),
    "a.arrow": lambda path: write_stream(path, pyarrow.Table.from_pylist(ROWS)),
    "file.arrow": lambda path: write_arrow_file(path, pyarrow.Table.from_pylist(ROWS)),
    "saved": lambda path: write_saved_dataset(path, pyarrow.Table.from_pylist(ROWS)),
    "a.array_record": lambda path: write_records(
        path, [json.dumps(row).encode() for row in ROWS]
    ),
    "a.ndjson": lambda path: path.write_bytes(json_lines()),
    "array.jsonl": lambda path: path.write_bytes(array(indent=1)),
    "objects.json": lambda path: path.write_bytes(indented()),
    "objects.jsonl.xz": lambda path: path.write_bytes(lzma.compress(indented())),
    "commas.jsonl": lambda path: path.write_bytes(commas()),
    "commas.json": lambda path: path.write_bytes(b"[" + commas() + b"]"),
    # Packed, whatever the name says.
    "gzip.jsonl": lambda path: path.write_bytes(gzip.compress(json_lines())),
    "plain.jsonl.gz": lambda path: path.write_bytes(json_lines()),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(json_lines())),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(array())),
    "a.ndjson.zstd": lambda path: path.write_bytes(zstd(json_lines())),
    "parquet.jsonl": lambda path: WRITERS["a.parquet"](path),
    "utf16.jsonl": lambda path: path.write_bytes(json_lines().decode().encode("utf16")),
    "utf16.json": lambda path: path.write_bytes(
        indented(ensure_ascii=False).decode().encode("utf-16-be")
    ),
    "utf32.csv": lambda path: write_csv(path, ROWS, encoding="utf-32"),
    "a.tsv": lambda path: write_csv(path, NUMBERED, dialect="excel-tab"),
    "tabs.csv": lambda path: write_csv(path, NUMBERED, delimiter="\t"),
    "semicolons.csv": lambda path: write_csv(
        path, NUMBERED, delimiter=";", encoding="utf-8-sig"
    ),
    "a.csv.gz": lambda path: (
        write_csv(path, ROWS),
        path.write_bytes(gzip.compress(path.read_bytes())),
    ),
    "UPPER.JSONL": lambda path: path.write_bytes(json_lines()),
}
