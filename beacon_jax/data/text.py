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

from beacon_jax.data.fields import not_read
from beacon_jax.data.heldout import block_name, blocks, is_heldout, row_name
from beacon_jax.data.packed import Bad
from beacon_jax.data.readers import WHOLE_TEXTS, Piece, explained, read
from beacon_jax.data.sources import Dropped, open_parts, read_part

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout", "all")
NO_TEXT = "no text"
PLACES = 5  # of one reason that a message lists


@dataclass(frozen=True)
class Corpus:
    """The documents of a source, and what was left out.

    Attributes:
      documents: (name, text) pairs, sorted by name.
      skipped: rows and files that were left out, in their order.
      unread: rows with a field that is not read, by its name.
    """

    documents: tuple[tuple[str, str], ...]
    skipped: tuple[Dropped, ...]
    unread: Counter[str]


def load_documents(
    uri: str,
    split: str = "train",
    heldout_fraction: float = 0.1,
    *,
    root: str = "",
    turns: bool = False,
    quiet: bool = False,
) -> list[str]:
    """Returns the texts of one split of a source, in a fixed order.

    Rows and files that hold no text or are damaged are skipped and logged.

    Args:
      root: what `long-llm:` URIs are relative to.
      turns: whether conversations are documents too, without marks of their roles.
      quiet: what is skipped is logged elsewhere, since a run says it once.

    Raises:
      ValueError: unknown split, fraction outside (0, 1), or a split with no document.
      FileNotFoundError: the path does not exist, or holds no text file.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if not 0.0 < heldout_fraction < 1.0:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie in (0, 1)")
    corpus = read_corpus(uri, root=root, turns=turns)
    if corpus.skipped and not quiet and uri != "stdlib":  # which has empty files
        log.warning(
            "%s: left out %d: %s", uri, len(corpus.skipped), _listed(corpus.skipped)
        )
    if corpus.unread and not quiet:
        log.warning("%s: not read: %s", uri, not_read(corpus.unread))
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


def run_documents(config: Any, *, quiet: bool = False) -> list[str]:
    """Returns the texts that a run cuts rows from, or trains its tokenizer on.

    They are those of all data.sources, one after the other, without held-out ones. For
    the tokenizer, conversations are texts, too. Raises the same errors as
    `load_documents`.
    """
    data = config.data
    split = ("train", data.heldout) if data.heldout else ("all", 0.5)
    more = {"root": data.root, "turns": not data.stages, "quiet": quiet}
    return [
        text for uri in data.sources for text in load_documents(uri, *split, **more)
    ]


def read_corpus(uri: str, *, root: str = "", turns: bool = False) -> Corpus:
    """Returns all documents of a source, before any split.

    A file of text is one document, by its name (a lone one is cut into blocks). Other
    files have one document per row with a text, by file and row, so that rows split
    independently.
    """
    parts = open_parts([uri], root)
    files = [list(file) for _, file in itertools.groupby(parts, lambda part: part.name)]
    alone = Path(uri).expanduser().is_file()
    skipped: list[Dropped] = []
    unread = Counter[str]()
    documents: list[tuple[str, str]] = []
    for file in files:
        if file[0].kind not in WHOLE_TEXTS:
            documents += _rows(file, skipped, unread, turns)
        elif (text := _whole(file, skipped)) is not None:
            name = file[0].name
            documents += _blocks(name, text) if alone else [(name, text)]
    if not documents:
        raise ValueError(
            f"uri={uri!r}: every one of its {len(files)} files was skipped "
            f"({_listed(skipped)}); name a source with UTF-8 text"
            + (
                ", or, for conversations, train on whole rows: leave data.stages empty"
                if any(row.reason == NO_TEXT for row in skipped)
                else ""
            )
        )
    return Corpus(tuple(sorted(documents)), tuple(skipped), unread)


def _listed(skipped: Sequence[Dropped]) -> str:
    """Lists the reasons, each with the first places that it was found at."""
    places: dict[str, list[str]] = {}
    for row in skipped:
        places.setdefault(row.reason, []).append(row.where)
    made = []
    for reason, found in places.items():
        more = len(found) - PLACES
        rest = f" and {more:,} more" if more > 0 else ""
        made.append(f"{reason} ({', '.join(found[:PLACES])}{rest})")
    return "; ".join(made)


def _whole(file: list[Piece], skipped: list[Dropped]) -> str | None:
    """Returns a file of text, or None if it is empty or any of it is unusable."""
    pieces: list[str] = []
    for _, piece in itertools.chain.from_iterable(map(read, file)):
        if not isinstance(piece, str):
            assert isinstance(piece, Bad)
            skipped.append(Dropped(file[0].name, explained(file[0], piece.reason)))
            return None
        pieces.append(piece)
    text = "".join(pieces)
    if not text.strip():
        skipped.append(Dropped(file[0].name, "empty"))
        return None
    return text


def _rows(
    file: list[Piece], skipped: list[Dropped], unread: Counter[str], turns: bool
) -> list[tuple[str, str]]:
    """Returns the documents of a file of rows; a name has the row's number from 0."""
    rows: list[tuple[str, str]] = []
    for row in itertools.chain.from_iterable(map(read_part, file)):
        if isinstance(row, Dropped):
            skipped.append(row)
            continue
        unread.update(row.unread)
        if row.text is not None:
            rows.append((row_name(row.where), row.text))
        elif turns and row.turns is not None:
            text = "\n".join(content for _, content in row.turns)
            rows.append((row_name(row.where), text))
        else:
            skipped.append(Dropped(row.where, NO_TEXT))
    return rows


def _blocks(name: str, text: str) -> list[tuple[str, str]]:
    cut = blocks(text.splitlines(keepends=True))
    return [(block_name(name, i), b) for i, b in enumerate(cut) if b.strip()]
