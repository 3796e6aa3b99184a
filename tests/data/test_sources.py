"""Sources: every kind of file gives the same rows, in whole or in parts."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.data.fields import BOOKSUM
from beacon_jax.data.sources import (
    Dropped,
    Record,
    open_parts,
    parse_uri,
    read_part,
    source_bytes,
)
from tests.data.source_files import (
    ROWS,
    TEXTS,
    WRITERS,
    json_lines,
    rows_of,
    texts_of,
    write_saved_dataset,
)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_its_rows_in_order_whole_or_in_parts(tmp_path, name):
    WRITERS[name](tmp_path / name)
    uri = str(tmp_path / name)
    whole = rows_of(uri)
    assert [row.text for row in whole] == TEXTS
    assert len({row.where for row in whole}) == len(ROWS)
    assert not any(str(tmp_path) in row.where for row in whole)
    for part_bytes in (1, 300, 1000):
        assert rows_of(uri, part_bytes=part_bytes) == whole


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part_bytes", [500, 2**24])
def test_a_count_takes_the_rows_that_the_release_takes(tmp_path, name, part_bytes):
    WRITERS[name](tmp_path / name)
    rows = texts_of(f"{tmp_path / name}[13]", part_bytes=part_bytes)
    wanted = np.random.default_rng(42).permutation(len(ROWS))[:13]
    assert rows == [TEXTS[i] for i in sorted(wanted)]


def test_numbers_are_those_of_lines_rows_or_elements(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text":"a"}\r\n \n{"text":"b"}')
    (tmp_path / "b.json").write_bytes(b'[{"text":"a"},\n\n{"text":"b"}]')
    (tmp_path / "c.csv").write_bytes(b'text,n\r\n"a\nb",1\n\n"c",2\n')
    where = [row.where for row in rows_of(str(tmp_path))]
    assert where == [
        *("a.jsonl:2", "a.jsonl:4"),
        *("b.json:1", "b.json:2"),
        *("c.csv:2", "c.csv:5"),
    ]


def test_a_folder_is_read_recursively_in_sorted_order_and_strangers_are_reported(
    tmp_path,
):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "no.txt").write_text("no")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "no.txt").write_text("no")
    (tmp_path / ".no.txt").write_text("no")
    (tmp_path / "z.txt").write_text("first\r\nline\rend")
    (tmp_path / "b" / "c" / "y.md").write_text("fourth")
    (tmp_path / "b" / "x.py").write_text("third")
    (tmp_path / "b" / "a.jsonl").write_text('{"text": "second"}')
    (tmp_path / "b" / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "b" / "w.pth").write_bytes(b"weights")
    (tmp_path / "b" / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    assert rows_of(str(tmp_path)) == [
        Dropped("linked", "linked folder, not followed"),
        Record("z.txt:1", "first\nline\nend"),
        Record("b/a.jsonl:1", "second"),
        Dropped("b/gone.txt", "broken link"),
        Dropped(
            "b/image.png", "a picture (image/png), no plain text: give a text file"
        ),
        Dropped("b/w.pth", "unknown ending"),
        Record("b/x.py:1", "third"),
        Record("b/c/y.md:1", "fourth"),
    ]


def test_a_glob_gives_each_file_once_and_names_them_from_where_it_begins(tmp_path):
    write_saved_dataset(tmp_path / "in" / "saved", pyarrow.Table.from_pylist(ROWS[:2]))
    (tmp_path / "in" / "b.txt").write_text("b")
    (tmp_path / "in" / "a.txt").write_text("a")
    found = [row.where for row in rows_of(f"{tmp_path}/in/*.txt")]
    assert found == ["a.txt:1", "b.txt:1"]
    found = [row.where for row in rows_of(f"{tmp_path}/**")]
    assert sorted(found) == [
        "in/a.txt:1",
        "in/b.txt:1",
        "in/saved/data-00000-of-00002.arrow:1",
        "in/saved/data-00001-of-00002.arrow:1",
    ]
    assert len(rows_of(f"{tmp_path}/i?/[ab].txt[1]")) == 1


def test_order_is_that_of_the_uris_and_parts_say_which(tmp_path):
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    uris = (str(tmp_path / "b.txt"), str(tmp_path / "a.jsonl"))
    parts = open_parts(uris, part_bytes=500)
    assert [part.source for part in parts] == [0] + [1] * (len(parts) - 1)
    assert texts_of(*uris, part_bytes=500) == ["b", *TEXTS]
    sizes = [sum(p.size for p in parts if p.source == i) for i in range(2)]
    assert sizes == source_bytes(uris) == [1, (tmp_path / "a.jsonl").stat().st_size]


def test_a_part_can_be_pickled_and_is_read_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    parts = open_parts([f"{tmp_path / 'a.jsonl'}[20]"], part_bytes=500)
    assert len(parts) > 3
    alone = [list(read_part(pickle.loads(pickle.dumps(p)))) for p in parts[::-1]]
    assert [row for rows in alone[::-1] for row in rows] == rows_of(
        f"{tmp_path / 'a.jsonl'}[20]"
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_byte_ranges_give_the_lines_of_the_whole_file(tmp_path_factory, data):
    lines = data.draw(
        st.lists(
            st.sampled_from(
                [b"", b" ", b"not json", b'{"text": "\xff"}', b'{"text": "a"}\r']
                + [json.dumps({"text": "x" * n}).encode() for n in (1, 30, 200)]
            ),
            max_size=30,
        )
    )
    end = data.draw(st.sampled_from([b"", b"\n"]))
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_bytes(b"\n".join(lines) + end)
    whole = rows_of(str(file))
    usable = [i for i, line in enumerate(lines, 1) if line.strip()]
    assert [row.where for row in whole] == [f"a.jsonl:{i}" for i in usable]
    part_bytes = data.draw(st.integers(1, 400))
    assert rows_of(str(file), part_bytes=part_bytes) == whole
    parts = open_parts([str(file)], part_bytes=part_bytes)
    assert sum(part.size for part in parts) == file.stat().st_size
    if usable:
        rows = data.draw(st.integers(1, len(usable)))
        chosen = np.random.default_rng(42).permutation(len(usable))[:rows]
        some = rows_of(f"{file}[{rows}]", part_bytes=part_bytes)
        assert some == [whole[i] for i in sorted(chosen)]


@pytest.mark.parametrize("line", ["a line of text é\n", "é" * 90_001])
def test_long_texts_are_cut_at_line_ends_where_there_are_any(tmp_path, line):
    text = line * (300_000 // len(line))
    file = tmp_path / "book.txt"
    file.write_text(text)
    pieces = texts_of(str(file))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 2 * 2**16
    if "\n" in line:
        assert all(piece.endswith("\n") for piece in pieces)
    assert rows_of(str(file), part_bytes=1) == rows_of(str(file))
    assert len(open_parts([str(file)], part_bytes=1)) == len(pieces)


def test_fields_become_text_turns_or_tokens(tmp_path):
    conversation = (("system", ""), ("user", "q"), ("assistant", "a"))
    rows = [
        {"text": "t", "meta": {"any": 1}},
        {"conversations": [{"role": r, "content": c} for r, c in conversation]},
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a", "input": "more", "file": "x"},
        {"instruction": "q", "output": "a", "input": ""},
        {"chapter": "c", "summary_text": "s", "book_id": "x"},
        {"text": None, "conversations": [{"role": "user", "content": "q"}]},
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    assert [row[1:3] for row in rows_of(str(tmp_path / "a.jsonl"))] == [
        ("t", None),
        (None, conversation),
        (None, conversation),
        (None, (("user", "q"), ("assistant", "a"))),
        (None, (("user", "q\nmore"), ("assistant", "a"))),
        (None, (("user", "q"), ("assistant", "a"))),
        (None, (("user", f"{BOOKSUM}c"), ("assistant", "s"))),
        (None, (("user", "q"),)),
    ]


def test_conversations_and_tokens_are_read_from_columns(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"conversations": turns, "n": 1}] * 3),
        tmp_path / "turns.parquet",
    )
    rows = rows_of(str(tmp_path / "turns.parquet"))
    assert [row.turns for row in rows] == [(("user", "q"), ("assistant", "a"))] * 3
    tokens = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "length": 3},
        {"input_ids": [4], "labels": [4], "length": 1},
        {"input_ids": [5, 6], "labels": None, "length": 2},
        {"input_ids": [5, 6], "labels": [1], "length": 2},
        {"input_ids": [], "labels": [], "length": 0},
        {"input_ids": [5, None], "labels": None, "length": 0},
    ]
    for split in ("train", "test"):
        write_saved_dataset(tmp_path / "d" / split, pyarrow.Table.from_pylist(tokens))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    rows = rows_of(str(tmp_path / "d"))
    assert len(rows) == 12
    for some, (ids, labels) in zip(
        rows, [([1, 2, 3], [-100, 2, 3]), ([4], [4]), ([5, 6], None)], strict=False
    ):
        assert isinstance(some, Record) and some.tokens is not None
        assert some.tokens[0].dtype == np.int32
        np.testing.assert_array_equal(some.tokens[0], ids)
        np.testing.assert_array_equal(some.tokens[1], labels)
    assert rows[3:6] == [
        Dropped("test/data-00001-of-00002.arrow:1", "labels of another length"),
        Dropped("test/data-00001-of-00002.arrow:2", "empty"),
        Dropped(
            "test/data-00001-of-00002.arrow:3",
            "wrong type: input_ids is no list of whole numbers of 32 bits",
        ),
    ]
    assert rows_of(str(tmp_path / "d" / "train"))[3].where.startswith("data-00001")


def test_the_layout_of_the_release_works_below_the_root(tmp_path):
    (tmp_path / "redpajama").mkdir()
    (tmp_path / "redpajama" / "train.json").write_bytes(json_lines())
    uri = "long-llm:redpajama/train.json"
    rows = rows_of(f"{uri}[5]", root=str(tmp_path))
    chosen = sorted(np.random.default_rng(42).permutation(60)[:5])
    assert [row.text for row in rows] == [TEXTS[i] for i in chosen]
    assert rows[0].where == f"redpajama/train.json:{chosen[0] + 1}"
    with pytest.raises(ValueError, match="data.root='', which is not set; set data"):
        open_parts([uri])
    with pytest.raises(FileNotFoundError, match="nope.json' does not exist in data.ro"):
        open_parts(["long-llm:nope.json"], root=str(tmp_path))


def test_the_standard_library_is_read_by_the_names_that_split_it():
    rows = rows_of("stdlib")
    names = {row.where.rpartition(":")[0] for row in rows if isinstance(row, Record)}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)


def test_uris_are_parsed_and_bad_ones_name_the_remedy(tmp_path):
    assert parse_uri("a/b.json[5000]")[1:] == ("", "a/b.json", 5000)
    assert parse_uri("a[bc].json")[1:] == ("", "a[bc].json", None)
    assert parse_uri("stdlib[3]")[1:] == ("stdlib", "", 3)
    assert parse_uri("tfds:pg19:train[:10%][7]")[1:] == (
        *("tfds", "pg19:train[:10%]"),
        7,
    )
    for uri, message in {
        "hf:some/set": "scheme 'hf' is unknown; use a path",
        "https://x/y.json": "scheme 'https' is unknown",
        "": "names no file; write",
        "long-llm:": "names no file",
        "a.json[0]": "takes no rows; name at least 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_uri(uri)
    (tmp_path / "a.png").write_bytes(b"")
    for uri, message in {
        "nowhere.json": "'nowhere.json' does not exist; name a file",
        f"{tmp_path}/*.json": "matches no file; check the pattern",
        "no-*.json": "matches no file; the pattern is relative to",
        f"{tmp_path}": r"1 files \(a.png: unknown ending\); expected files ending in",
    }.items():
        with pytest.raises(FileNotFoundError, match=message):
            open_parts([uri])


def test_a_count_above_the_rows_takes_all_and_says_so(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    assert texts_of(f"{tmp_path / 'a.jsonl'}[100]") == TEXTS
    assert "has only 60 rows; all are taken" in caplog.text


TINY = """
import sys
import tensorflow_datasets as tfds


class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain")]

    def _info(self):
        text = tfds.features.Text()
        turns = tfds.features.Sequence({"role": text, "content": text})
        features = tfds.features.FeaturesDict({"conversations": turns})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(40):
            turns = [("user", f"question {i} é"), ("assistant", f"answer {i}")]
            yield i, {"conversations": [dict(role=r, content=c) for r, c in turns]}


Tiny(data_dir=sys.argv[1], config="plain", file_format="array_record"
     ).download_and_prepare()
"""
READ = """
import sys
from beacon_jax.data.sources import open_parts, read_part
for part in open_parts(["tfds:tiny/plain:train"], root=sys.argv[1], part_bytes=900):
    for row in read_part(part):
        print(row.where, row.turns)
assert "tensorflow" not in sys.modules
assert "jax" not in sys.modules
"""


def _python(code, *arguments):
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_tfds_data_set_is_read_without_tensorflow(tmp_path):
    # In other processes: reading finds the data, not the class that built it.
    build = tmp_path / "build.py"
    build.write_text(TINY)
    _python(
        "import sys, runpy; runpy.run_path(sys.argv.pop(1))",
        str(tmp_path / "build.py"),
        str(tmp_path),
    )
    printed = _python(READ, str(tmp_path)).splitlines()
    rows = rows_of("tfds:tiny/plain:train", root=str(tmp_path))
    assert printed == [f"{row.where} {row.turns}" for row in rows]
    assert rows[16].where == "tiny/plain:train:17"
    assert {row.turns for row in rows} == {
        (("user", f"question {i} é"), ("assistant", f"answer {i}")) for i in range(40)
    }
    chosen = sorted(np.random.default_rng(42).permutation(40)[:6])
    some = rows_of("tfds:tiny/plain:train[6]", root=str(tmp_path))
    assert some == [rows[i] for i in chosen]
    tenth = rows_of("tfds:tiny/plain:train[:10%]", root=str(tmp_path))
    assert [row.turns for row in tenth] == [row.turns for row in rows[:4]]
    parts = open_parts(["tfds:tiny/plain:train"], root=str(tmp_path), part_bytes=900)
    assert sum(part.size for part in parts) == parts[0].size * len(parts) > 0
    for uri, error, message in (
        ("tfds:tiny/plain", ValueError, "names no split; write 'tfds:name/config:spl"),
        ("tfds:tiny/plain:test", ValueError, "split='test' is unknown; it has train"),
        ("tfds:absent:train", FileNotFoundError, "not prepared in TFDS's data_dir"),
    ):
        with pytest.raises(error, match=message):
            open_parts([uri], root=str(tmp_path))
