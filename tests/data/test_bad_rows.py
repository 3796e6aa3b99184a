"""Bad rows and files are dropped where they are, with a reason, and nothing else is."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from beacon_jax.data.fields import BOOKSUM, UNKNOWN, record
from beacon_jax.data.sources import Dropped, Record, open_parts, read_part
from tests.data.source_files import (
    WRITERS,
    json_lines,
    rows_of,
    write_records,
    write_stream,
    zstd,
)

BAD_ROWS = {
    b"nonsense": "not JSON",
    b'{"text": "no end': "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"text": "caf\xe9"}': "invalid UTF-8",
    '{"text": "a"}'.encode("utf-16"): "invalid UTF-8",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "a\\u0000b"}': "NUL character",
    b'{"text": "a", "text": "b"}': "a key twice",
    b'"text"': "not an object",
    b'[{"text": "a"}]': "not an object",
    b'[{"role": "user", "content": " "}]': "empty",
    b'{"role": "user", "content": "a"}': "a turn without its conversation",
    b"null": "not an object",
    b"{}": UNKNOWN,
    b'{"title": "a"}': UNKNOWN,
    b'{"instruction": "a"}': UNKNOWN,
    b'{"text": 3}': "wrong type",
    b'{"text": ["a"]}': "wrong type",
    b'{"text": null}': "wrong type",
    b'{"text": ""}': "empty",
    b'{"text": " \\n"}': "empty",
    b'{"conversations": []}': "empty",
    b'{"conversations": [{"role": "user", "content": " "}]}': "empty",
    b'{"conversations": "a"}': "wrong type",
    b'{"conversations": ["a"]}': "missing role",
    b'{"conversations": [1]}': "wrong type",
    b'{"conversations": {"role": ["user"], "content": []}}': "wrong type",
    b'{"conversations": [{"content": "a"}]}': "missing role",
    b'{"conversations": [{"from": null, "value": "a"}]}': "missing role",
    b'{"conversations": [{"role": "user"}]}': "missing content",
    b'{"conversations": [{"role": "wizard", "content": "a"}]}': "unknown role",
    b'{"conversations": [{"role": 1, "content": "a"}]}': "wrong type",
    b'{"conversations": [{"role": "user", "content": 1}]}': "wrong type",
    b'{"instruction": "a", "output": ""}': "empty",
    b'{"instruction": "a", "output": "b", "input": 1}': "wrong type",
    b'{"chapter": " ", "summary_text": "s"}': "empty",
    b'{"input_ids": "abc"}': "wrong type",
    b'{"input_ids": [1.5]}': "wrong type",
    b'{"input_ids": [true]}': "wrong type",
    b'{"input_ids": [-1]}': "wrong type",
    b'{"input_ids": [[1], [2, 3]]}': "wrong type",
    b'{"input_ids": [4294967296]}': "wrong type",
    b'{"input_ids": [36893488147419103232]}': "wrong type",
    b'{"input_ids": []}': "empty",
    b'{"input_ids": [1], "labels": [1, 2]}': "labels of another length",
    b'{"text": "' + b"x" * 200_000 + b'"}': "line longer than 128 KiB",
}
GOOD = b'{"text": "good"}'


def brief(rows):
    """The rows, with what stands in front of the colon of reasons."""
    return [
        row._replace(reason=row.reason.partition(":")[0])
        if isinstance(row, Dropped)
        else row
        for row in rows
    ]


def test_every_bad_line_is_dropped_with_its_reason_and_the_next_is_read(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"".join(bad + b"\n" + GOOD + b"\n" for bad in BAD_ROWS))
    for part_bytes in (64, 2**24):
        rows = brief(rows_of(str(file), row_limit=2**17, part_bytes=part_bytes))
        assert [row for row in rows[1::2] if row[1] != "good"] == []
        assert rows[::2] == [
            Dropped(f"bad.jsonl:{2 * i + 1}", reason)
            for i, reason in enumerate(BAD_ROWS.values())
        ]


def test_every_bad_record_of_an_array_record_file_is_dropped(tmp_path):
    rows = {row: why for row, why in BAD_ROWS.items() if "longer" not in why}
    write_records(tmp_path / "a.array_record", [x for bad in rows for x in (bad, GOOD)])
    found = brief(rows_of(str(tmp_path / "a.array_record")))
    assert [row.reason for row in found[::2]] == list(rows.values())
    assert {row.text for row in found[1::2]} == {"good"}


def test_a_bad_element_of_an_array_costs_only_itself(tmp_path):
    bad = {
        row: why.replace("line", "row")
        for row, why in BAD_ROWS.items()
        # Brackets or quotes that do not close swallow what follows: the next test.
        if row.count(b"[") == row.count(b"]") and row.count(b'"') % 2 == 0
    }
    file = tmp_path / "bad.json"
    elements = [x for row in bad for x in (row, GOOD)]
    file.write_bytes(b"[" + b", ".join(elements) + b"]\n")
    rows = brief(rows_of(str(file), row_limit=2**17))
    assert [row.reason for row in rows[::2]] == list(bad.values())
    assert {row.text for row in rows[1::2]} == {"good"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "good"}, {"text": "no', "array not closed"),
        (b'[{"text": "good"}', "array not closed"),
        (b'[{"text": "good"}] [{"text": "b"}]', "data after the array"),
        (b'[{"text": "good"}]\n{"text": "b"}', "data after the array"),
    ],
)
def test_an_array_that_ends_wrongly_is_read_as_far_as_it_goes(
    tmp_path, content, reason
):
    (tmp_path / "a.json").write_bytes(content)
    rows = rows_of(str(tmp_path / "a.json"))
    assert rows[-1] == Dropped(rows[-1].where, reason)
    assert {row.text for row in rows[:-1]} <= {"good"}


@pytest.mark.parametrize(
    ("name", "kind", "pack", "noise"),
    [  # what the decoder cannot take for data
        ("a.jsonl.gz", "gzip", gzip.compress, b"\0" * 99),
        ("a.jsonl.zst", "zstd", zstd, b"\xff" * 999_999),
        ("a.jsonl.bz2", "bzip2", lambda data: bz2.compress(data, 1), b"\xff" * 999),
        ("a.jsonl", "xz", lzma.compress, b"\xff" * 999),
    ],
)
def test_a_compressed_file_is_read_up_to_its_damage(tmp_path, name, kind, pack, noise):
    numbers = random.Random(0)
    rows = [{"text": f"{numbers.getrandbits(800):x}"} for _ in range(4000)]
    texts = [row["text"] for row in rows]
    data = pack(json_lines(rows))
    file = tmp_path / name
    half = len(data) // 2
    broken = data[:half] + noise + data[half + len(noise) :]
    for content, how in ((data[:half], "truncated"), (broken, "damaged")):
        file.write_bytes(content)
        *good, last = rows_of(str(file))
        assert isinstance(last, Dropped) and last.reason == f"{how} {kind}"
        assert last.where == f"{name}:{len(good) + 1}"
        assert len(good) > 500  # half, less what decoders hold back
        assert [row.text for row in good[:500]] == texts[:500]
    file.write_bytes(json_lines(rows[:3]))  # not compressed at all
    assert [row.text for row in rows_of(str(file))] == texts[:3]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.array_record"])
def test_a_damaged_file_of_columns_or_records_is_one_dropped(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(b"not what the name says " * 10)
    kind = name.partition(".")[2]
    assert rows_of(str(file)) == [Dropped(name, f"damaged {kind}")]
    WRITERS[name](file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    last = rows_of(str(file))[-1]
    assert isinstance(last, Dropped) and last.reason == f"damaged {kind}"


def test_files_without_rows_give_none_and_texts_without_text_are_dropped(tmp_path):
    for name, content in (("a.jsonl", b""), ("b.json", b" "), ("c.json", b"[ ]")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.csv").write_bytes(b"text\n")
    write_stream(tmp_path / "a.arrow", pyarrow.table({"text": ["a"]})[:0])
    write_records(tmp_path / "a.array_record", [])
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.md").write_text(" \n")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "e.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], "string")}), tmp_path / "f.parquet"
    )
    assert brief(rows_of(str(tmp_path))) == [
        Dropped("b.txt:1", "empty"),
        Dropped("c.md:1", "empty"),
        Dropped("d.txt:1", "invalid UTF-8"),
        Dropped("e.parquet:1", UNKNOWN),
    ]


@pytest.mark.parametrize("seed", range(12))
def test_damage_inside_of_arrow_never_ends_the_process(tmp_path, seed):
    WRITERS["a.arrow"](tmp_path / "a.arrow")
    rng = random.Random(seed)
    data = bytearray((tmp_path / "a.arrow").read_bytes())
    for _ in range(3):
        at = rng.randrange(300, len(data) - 4)
        data[at : at + 4] = rng.choice((2**31 - 1, 10**6, -7)).to_bytes(
            4, "little", signed=True
        )
    (tmp_path / "a.arrow").write_bytes(data)
    for row in rows_of(str(tmp_path / "a.arrow")):
        assert isinstance(row, Record) or row.reason.partition(":")[0] in (
            *("damaged arrow", "invalid UTF-8", "wrong type", UNKNOWN, "empty"),
            "NUL character",
        )


def test_a_text_that_is_no_utf_8_costs_only_its_row_in_arrow(tmp_path):
    texts = pyarrow.array([b"caf\xe9", b"good"]).view("string")
    write_stream(tmp_path / "a.arrow", pyarrow.table({"text": texts}))
    bad, good = rows_of(str(tmp_path / "a.arrow"))
    assert bad == Dropped("a.arrow:1", "invalid UTF-8") and good.text == "good"


def test_cells_that_python_has_no_value_for_cost_only_their_rows(tmp_path):
    file = tmp_path / "a.parquet"
    odd = pyarrow.array([2**53, None], pyarrow.timestamp("ms"))
    columns = {"text": ["bad", "good"], "content": odd}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    bad, good = rows_of(str(file))
    assert bad == Dropped("a.parquet:1", "wrong type") and good.text == "good"


def test_line_ends_of_old_macs_in_csv_are_no_long_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\rone\rtwo\r")
    assert rows_of(str(tmp_path / "a.csv")) == [Dropped("a.csv:1", "not CSV")]


def test_bad_csv_rows_are_dropped_and_the_next_are_read(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"chapter,summary_text\nc,s\nc,s,more\nc\ncaf\xe9,s\n,s\n"
        + b"x" * 3000
        + b',s\n"two\nlines",s\n"never closed,s\n'
        + b"y\n" * 3000
    )
    assert brief(rows_of(str(file), row_limit=2048))[:8] == [
        Record("a.csv:2", turns=(("user", f"{BOOKSUM}c"), ("assistant", "s"))),
        Dropped("a.csv:3", "another number of fields than the header"),
        Dropped("a.csv:4", "another number of fields than the header"),
        Dropped("a.csv:5", "invalid UTF-8"),
        Dropped("a.csv:6", "empty"),
        Dropped("a.csv:7", "line longer than 2 KiB"),
        Record("a.csv:8", turns=(("user", f"{BOOKSUM}two\nlines"), ("assistant", "s"))),
        Dropped("a.csv:10", "row longer than 2 KiB"),
    ]


def test_invalid_utf8_in_a_column_is_dropped(tmp_path):
    bad = pyarrow.array([b"good", b"\xff"]).cast(pyarrow.string(), safe=False)
    bad = bad if isinstance(bad, pyarrow.Array) else bad.chunk(0)
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    assert rows_of(str(tmp_path / "a.parquet")) == [
        Record("a.parquet:1", "good"),
        Dropped("a.parquet:2", "invalid UTF-8"),
    ]


def test_unknown_fields_are_answered_with_those_of_the_row_and_the_known_ones():
    found = record("x", {f"field{i}": i for i in range(20)})
    assert isinstance(found, Dropped)
    assert found.reason.startswith("unknown fields: it has 'field0', 'field1', ")
    assert "'field7', 12 more (known: " in found.reason
    for fields in ("text", "conversations", "messages", "instruction + output"):
        assert f", {fields}, " in found.reason


def test_messages_are_a_conversation():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = record("a.jsonl:1", {"messages": turns, "id": 7})
    assert isinstance(found, Record)
    assert found.turns == (("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.txt"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, name):
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\nsize 5\n")
    reason = "a pointer of git-lfs: fetch the file (git lfs pull)"
    assert rows_of(str(file)) == [Dropped(name, reason)]


@pytest.mark.parametrize("heldout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (rb"{\rtf1\ansi Hello.}", "RTF, no plain text: save it as plain text"),
        (b"%PDF-1.7 a", "a PDF, no plain text"),
        ("今日は\n".encode("iso2022_jp"), "iso2022_jp, not UTF-8: write it anew"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
    ],
    ids=lambda given: given[:9] if isinstance(given, str) else "",
)
def test_a_file_that_is_ascii_and_no_plain_text_is_no_data(
    tmp_path, content, reason, heldout
):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    (part,) = open_parts([str(file)], heldout=heldout)
    (dropped,) = read_part(part)
    assert isinstance(dropped, Dropped) and dropped.where == "a.txt"
    assert dropped.reason.startswith(reason)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("words", ["q", "q" * 99_999])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_of_turns_are_conversations(tmp_path, rows, words, pack):
    file = tmp_path / "a.jsonl"
    line = json.dumps([{"role": "user", "content": words}, TURNS[1]]) + "\n"
    file.write_bytes(pack(line.encode() * rows))
    turns = (("user", words), ("assistant", "a"))
    assert rows_of(str(file)) == [
        Record(f"a.jsonl:{i + 1}", turns=turns) for i in range(rows)
    ]


def test_an_array_of_lone_turns_is_no_text(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(TURNS))
    alone = "a turn without its conversation"
    assert rows_of(str(file)) == [
        Dropped("a.json:1", alone),
        Dropped("a.json:2", alone),
    ]


def test_a_column_that_is_there_twice_is_not_chosen_from(tmp_path):
    (tmp_path / "a.csv").write_text("text,n,n,text\na,1,2,b\n")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("text,n,n\na,1,2\n")
    assert rows_of(str(tmp_path)) == [
        Dropped("a.csv:2", "a column twice"),
        Dropped("b.parquet:1", "a column twice"),
        Record("c.csv:2", text="a", unread=("n",)),
    ]
