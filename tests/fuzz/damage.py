"""Damages inputs: what each kind of file suffers besides what all do (`mutate`)."""

import datetime
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from beacon_jax.resources import TOKENIZER_FILES
from tests.fuzz.inputs import ROWS
from tests.fuzz.mutate import (
    damage_bytes,
    damage_files,
    damage_json,
    damage_json_file,
    damage_text,
    write_json,
)


def json_files(*patterns: str) -> Callable[[random.Random, Path], tuple[str, str]]:
    """Damages one of the JSON files of these names."""

    def damage(rng: random.Random, folder: Path) -> tuple[str, str]:
        names = sorted(path for p in patterns for path in folder.rglob(p))
        return damage_json_file(rng, rng.choice(names))

    return damage


def damage_header(rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damages the header of a safetensors file: its JSON, its length or its bytes."""
    path = rng.choice(sorted(folder.rglob("*.safetensors")))
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        data, what = damage_bytes(rng, data, end)
        path.write_bytes(data)
        return f"{path.name}: {what}", ""
    value, what, _ = damage_json(rng, json.loads(data[8:end]))
    header = write_json(value)
    size = len(header)
    if rng.random() < 0.1:
        size = rng.choice((0, size - 1, size + 1, 2**40, 2**64 - 1))
    path.write_bytes(size.to_bytes(8, "little") + header + data[end:])
    return f"{path.name}: {what}", ""


def damage_whole(rng: random.Random, folder: Path) -> tuple[str, str]:
    if rng.random() < 0.2:
        path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        data, what = damage_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.name}: {what}", ""
    return damage_files(rng, folder), ""


def damage_tokenizer(rng: random.Random, folder: Path) -> tuple[str, str]:
    template = folder / "chat_template.jinja"
    if rng.random() < 0.2:
        template.unlink(missing_ok=True)
        texts = (
            *("{{ messages[99].content }}", "{% for %}", "{{ raise_exception('no') }}"),
            *("", "{{ 1/0 }}", "{{ messages | tojson }}", "\ud800{{ x.y.z }}", "{{"),
            *("{{ bos_token * 3 }}{{ messages[0]['content'] }}", "{{ none.x }}", "é\0"),
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "{% for i in range(10**4) %}{{ messages[0].content }}{% endfor %}",
        )
        text = rng.choice(texts)
        template.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{template.name}: {text!r}", ""
    if rng.random() < 0.1:
        data, what = rng.choice((damage_bytes, damage_text))(rng, template.read_bytes())
        template.write_bytes(data)
        return f"{template.name}: {what}", ""
    if rng.random() < 0.15:
        (folder / rng.choice(TOKENIZER_FILES)).write_bytes(
            write_json(rng.choice(({}, [], None, {"a": 1}, "x", {"<x>": 10**30})))
        )
        return "another file of a tokenizer", ""
    names = ("tokenizer.json", "tokenizer_config.json")
    return damage_json_file(rng, folder / rng.choice(names))


def damage_gguf(rng: random.Random, folder: Path) -> tuple[str, str]:
    path = folder / "m.gguf"
    data = path.read_bytes()
    reach = rng.choice((64, 1200, len(data) - 30_000, None))
    data, what = damage_bytes(rng, data, reach)
    path.write_bytes(data)
    return f"{path.name}: {what}", ""


def damage_pack(rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damages a pack; or its manifest, and writes a pack of that manifest.

    The latter is what another version or program might have written.
    """
    path = folder / "a.beacon"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        data, what = damage_bytes(rng, data, rng.choice((20, end, None)))
        path.write_bytes(data)
        return f"{path.name}: {what}", ""
    header = json.loads(data[8:end])
    manifest = json.loads(header["__metadata__"]["manifest"])
    value, what, _ = damage_json(rng, manifest)
    text = write_json(value).decode()
    if rng.random() < 0.1:
        text, what = (
            rng.choice(("", "[", "7", "null", "{", "\ud800", text * 2)),
            "other",
        )
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    header["__metadata__"] |= {"manifest": text, "manifest_sha256": digest}
    tensors = value.get("tensors") if isinstance(value, dict) else None
    if rng.random() < 0.5 and isinstance(tensors, dict):
        for name in [*header]:  # a header that fits the manifest
            if name != "__metadata__" and isinstance(tensors.get(name), dict):
                for key in ("dtype", "shape"):
                    header[name][key] = tensors[name].get(key)
    if rng.random() < 0.1:
        value, what, _ = damage_json(rng, header)
        header = value
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    path.write_bytes(len(written).to_bytes(8, "little") + written + data[end:])
    return f"{path.name} with a checksum that fits: {what}", ""


def damage_rows(rng: random.Random, folder: Path) -> tuple[str, str]:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data, kind = path.read_bytes(), rng.random()
    if path.suffix in (".jsonl", ".json") and kind < 0.7:
        rows = [json.loads(json.dumps(row)) for row in ROWS]
        done = []
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(rows))
            rows[at], what, _ = damage_json(rng, rows[at])
            done.append(f"row {at}: {what}")
            if not isinstance(rows[at], dict | list) or not rows[at]:
                rows[at] = {"text": rows[at]}
        parts = [write_json(row) for row in rows]
        lines = path.suffix == ".jsonl"
        path.write_bytes(
            b"\n".join(parts) if lines else b"[" + b",\n".join(parts) + b"]"
        )
        return f"{path.name}: {'; '.join(done)}", ""
    if path.suffix == ".parquet" and kind < 0.5:
        return f"{path.name}: {_odd_columns(rng, path)}", ""
    if (
        path.suffix in (".txt", ".md", ".csv", ".tsv", ".json", ".jsonl", ".ndjson")
        and kind < 0.8
    ):
        data, what = damage_text(rng, data)
    elif kind < 0.9:
        data, what = damage_bytes(rng, data)
    else:
        return damage_files(rng, folder), ""
    path.write_bytes(data)
    return f"{path.name}: {what}", ""


def _odd_columns(rng: random.Random, path: Path) -> str:
    """Writes a parquet file whose columns have other types than expected."""
    values: dict[str, Any] = {
        "numbers": [1, 2, None],
        "floats": [0.5, float("nan"), None],
        "bytes": [b"\xff\xfe", b"text", None],
        "dates": [datetime.datetime(2020, 1, 1)] * 3,
        "structs": [{"a": 1}, {"a": None}, None],
        "lists of lists": [[["a"]], [], None],
        "huge": pyarrow.array([2**63, 2**64 - 1, None], "uint64"),
        "decimals": pyarrow.array([1, 2, None]).cast(pyarrow.decimal128(30, 2)),
        "dictionary": pyarrow.array(["a", "b", None]).dictionary_encode(),
        "nulls": pyarrow.nulls(3),
        "lists": pyarrow.array([[1, None], [], None]),
        "fixed lists": pyarrow.array([[1, 2]] * 3, pyarrow.list_(pyarrow.int32(), 2)),
        "views": pyarrow.array(["a", "b", None]).cast(pyarrow.string_view()),
        "maps": pyarrow.array(
            [[("a", 1)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.int32())
        ),
        "durations": pyarrow.array([1, 2**62, None], pyarrow.duration("s")),
        "times": pyarrow.array([2**53, -(2**53), None], pyarrow.timestamp("s")),
    }
    columns = {}
    for name in rng.sample(
        ["text", "input_ids", "labels", "messages", "conversations", "content"], 2
    ):
        kind = rng.choice([*values])
        columns[name] = (kind, values[kind])
    table = pyarrow.table({name: value for name, (_, value) in columns.items()})
    pyarrow.parquet.write_table(table, path)
    return ", ".join(f"{name} of {kind}" for name, (kind, _) in columns.items())


def damage_run(rng: random.Random, folder: Path) -> tuple[str, str]:
    if rng.random() < 0.5:
        return damage_json_file(rng, folder / "config.json")
    newest = folder / "checkpoints" / "2"
    return rng.choice((json_files("*METADATA", "_sharding"), damage_whole))(rng, newest)


def damage_prepared(rng: random.Random, folder: Path) -> tuple[str, str]:
    if rng.random() < 0.6:
        return damage_json_file(rng, folder / "manifest.json")
    return damage_whole(rng, folder)
