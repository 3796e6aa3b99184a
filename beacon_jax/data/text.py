"""Text as a list of documents, split into train and held-out.

A URI is one of `data.sources`, most often `"stdlib"` (real text that exists on every
machine without a download), a folder or a file. Everything is read into memory.

Whether a document is held out depends on a hash of its relative name and on nothing
else: the same file lands on the same side on every machine, for the base model, for the
beacons and for the evaluation, however many other files there are.
"""

import hashlib
import itertools
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from beacon_jax.data.readers import Bad, Part, read
from beacon_jax.data.sources import Dropped, open_parts, read_part

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout", "all")

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

    Rows and files that hold no text or are damaged are skipped, counted and logged.

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
        log.warning("%s: skipped %d: %s", uri, count, reason)
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
    """All documents of a source, before any split.

    Files of text are one document each, by their name (a lone one is cut into blocks);
    others one per row with a text, by file and row, so that rows split independently.
    """
    parts = open_parts([uri])
    files = [list(file) for _, file in itertools.groupby(parts, lambda part: part.name)]
    alone = Path(uri).expanduser().is_file()
    skipped: Counter[str] = Counter()
    documents: list[tuple[str, str]] = []
    for file in files:
        if file[0].kind != "text":
            documents += _rows(file, skipped)
        elif (text := _whole(file, skipped)) is not None:
            name = file[0].name
            documents += _blocks(name, text) if alone else [(name, text)]
    if not documents:
        raise ValueError(
            f"uri={uri!r}: every one of its {len(files)} files was skipped "
            f"({dict(skipped)}); name a source with UTF-8 text"
        )
    return Corpus(tuple(sorted(documents)), tuple(sorted(skipped.items())))


def _whole(file: list[Part], skipped: Counter[str]) -> str | None:
    """A file of text, unless any of it is unusable."""
    pieces: list[str] = []
    for _, piece in itertools.chain.from_iterable(map(read, file)):
        if not isinstance(piece, str):
            assert isinstance(piece, Bad)
            skipped[f"{piece.reason} (file)"] += 1
            return None
        pieces.append(piece)
    text = "".join(pieces)
    if not text.strip():
        skipped["empty (file)"] += 1
        return None
    return text


def _rows(file: list[Part], skipped: Counter[str]) -> list[tuple[str, str]]:
    """Documents of a file of rows; a name has the row's number from 0."""
    rows: list[tuple[str, str]] = []
    for row in itertools.chain.from_iterable(map(read_part, file)):
        if isinstance(row, Dropped):
            kind = "file" if file[0].kind == "unusable" else "row"
            skipped[f"{row.reason} ({kind})"] += 1
        elif row.text is None:
            skipped["no text (row)"] += 1
        else:
            name, _, number = row.where.rpartition(":")
            rows.append((f"{name}:{int(number) - 1:09d}", row.text))
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
