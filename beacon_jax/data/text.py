"""Text sources: a URI becomes a list of documents, split into train and held-out.

A URI is `"stdlib"` (the sources and docstrings of the Python standard library that runs
this process, so that real text exists on every machine without a download) or the path
of a folder or file with .txt, .md, .rst, .py or .jsonl (`{"text": ...}`) in it.

Whether a document is held out depends on a hash of its relative name and on nothing
else: the same file lands on the same side on every machine, for the base model, for the
beacons and for the evaluation, however many other files there are.
"""

import hashlib
import json
import logging
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
SPLITS = ("train", "heldout", "all")

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
# A lone file is cut into documents of this many characters (at line ends), because a
# split by file name would leave nothing on one side.
FILE_BLOCK = 16_384


@dataclass(frozen=True)
class Corpus:
    """Documents as (name, text), sorted by name, and what was left out, by reason."""

    documents: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, int], ...]


def load_documents(
    uri: str, split: str = "train", heldout_fraction: float = 0.1
) -> list[str]:
    """Texts of one split of a source, in a fixed order.

    Files that are not valid UTF-8 (or bad jsonl rows) are skipped, counted and logged.

    Raises:
      ValueError: unknown split, fraction outside (0, 1), or a split with no document.
      FileNotFoundError: the path does not exist, or holds no text file.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not 0.0 < heldout_fraction < 1.0:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie in (0, 1)")
    corpus = read_corpus(uri)
    for reason, count in corpus.skipped:
        log.warning("%s: skipped %d %s", uri, count, reason)
    chosen = [
        text
        for name, text in corpus.documents
        if split == "all" or is_heldout(name, heldout_fraction) == (split == "heldout")
    ]
    if not chosen:
        raise ValueError(
            f"uri={uri!r}: none of its {len(corpus.documents)} documents falls into "
            f"split={split!r} at heldout_fraction={heldout_fraction}; add files or "
            "change the fraction"
        )
    return chosen


def is_heldout(name: str, heldout_fraction: float) -> bool:
    """Whether the document of this relative name belongs to the held-out split."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64 < heldout_fraction


def read_corpus(uri: str) -> Corpus:
    """All documents of a source, before any split."""
    if uri == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = STDLIB_SKIP
    else:
        root, skip = Path(uri).expanduser(), frozenset({"__pycache__"})
    if not root.exists():
        raise FileNotFoundError(
            f"uri={uri!r} does not exist; name a folder or file with text, or 'stdlib'"
        )
    skipped: Counter[str] = Counter()
    documents: list[tuple[str, str]] = []
    files = [root] if root.is_file() else list(_walk(root, skip))
    if uri == "stdlib":
        files = [f for f in files if f.suffix == ".py"]
    if not any(f.suffix in SUFFIXES for f in files):
        raise FileNotFoundError(
            f"uri={uri!r} holds no text among its {len(files)} files; expected files "
            f"ending in {' '.join(SUFFIXES)}"
        )
    for file in files:
        if file.suffix not in SUFFIXES:
            skipped[f"files with another ending than {' '.join(SUFFIXES)}"] += 1
            continue
        name = file.name if file == root else file.relative_to(root).as_posix()
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            skipped["files that are not valid UTF-8"] += 1
            continue
        if file.suffix == ".jsonl":
            documents += _rows(name, text, skipped)
        elif file == root:
            documents += _blocks(name, text)
        elif text.strip():
            documents.append((name, text))
        else:
            skipped["empty files"] += 1
    if not documents:
        raise ValueError(
            f"uri={uri!r}: every one of its {len(files)} files was skipped "
            f"({dict(skipped)}); name a source with UTF-8 text"
        )
    return Corpus(tuple(sorted(documents)), tuple(sorted(skipped.items())))


def _walk(root: Path, skip: frozenset[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip)
        for file in sorted(files):
            yield Path(folder) / file


def _rows(name: str, text: str, skipped: Counter[str]) -> list[tuple[str, str]]:
    """Documents of a jsonl file, named by row so that rows split independently."""
    rows = []
    for number, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        value = row.get("text") if isinstance(row, dict) else None
        if isinstance(value, str) and value.strip():
            rows.append((f"{name}:{number:09d}", value))
        else:
            skipped['jsonl rows without {"text": "..."}'] += 1
    return rows


def _blocks(name: str, text: str) -> list[tuple[str, str]]:
    blocks, block, size = [], [], 0
    for line in text.splitlines(keepends=True):
        block.append(line)
        size += len(line)
        if size >= FILE_BLOCK:
            blocks.append("".join(block))
            block, size = [], 0
    blocks.append("".join(block))
    return [(f"{name}:{i:09d}", b) for i, b in enumerate(blocks) if b.strip()]
