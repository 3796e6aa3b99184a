"""Reads text as a list of documents, split into train and held-out.

A URI is one of `data.sources`, most often `"stdlib"` (real text that exists on every
machine without a download), a folder or a file. Everything is read into memory.
`data.heldout` decides which documents are held out.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beacon_jax.data.heldout import block_name, blocks, is_heldout, row_name
from beacon_jax.data.readers import Bad, Part, read
from beacon_jax.data.sources import Dropped, open_parts, read_part

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout", "all")
NO_TEXT = "no text"


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, and what was left out.

    Attributes:
      documents: (name, text) pairs, sorted by name.
      skipped: (reason, count) pairs of what was left out.
    """

    documents: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, int], ...]


def load_documents(
    uri: str,
    split: str = "train",
    heldout_fraction: float = 0.1,
    *,
    root: str = "",
    turns: bool = False,
) -> list[str]:
    """Returns the texts of one split of a source, in a fixed order.

    Rows and files that hold no text or are damaged are skipped, counted and logged.

    Args:
      root: what `long-llm:` URIs are relative to.
      turns: whether conversations are documents too, without marks of their roles.

    Raises:
      ValueError: unknown split, fraction outside (0, 1), or a split with no document.
      FileNotFoundError: the path does not exist, or holds no text file.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not 0.0 < heldout_fraction < 1.0:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie in (0, 1)")
    corpus = read_corpus(uri, root=root, turns=turns)
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
            f"split={split!r} at heldout_fraction={heldout_fraction}; add files, or "
            "change the fraction (of a run: data.heldout), or name a single file "
            "itself: it is then cut into documents"
        )
    return chosen


def training_documents(
    sources: Sequence[str], heldout: float, *, root: str = "", turns: bool = False
) -> list[str]:
    """Returns the texts of all sources, one after the other, without held-out ones.

    Raises the same errors as `load_documents`.
    """
    split = ("train", heldout) if heldout else ("all", 0.5)
    return [
        text
        for uri in sources
        for text in load_documents(uri, *split, root=root, turns=turns)
    ]


def run_documents(config: Any) -> list[str]:
    """Returns the texts that a run cuts rows from, or trains its tokenizer on.

    For the tokenizer, conversations are texts, too.
    """
    data = config.data
    return training_documents(
        data.sources, data.heldout, root=data.root, turns=not data.stages
    )


def read_corpus(uri: str, *, root: str = "", turns: bool = False) -> Corpus:
    """Returns all documents of a source, before any split.

    A file of text is one document, by its name (a lone one is cut into blocks). Other
    files have one document per row with a text, by file and row, so that rows split
    independently.
    """
    parts = open_parts([uri], root)
    files = [list(file) for _, file in itertools.groupby(parts, lambda part: part.name)]
    alone = Path(uri).expanduser().is_file()
    skipped: Counter[str] = Counter()
    documents: list[tuple[str, str]] = []
    for file in files:
        if file[0].kind != "text":
            documents += _rows(file, skipped, turns)
        elif (text := _whole(file, skipped)) is not None:
            name = file[0].name
            documents += _blocks(name, text) if alone else [(name, text)]
    if not documents:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.items())
        raise ValueError(
            f"uri={uri!r}: every one of its {len(files)} files was skipped "
            f"({reasons}); name a source with UTF-8 text"
            + (
                ", or, for conversations, train on whole rows: leave data.stages empty"
                if any(reason.startswith(NO_TEXT) for reason in skipped)
                else ""
            )
        )
    return Corpus(tuple(sorted(documents)), tuple(sorted(skipped.items())))


def _whole(file: list[Part], skipped: Counter[str]) -> str | None:
    """Returns a file of text, or None if it is empty or any of it is unusable."""
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


def _rows(
    file: list[Part], skipped: Counter[str], turns: bool
) -> list[tuple[str, str]]:
    """Returns the documents of a file of rows; a name has the row's number from 0."""
    rows: list[tuple[str, str]] = []
    for row in itertools.chain.from_iterable(map(read_part, file)):
        if isinstance(row, Dropped):
            kind = "file" if file[0].kind == "unusable" else "row"
            skipped[f"{row.reason} ({kind})"] += 1
        elif row.text is not None:
            rows.append((row_name(row.where), row.text))
        elif turns and row.turns is not None:
            text = "\n".join(content for _, content in row.turns)
            rows.append((row_name(row.where), text))
        else:
            skipped[f"{NO_TEXT} (row)"] += 1
    return rows


def _blocks(name: str, text: str) -> list[tuple[str, str]]:
    cut = blocks(text.splitlines(keepends=True))
    return [(block_name(name, i), b) for i, b in enumerate(cut) if b.strip()]
