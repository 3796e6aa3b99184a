"""Sources of training data: a URI becomes rows of text, turns or tokens.

| URI                            | rows                                                |
|--------------------------------|-----------------------------------------------------|
| books.jsonl, *.json, x.ndjson  | JSON lines, objects over several lines, or one JSON |
|                                | array; all of them streamed                         |
| x.csv, x.tsv                   | rows; between commas, semicolons, tabs or bars      |
| x.parquet, x.arrow             | their rows                                          |
| x.array_record                 | records that are JSON                               |
| x.txt .md .rst .py             | the text; cut at line ends if over 64 KiB           |
| a folder or a glob             | all of these in it, recursively, in sorted order    |
| a folder of `datasets`         | what `save_to_disk` wrote (also a DatasetDict)      |
| stdlib                         | the text of the standard library of this Python     |
| tfds:name/config:split         | a prepared TFDS data set (ArrayRecord)              |
| long-llm:redpajama/train.json  | a file of the release's layout, below `data.root`   |

JSON, CSV and text may be compressed by gzip, bzip2, xz or zstd, and be in UTF-8, or in
UTF-16 or UTF-32; their first bytes say so, whatever their names are (`packed`).

`URI[5000]` takes a seeded subset of 5000 rows, bad ones counted. What fields a row may
have is in `fields`. Nothing is left out silently: a row that cannot be used is a
`Dropped` in the place where it was. Memory is constant: one row, batch or block.
"""

import fnmatch
import glob
import logging
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from beacon_jax.data.fields import Dropped, Record, parse, record
from beacon_jax.data.heldout import is_heldout, row_name
from beacon_jax.data.packed import look, refusal
from beacon_jax.data.readers import (
    ENDINGS,
    PACKED_ENDINGS,
    PART_BYTES,
    ROW_LIMIT,
    TEXT_ENDINGS,
    WHOLE_TEXTS,
    Bad,
    Piece,
    Subset,
    chosen,
    count,
    cut,
    ending,
    explained,
    read,
    tfds_size,
    unusable,
)
from beacon_jax.resources import asset

log = logging.getLogger(__name__)

SCHEMES = ("stdlib", "tfds", "long-llm")
# Not text in any useful sense (tables), not part of the library (site-packages), or
# absent from some installations (tests, idlelib), which would make the split depend on
# packaging.
STDLIB_SKIP = frozenset(
    [
        "test",
        "tests",
        "idlelib",
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "ensurepip",
        "turtledemo",
        "__pycache__",
    ]
)
SKIPPED_FOLDERS = frozenset({"__pycache__"})
HF_FILES = frozenset({"dataset_info.json", "state.json", "dataset_dict.json"})


class Uri(NamedTuple):
    """A parsed URI.

    Attributes:
      scheme: "" (a path) or one of SCHEMES.
      count: rows of the subset; None: all.
    """

    text: str
    scheme: str
    path: str
    count: int | None


def parse_uri(uri: str) -> Uri:
    """Returns the pieces of `[scheme:]path[COUNT]`.

    A path that looks like a scheme can be written as ./path. What exists as it is
    written is that file or folder, as "n[5]" may be.

    Raises:
      ValueError: an unknown scheme, no path, or a COUNT of 0.
    """
    match = None if _exists(uri) else re.search(r"\[(\d+)\]$", uri)
    rest = uri[: match.start()] if match else uri
    rows = int(match.group(1)) if match else None
    if rows == 0:
        raise ValueError(f"uri={uri!r}: [0] takes no rows; name at least 1 or leave it")
    if rest == "stdlib":
        return Uri(uri, "stdlib", "", rows)
    scheme, colon, path = rest.partition(":")
    if not colon or not re.fullmatch(r"[a-z][a-z0-9+-]+", scheme):
        scheme, path = "", rest
    elif scheme not in SCHEMES:
        raise ValueError(
            f"uri={uri!r}: scheme {scheme!r} is unknown; use a path (./{rest} if it is "
            "one), 'stdlib', 'tfds:name/config:split' or 'long-llm:file'"
        )
    if not path or scheme == "stdlib":
        raise ValueError(
            f"uri={uri!r} names no file; write [scheme:]path, as in 'books/*.jsonl', "
            "or 'stdlib' alone"
        )
    return Uri(uri, scheme, path, rows)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path))
    except ValueError:  # a NUL character
        return False


def open_parts(
    uris: Sequence[str],
    root: str = "",
    seed: int = 42,
    *,
    row_limit: int = ROW_LIMIT,
    part_bytes: int = PART_BYTES,
    heldout: float = 0.0,
) -> list[Piece]:
    """Returns all parts of all sources; reading them in order gives the rows in order.

    A file of lines over `part_bytes` is read once (GB/s) to find the line that each
    part begins with. A source with a COUNT is read once to count its rows. Files of
    text, columns and records are cut without reading. Compressed files, those in
    UTF-16, CSV, JSON arrays and objects over several lines are one part.

    Args:
      root: folder of `long-llm:`, and of `tfds:` data sets that lie in it.
      seed: seed of the subsets; 42 gives those of the release.
      row_limit: bytes; longer lines are dropped without being held in memory.
      heldout: share of the documents that `held_out` will name; a lone file of text is
        then one part, which leaves its held-out blocks out by itself.

    Raises:
      ValueError: a malformed URI, `long-llm:` without a root, an unknown split.
      FileNotFoundError: nothing there, or nothing with a supported ending.
    """
    parts: list[Piece] = []
    for index, text in enumerate(uris):
        uri = parse_uri(text)
        files = _files(uri, root, index)
        if heldout and _lone_text(uri):
            files = [files[0]._replace(kind="kept", detail=(repr(heldout),))]
        pieces = [
            piece
            for file in files
            for piece in cut(file._replace(limit=row_limit), part_bytes)
        ]
        parts += pieces if uri.count is None else _subset(uri, pieces, seed)
    return parts


def held_out(part: Piece, row: Record | Dropped, heldout: float) -> bool:
    """Tells whether a row belongs to the held-out documents (`data.heldout`).

    A file of text is one document; other files have one document per row.
    """
    if not heldout or part.kind == "kept" or isinstance(row, Dropped):
        return False
    name = part.name if part.kind in WHOLE_TEXTS else row_name(row.where)
    return is_heldout(name, heldout)


def source_files(uris: Sequence[str], root: str = "") -> list[list[Piece]]:
    """Returns the files of each source, without reading them.

    Raises the same errors as `open_parts`.
    """
    return [_files(parse_uri(text), root, i) for i, text in enumerate(uris)]


def reading(
    folder: Path, names: Sequence[str], uris: Sequence[str], root: str = ""
) -> str:
    """Returns the source that would read files of these names in a folder; "": none.

    What is written there would be part of the source when it is read again.

    Raises:
      ValueError: a malformed URI, `long-llm:` without a root.
    """
    here = Path(os.path.realpath(folder))
    for text in uris:
        uri = parse_uri(text)
        if uri.scheme in ("stdlib", "tfds"):
            continue
        path = _place(uri, root)
        base, rest = path, ()
        if path.is_file():
            base, rest = path.parent, (glob.escape(path.name),)
        elif not path.exists():
            base = next(x for x in path.parents if x.exists())
            rest = path.relative_to(base).parts
        real = Path(os.path.realpath(base))
        if not here.is_relative_to(real):
            continue
        inner = here.relative_to(real).parts
        if any(_matches((*inner, name), rest) for name in names):
            return text
    return ""


def _walked(names: Sequence[str]) -> bool:
    """Tells whether `_walk` goes into these folders, one below the other."""
    return not any(x.startswith(".") or x in SKIPPED_FOLDERS for x in names)


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Tells whether a pattern matches a path, or a folder that it is in."""
    if not patterns:
        return _walked(names)
    if not names:
        return False
    if patterns[0] == "**":
        below = _walked(names[:1]) and _matches(names[1:], patterns)
        return below or _matches(names, patterns[1:])
    hidden = names[0].startswith(".") and not patterns[0].startswith(".")
    return (
        not hidden
        and fnmatch.fnmatchcase(names[0], patterns[0])
        and _matches(names[1:], patterns[1:])
    )


def source_bytes(uris: Sequence[str], root: str = "") -> list[int]:
    """Returns the bytes of the files of each source, without reading them.

    They are about the sum of the sizes of the source's parts. Raises the same errors as
    `open_parts`.
    """
    return [sum(file.size for file in files) for files in source_files(uris, root)]


def read_part(part: Piece) -> Iterator[Record | Dropped]:
    """Yields the rows of a part, in order.

    Bad data raises nothing. A file that is damaged or cut off gives what is before the
    damage and then one Dropped that says so.
    """
    numbers = chosen(part)
    at, row = 0, 0  # the next of `numbers`; rows so far
    for number, value in read(part):
        whole = isinstance(value, Bad) and value.whole
        if numbers is not None and not whole:
            if at == len(numbers):
                return
            row += 1
            if numbers[at] != row - 1:
                continue
            at += 1
        where = f"{part.name}:{number}"
        if isinstance(value, Bad):
            made = Dropped(
                part.name if part.kind == "unusable" else where, value.reason
            )
        elif isinstance(value, bytes):
            made = parse(where, value)
        else:
            made = record(where, {"text": value} if isinstance(value, str) else value)
        if isinstance(made, Dropped):
            made = Dropped(made.where, explained(part, made.reason))
        yield made


def _lone_text(uri: Uri) -> bool:
    """Tells whether a URI names one file of text, not a folder or a glob of them."""
    path = Path(uri.text).expanduser()
    return ending(uri.text) in TEXT_ENDINGS and path.is_file()


def _subset(uri: Uri, parts: list[Piece], seed: int) -> list[Piece]:
    """Returns the same parts, each with the subset and the number of rows before it."""
    assert uri.count is not None
    befores, rows = [], 0
    for part in parts:
        befores.append(rows)
        rows += count(part)
    if uri.count > rows:
        log.warning("%s has only %d rows; all are taken", uri.text, rows)
    subset = Subset(rows, min(uri.count, rows), seed)
    return [
        part._replace(before=before, subset=subset)
        for part, before in zip(parts, befores, strict=True)
    ]


def _files(uri: Uri, root: str, source: int) -> list[Piece]:
    """Returns one part per file, in order; its kind is "" until it is cut."""
    if uri.scheme == "tfds":
        size, detail = tfds_size(uri.path, root)
        return [Piece(source, uri.path, size, "tfds", "", detail=detail)]
    files = _named_files(uri, root)
    parts = [_file(source, name, path) for name, path in files]
    if not any(not part.kind for part in parts):
        some = ", ".join(f"{part.name}: {part.detail[0]}" for part in parts[:3])
        raise FileNotFoundError(
            f"uri={uri.text!r} holds no text among its {len(parts)} files"
            + (f" ({some}{', ...' if len(parts) > 3 else ''})" if some else "")
            + f"; expected files ending in {' '.join(ENDINGS)}, text also in "
            + " ".join(PACKED_ENDINGS)
        )
    return parts


def _file(source: int, name: str, path: Path) -> Piece:
    """Returns the part of a file, which is only reported if it cannot be read."""
    part = Piece(source, name, 0, "", str(path))
    if not path.exists():
        return unusable(part, "broken link")
    if path.is_dir():
        return unusable(part, "linked folder, not followed")
    if not path.is_file():
        return unusable(part, "no file but a pipe or device: write it to a file")
    if not os.access(path, os.R_OK):
        return unusable(part, "not readable: it needs a permission (chmod +r)")
    if not ending(name):
        return unusable(part, refusal(look(str(path))) or "unknown ending")
    return part._replace(size=path.stat().st_size)


def _named_files(uri: Uri, root: str) -> list[tuple[str, Path]]:
    """Returns (name relative to the source, path) of every file, in order."""
    if uri.scheme == "stdlib":
        files = _walk(Path(sysconfig.get_paths()["stdlib"]), STDLIB_SKIP)
        return [(name, path) for name, path in files if path.suffix == ".py"]
    path = _place(uri, root)
    if path.is_dir():
        return list(_walk(path, SKIPPED_FOLDERS))
    if path.exists():
        return [(uri.path if uri.scheme else path.name, path)]
    if glob.has_magic(str(path)):
        return _glob(uri, path)
    place = f" in data.root={root!r}" if uri.scheme else ""
    for between in (r"\s*,\s*", r"[,\s]+"):
        several = re.split(between, uri.path)
        if len(several) < 2 or not all(map(_exists, several)):
            continue
        apart = " ".join(f"--config.data.sources={quote(part)}" for part in several)
        raise FileNotFoundError(
            f"uri={uri.text!r} does not exist; name its {len(several)} sources apart, "
            f"as in {apart}"
        )
    raise FileNotFoundError(
        f"uri={uri.text!r} does not exist{place}; name a file, folder or glob of "
        "text, 'stdlib', 'tfds:name/config:split' or 'long-llm:file'"
    )


def _place(uri: Uri, root: str) -> Path:
    """Returns the file, folder or pattern of a URI that names one."""
    if uri.scheme == "long-llm":
        if not root:
            raise ValueError(
                f"uri={uri.text!r} is relative to data.root='', which is not set; set "
                "data.root to the folder that long-llm.tar.gz was unpacked to"
            )
        return Path(root).expanduser() / uri.path
    return Path(asset(uri.path)).expanduser()


def _glob(uri: Uri, pattern: Path) -> list[tuple[str, Path]]:
    """Returns the files that a pattern matches; of a folder it matches, all files.

    Folders in front that exist as they are written are these, as in "n[5]/*.txt".
    Names are relative to them.
    """
    base = next(folder for folder in pattern.parents if folder.exists())
    rest = str(pattern.relative_to(base))
    found: dict[Path, str] = {}
    matches = glob.glob(os.path.join(glob.escape(str(base)), rest), recursive=True)
    for match in sorted(matches):
        path = Path(match)
        name = path.relative_to(base).as_posix()
        if path.is_dir():
            for inner, file in _walk(path, SKIPPED_FOLDERS):
                found.setdefault(file, f"{name}/{inner}" if name != "." else inner)
        elif not _describes(path):
            found.setdefault(path, name)
    if not found:
        raise FileNotFoundError(
            f"uri={uri.text!r} matches no file; the pattern is relative to {Path.cwd()}"
            if not pattern.is_absolute()
            else f"uri={uri.text!r} matches no file; check the pattern"
        )
    return [(name, path) for path, name in found.items()]


def _walk(root: Path, skip: frozenset[str]) -> Iterator[tuple[str, Path]]:
    """Yields the files below a folder; of a `datasets` folder only those with rows.

    Hidden ones are left out: caches, environments, copies of an editor.
    """
    shown = lambda names: [name for name in names if not name.startswith(".")]
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in shown(folders) if name not in skip)
        linked = [name for name in folders if (here / name).is_symlink()]
        # os.walk does not enter linked folders.
        for name in sorted([*_with_rows(shown(files)), *linked]):
            path = here / name
            if name != "dataset_dict.json":
                yield path.relative_to(root).as_posix(), path


def _with_rows(files: Sequence[str]) -> Sequence[str]:
    """Returns the files of a folder that hold rows.

    In a folder of `datasets` other files describe the rows, or are caches that `map`
    and `filter` left (cache-*).
    """
    arrow = [name for name in files if name.endswith(".arrow")]
    if not arrow or not HF_FILES & set(files):
        return files
    return [name for name in arrow if not name.startswith("cache-")]


def _describes(path: Path) -> bool:
    """Tells whether a file of a `datasets` folder only describes or caches its rows."""
    if path.name not in HF_FILES and not path.name.startswith("cache-"):
        return False
    return path.name not in _with_rows(os.listdir(path.parent))
