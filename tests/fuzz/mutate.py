"""Damages a file as users' files are damaged: by hand, in transit, by another program.

Each function takes a `random.Random` and returns what it did in a few words.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Strings of a JSON value that stand for text that no Python value is written as.
DEEP, LONG = "@deep@", "@long@"
SPELT = {DEEP: "[" * 100_000 + "]" * 100_000, LONG: "9" * 5000}
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 0.5, -0.5, 1e-30, 1e308),
    *(2**31, 2**63, 2**64, 10**30, -(2**63)),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "8", "-1", "nan", "none", "true", "text", "../up", "/", "a\0b", "é"),
    *("\ud800", "x" * 5000, DEEP, LONG),
    *([], [None], [1, 2], ["a", "b"], [[1], [2]], [{}], [-1], [10**30]),
    *({}, {"a": 1}, {"": None}, {"rope_type": "magic"}, {"type": "default"}),
)
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
OTHERS = {  # how files of other formats begin
    "HTML": b"<!DOCTYPE html><html><body>404: not found</body></html>\n",
    "zip": b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(64),
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(16),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
    "numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, }\n",
    "parquet": b"PAR1" + bytes(20) + b"PAR1",
    "a JSON list": b"[1, 2, 3]\n",
    "a JSON number": b"7\n",
    "a JSON string": b'"text"\n',
    "an empty JSON object": b"{}\n",
    "null": b"null\n",
    "YAML": b"hidden_size: 16\nlayers:\n  - 1\n",
    "one NUL": b"\0",
    "nothing": b"",
    "one line end": b"\n",
}


def damage_bytes(rng: random.Random, data: bytes, reach: int | None = None) -> tuple:
    """Returns bytes that are cut, flipped, inserted, removed or repeated, and how.

    Args:
      reach: the first bytes, in which it happens; None: anywhere.
    """
    top = max(min(len(data), reach or len(data)), 1)
    at, kind = rng.randrange(top), rng.randrange(7)
    if kind == 0:
        return data[:at], f"cut at {at}"
    if kind == 1:
        return bytes([*data[:at], data[at] ^ 1 << rng.randrange(8)]) + data[
            at + 1 :
        ] if data else b"\1", f"a bit of byte {at} flipped"
    if kind == 2:
        more = rng.randbytes(rng.choice((1, 2, 8, 100)))
        return data[:at] + more + data[at:], f"{len(more)} bytes inserted at {at}"
    if kind == 3:
        gone = rng.choice((1, 2, 8, 100))
        return data[:at] + data[at + gone :], f"{gone} bytes removed at {at}"
    if kind == 4:
        size = rng.choice((1, 4, 8))
        value = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)) % 2 ** (8 * size)
        new = value.to_bytes(size, "little")
        return data[:at] + new + data[at + size :], f"{value} written at {at}"
    if kind == 5:
        return data + data[: rng.choice((1, 100, len(data)))], "its start repeated"
    return data + rng.randbytes(rng.choice((1, 8, 100))), "bytes added at the end"


def damage_json(rng: random.Random, value: Any) -> tuple[Any, str, str]:
    """Changes one value in place, and returns it, what was done, and at which key."""
    holder, path = value, []
    while True:
        keys = [*holder] if isinstance(holder, dict) else [*range(len(holder))]
        if not keys:
            return rng.choice(JUNK), "all of it replaced", ""
        key = rng.choice(keys)
        path.append(str(key))
        inner = holder[key]
        if not (isinstance(inner, dict | list) and inner) or rng.random() < 0.3:
            break
        holder = inner
    name, kind, given = ".".join(path), rng.randrange(10), holder[key]
    if kind == 0:
        del holder[key]
        return value, f"{name} removed", name
    if kind == 1 and isinstance(holder, dict):
        new = rng.choice((key.upper(), key[:-1], f"{key}_", f" {key}", "é"))
        holder[new] = holder.pop(key)
        return value, f"{name} renamed to {new!r}", name
    if kind == 2 and isinstance(given, int | float) and not isinstance(given, bool):
        changes = (str(given), given + 1, -given, given * 2, float(given), given / 2)
        holder[key] = rng.choice(changes)
    elif kind == 3 and isinstance(given, list):
        changes = (given * 2, given[1:], given[::-1], dict(enumerate(given)))
        holder[key] = rng.choice(changes)
    elif kind == 4 and isinstance(given, str):
        changes = (given[:-1], given.upper(), f"{given} ", [given], given * 3)
        holder[key] = rng.choice(changes)
    elif kind == 5:
        holder[key] = rng.choice(([given], {"value": given}, {name: given}))
    else:
        holder[key] = rng.choice(JUNK)
    shown = repr(holder[key])
    return value, f"{name}={shown if len(shown) < 60 else shown[:57] + '...'}", name


def write_json(value: Any) -> bytes:
    """Writes a damaged value as JSON."""
    text = json.dumps(value)
    for mark, spelt in SPELT.items():
        text = text.replace(json.dumps(mark), spelt)
    return text.encode()


def damage_text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Returns a text file as an editor or another program may have saved it."""
    text = data.decode()
    changes: dict[str, Callable[[], bytes]] = {
        "a byte order mark": lambda: text.encode("utf-8-sig"),
        "UTF-16": lambda: text.encode("utf-16"),
        "UTF-16 without a mark": lambda: text.encode("utf-16-le"),
        "UTF-32": lambda: text.encode("utf-32"),
        "Latin-1": lambda: text.replace("e", "é").encode("latin-1", "replace"),
        "single quotes": lambda: text.replace('"', "'").encode(),
        "a comma at the end": lambda: text.rstrip().removesuffix("}").encode() + b",}",
        "a comment": lambda: b"// by hand\n" + data,
        "blanks": lambda: b" \r\n" + text.replace("\n", "\r\n").encode() + b" \n",
        "all of it twice": lambda: data + data,
        "no line ends": lambda: text.replace("\n", "").encode(),
        "NUL bytes": lambda: data + b"\0" * 9,
    }
    name = rng.choice([*changes])
    return changes[name](), f"saved with {name}"


def damage_json_file(rng: random.Random, path: Path) -> tuple[str, str]:
    """Damages a file of JSON; returns what was done, and the key it was done to."""
    data, kind = path.read_bytes(), rng.random()
    key = ""
    if kind < 0.7:
        value, what, key = damage_json(rng, json.loads(data))
        data = write_json(value)
    elif kind < 0.78 and isinstance(value := json.loads(data), dict) and value:
        key = rng.choice([*value])
        pair = f"{json.dumps(key)}: ".encode() + write_json(rng.choice(JUNK))
        body = data.strip()[1:-1].strip()
        pieces = [pair, body] if rng.random() < 0.5 else [body, pair]
        data, what = b"{" + b", ".join(pieces) + b"}", f"{key} there twice"
    elif kind < 0.9:
        data, what = damage_bytes(rng, data)
    else:
        data, what = damage_text(rng, data)
    path.write_bytes(data)
    return f"{path.name}: {what}", key


def damage_files(rng: random.Random, folder: Path) -> str:
    """Removes, replaces or mixes up a file of a folder; returns what was done."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    name, kind = path.relative_to(folder), rng.randrange(9)
    if kind == 0:
        path.unlink()
        return f"{name} removed"
    if kind == 1:
        path.write_bytes(POINTER)
        return f"{name} a pointer of git-lfs"
    if kind == 2:
        path.unlink()
        path.mkdir()
        return f"{name} a folder"
    if kind == 3:
        path.unlink()
        path.symlink_to(rng.choice(("nowhere", path.name)))
        return f"{name} a broken link"
    if kind == 4:
        other = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        path.write_bytes(other.read_bytes())
        return f"{name} a copy of {other.relative_to(folder)}"
    if kind == 5:
        copy = path.with_name(f"{path.stem} (1){path.suffix}")
        shutil.copy(path, copy)
        return f"{name} there twice"
    if kind == 6:
        path.rename(path.with_name(path.name.upper()))
        return f"{name} renamed to {path.name.upper()}"
    other = rng.choice([*OTHERS])
    path.write_bytes(OTHERS[other])
    return f"{name} replaced by {other}"
