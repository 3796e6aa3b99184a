"""Files as they are found: packed, in other encodings, of other kinds than named."""

import bz2
import gzip
import json
import lzma
import os
import re
import tarfile

import pytest

from beacon_jax.data.heldout import kept_runs
from beacon_jax.data.packed import Bad
from beacon_jax.data.sources import Dropped, Record, open_parts
from beacon_jax.data.text import read_corpus
from tests.data.source_files import json_lines, rows_of, texts_of, zstd

BOOK = "".join(f"line {i} é\n" for i in range(20_000))
FRENCH = "Le café où nous déjeunâmes était fermé à Noël.\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("end", PACKERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_packed_text_is_the_text(tmp_path, end, encoding):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/book.txt").write_text(BOOK, encoding="utf-8")
    packed = tmp_path / f"book.txt{end}"
    packed.write_bytes(PACKERS[end](BOOK.encode(encoding)))
    assert texts_of(str(packed)) == texts_of(str(tmp_path / "plain"))
    assert len(open_parts([str(packed)], part_bytes=1000)) == 1
    lone, plain = (read_corpus(str(x)) for x in (packed, tmp_path / "plain/book.txt"))
    assert [text for _, text in lone.documents] == [text for _, text in plain.documents]
    runs = [
        kept_runs(x, "n", 0.3, 2**16) for x in (packed, tmp_path / "plain/book.txt")
    ]
    assert list(runs[0]) == list(runs[1])


def test_a_text_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    file = tmp_path / "book.txt.gz"
    noise = os.urandom(300_000).hex().encode()
    file.write_bytes(gzip.compress(noise)[:-100_000])
    *texts, last = rows_of(str(file))
    assert last.reason == "truncated gzip" and len(texts) > 1
    assert noise.decode().startswith("".join(row.text for row in texts))
    *_, (_, bad) = kept_runs(file, "n", 0.3, 2**16)
    assert bad == Bad("truncated gzip", whole=True)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{\x00\x00\xdc")
    assert rows_of(str(tmp_path / "a.jsonl"))[-1].reason == "damaged utf-16"


def test_prose_that_begins_as_a_packed_file_does_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("BZh is how bzip2 begins.")
    (tmp_path / "b.txt").write_text("GGUF is a format.")
    assert texts_of(str(tmp_path)) == ["BZh is how bzip2 begins.", "GGUF is a format."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json.gz", "a.dat"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%PDF-1.7", "a PDF, no plain text: extract its text"),
        (
            b"PK\x03\x04\0",
            "a zip archive, or a document of an office program, no plain te",
        ),
        (PNG, "a picture (image/png), no plain text: "),
        (b"SQLite format 3\0", "a database, no plain text: "),
    ],
)
def test_what_is_no_text_is_named_with_the_remedy(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(gzip.compress(content) if ".gz" in name else content)
    (tmp_path / "b.txt").write_text("b")
    row = rows_of(str(tmp_path))[0]
    assert row.where == name and row.reason.startswith(reason)
    if name == "a.txt":  # also alone, with documents held out of it
        (row,) = rows_of(str(tmp_path / name), heldout=0.1)
        assert row.reason.startswith(reason)


def test_a_tar_archive_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    with tarfile.open(tmp_path / "a.json.gz", "w:gz") as file:
        file.add(tmp_path / "a.jsonl", "a.jsonl")
    assert rows_of(str(tmp_path / "a.json.gz")) == [
        Dropped(
            "a.json.gz",
            "an archive (application/x-tar), no plain text: unpack it, and give the "
            "text in it",
        )
    ]


def test_packed_columns_and_what_is_no_file_are_named(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_text("c")
    assert rows_of(str(tmp_path)) == [
        Dropped("a.parquet.gz", "compressed by gzip: unpack the parquet file"),
        Dropped("b.jsonl", "no file but a pipe or device: write it to a file"),
        Record("c.txt:1", "c"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_another_encoding_is_guessed_and_the_remedy_named(tmp_path, name):
    lines = [json.dumps({"text": FRENCH}, ensure_ascii=False)] * 3
    text = "\n".join(lines) if name == "a.jsonl" else f"text\n{FRENCH}"
    (tmp_path / name).write_bytes(text.encode("cp1252"))
    rows = rows_of(str(tmp_path / name))
    said = r"the file may be cp1252.*, write it anew .* \(iconv -f cp1252 -t utf-8\)"
    assert len({row.reason for row in rows}) == 1
    assert re.match(f"invalid UTF-8: {said}", rows[0].reason)
    if name == "a.txt":
        with pytest.raises(ValueError, match=said):
            read_corpus(str(tmp_path))


def test_a_damaged_row_among_others_is_no_encoding(tmp_path):
    good = json.dumps({"text": FRENCH}, ensure_ascii=False).encode()
    bad = good.decode().encode("cp1252")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, bad, good, good]))
    assert [row.reason for row in rows_of(str(tmp_path)) if len(row) == 2] == [
        "invalid UTF-8"
    ]


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (b'{\n "text": "a"\n}\n{\n "text": "b"', ["object not closed"]),
        (b'{\n "text": "a"\n}\n{\n "text": nonsense }\n{"text": "b"}', ["not JSON"]),
        (b"{'text': 'a'}", ["not JSON: quotes must be double (json.dumps)"]),
        (b'{"text": "a",,}', ["not JSON"]),
        (b'{"text": "no end,\n{"text": "a"}', ["not JSON"]),
    ],
)
def test_json_that_is_none_costs_only_its_row(tmp_path, content, reasons):
    (tmp_path / "a.json").write_bytes(content)
    rows = rows_of(str(tmp_path / "a.json"))
    assert [row.reason for row in rows if isinstance(row, Dropped)] == reasons


@pytest.mark.parametrize("end", ["", "]", ", ]", '"'])
def test_commas_inside_of_strings_stay(tmp_path, end):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a,{end}\\"})[:-1] + ",}")
    assert texts_of(str(tmp_path / "a.jsonl")) == [f"a,{end}\\"]


def test_fields_of_csv_may_have_a_blank_in_front(tmp_path):
    (tmp_path / "a.csv").write_text('question, answer\n"a, b", "c, d"\n')
    (row,) = rows_of(str(tmp_path))
    assert row.turns == (("user", "a, b"), ("assistant", "c, d"))


def test_columns_of_csv_have_blanks_and_capitals(tmp_path):
    (tmp_path / "a.csv").write_text("Prompt; Response ;Id\nwhy, who?;because;7\n")
    assert rows_of(str(tmp_path)) == [
        Record(
            "a.csv:2",
            turns=(("user", "why, who?"), ("assistant", "because")),
            unread=("id",),
        )
    ]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        # A quote that opens a field and never closes, or three rows below.
        ("a.tsv", '"a\t1\nb\t0\nc" d\t1\ne\t1\n', ['"a', "b", 'c" d', "e"]),
        ("a.tsv", 'd "e"\t1\n"a\t1\nb\t0\nc"\t1\n', ['d "e"', '"a', "b", 'c"']),
        ("a.tsv", 'a\t1\n"b\t0\nc\t1\n', ["a", '"b', "c"]),
        ("a.csv", '"a\t1\n"b ""c"""\t0\n', ['"a', 'b "c"']),
        ("a.tsv", '"a\nb"\t1\n"c\td"\t0\n', ["a\nb", "c\td"]),
        ("a.csv", '"a, b\nc, d",1\n"e",0\n', ["a, b\nc, d", "e"]),
    ],
)
def test_quotes_join_no_rows(tmp_path, name, content, texts):
    between = "\t" if "\t1" in content else ","
    (tmp_path / name).write_text(f"text{between}label\n{content}")
    assert texts_of(str(tmp_path)) == texts


SAID = "not CSV: a quote inside of a field is "


@pytest.mark.parametrize(
    ("content", "said", "last"),
    [
        ('"x" y,b\n"e","f"', SAID + '"" and a field with one in quotes', "e"),
        ('"x,b\ne,f\n', SAID + '"" and a field with one in quotes, from here', ""),
        ('"x\n" y,b\ne,f', SAID + '"" and a field with one in quotes, from here', ""),
        ('"he said \\"hi\\" to me","b"\n"e","f"', SAID + r'"", not \", from here', ""),
        ('"x \\",\\"y"\n"e","f"', SAID + r'"", not \", from here', ""),
        ('"he said \\"hi\\""\tb\ne\tf', SAID + r'"", not \", from here', ""),
    ],
)
def test_quotes_of_other_kinds_are_named(tmp_path, content, said, last):
    between = "\t" if "\t" in content else ","
    head = between.join(("question", "answer")) + "\n" + between.join("cd") + "\n"
    (tmp_path / "a.csv").write_text(head + content)
    good, bad, *more = rows_of(str(tmp_path))
    assert good.turns == (("user", "c"), ("assistant", "d"))
    assert bad.where == "a.csv:3" and bad.reason.startswith(said)
    assert [row.turns[0][1] for row in more] == ([last] if last else [])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", '"a\t1\nb\t0\nc"\t1\n'),
        ("a.csv", '"x" y,1\n"a,1\nb,0\nc",1\n'),  # quotes were odd before
    ],
)
def test_lines_that_a_quote_may_join_or_not_are_named(tmp_path, name, content):
    between = "\t" if "\t1" in content else ","
    (tmp_path / name).write_text(f"text{between}label\n{content}d{between}1\n")
    *_, bad, good = rows_of(str(tmp_path))
    assert good.text == "d"
    assert (
        bad.reason == "not CSV: a quote joins lines, each of which is a row by itself"
    )


@pytest.mark.parametrize("names", [b'"text" x,label', b"text,caf\xe9"])
def test_rows_below_damaged_names_of_columns_are_not_read(tmp_path, names):
    (tmp_path / "a.csv").write_bytes(names + b"\ntext,label\na,b\n")
    (row,) = rows_of(str(tmp_path))
    assert row.where == "a.csv:1" and row.reason.startswith(("not CSV", "invalid"))


@pytest.mark.parametrize("name", ["n[5]", "n[5", "n*", "a b,c"])
def test_what_exists_as_it_is_written_is_no_pattern(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    (tmp_path / "n5").mkdir()
    (tmp_path / "n5/x.txt").write_text("other")
    (folder / "x.txt").write_text("own")
    (folder / "y[2].jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    monkeypatch.chdir(tmp_path)
    assert texts_of(name) == ["own", "two", "three"]
    assert texts_of(f"{name}/*.txt") == texts_of(f"{folder}/x.txt") == ["own"]
    assert texts_of(f"{name}/y[2].jsonl") == ["two", "three"]
    assert len(texts_of(f"{name}[1]")) == len(texts_of(f"{name}/y[2].jsonl[1]")) == 1


def test_several_sources_in_one_are_told_how_to_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "c d.txt"):
        (tmp_path / name).write_text("text")
    for uri in ("a.txt,b.txt", "a.txt b.txt", "a.txt, b.txt"):
        with pytest.raises(FileNotFoundError, match="sources=a.txt --config.data.sour"):
            open_parts([uri])
    with pytest.raises(FileNotFoundError, match=r"2 sources apart.*sources='c d.txt'"):
        open_parts(["a.txt, c d.txt"])
