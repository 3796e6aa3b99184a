"""Decides which documents are held out for evaluation.

The decision depends on a hash of a document's name and on nothing else: the same file
lands on the same side on every machine, for the base model, for the beacons and for the
evaluation, however many other files there are.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from beacon_jax.data.packed import Bad, TextOf

# A lone file is cut into documents of this many characters (at line ends), because a
# split by file name would leave nothing on one side.
FILE_BLOCK = 16_384
HELD_OUT = "held out for evaluation"


def is_heldout(name: str, heldout: float) -> bool:
    """Tells whether the document of this relative name belongs to the held-out split.

    Args:
      heldout: share of the documents that belong to it; 0: none.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64 < heldout


def row_name(where: str) -> str:
    """Returns the name of a row as a document, given "file:NUMBER" counted from 1."""
    name, _, number = where.rpartition(":")
    return block_name(name, int(number) - 1)


def block_name(file: str, number: int) -> str:
    """Returns the name of a row or block of a file as a document; counted from 0."""
    return f"{file}:{number:09d}"


def blocks(lines: Iterable[str]) -> Iterator[str]:
    """Cuts the lines of a lone file (each with its end) into documents."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= FILE_BLOCK:
            yield "".join(block)
            block, size = [], 0
    yield "".join(block)


def kept_runs(
    path: str | Path, name: str, heldout: float, size: int
) -> Iterator[tuple[int, str | Bad]]:
    """Reads a lone file without its held-out blocks.

    Neighbouring blocks are put together until they have `size` characters, so that rows
    are long. A held-out block is a Bad that says so.

    Yields:
      (number of the first block, from 1; text or Bad).
    """
    run, first, length = [], 1, 0
    try:
        source = TextOf(str(path))
        raw = io.BufferedReader(source)
        with io.TextIOWrapper(raw, "utf-8") as file:  # "\r\n" becomes "\n"
            lines = (part for line in file for part in line.splitlines(keepends=True))
            for number, block in enumerate(blocks(lines)):
                held = is_heldout(block_name(name, number), heldout)
                if run and (held or length >= size):
                    yield first, "".join(run)
                    run, length = [], 0
                if held and block.strip():
                    yield number + 1, Bad(HELD_OUT)
                elif not held:
                    first = first if run else number + 1
                    run.append(block)
                    length += len(block)
    except UnicodeDecodeError:
        yield first, Bad("invalid UTF-8", whole=True)
        return
    if run and any(map(str.strip, run)):
        yield first, "".join(run)
    if source.bad:
        yield first, source.bad
