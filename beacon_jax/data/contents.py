"""Tells whether sources still hold the text that data were prepared from.

What decides is the hash of the bytes of all files, with their names and in their order.
700 MB/s and core are hashed, so 40 MB take a moment, and 100 GB 140 s divided by the
cores, or what the disk needs. So `prepare` keeps what it hashed in STAMPS, with size,
times and inode of each file: a file that has the same ones is not read again. The time
of change (ctime) is set by the kernel at each write; nobody can set it back.
"""

import concurrent.futures
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beacon_jax.data.readers import Piece, tfds_files
from beacon_jax.paths import read_object, write_whole

STAMPS = ".stamps.json"  # in a prepared folder; lost or damaged, files are read again
# A write within the granularity of a clock (2 s on FAT, more than others have) may
# leave a file's times as they were.
SETTLED = 2 * 10**9  # nanoseconds
THREADS = 8  # hashing needs no interpreter


class Contents:
    """Content of the files of all sources.

    Attributes:
      sources: {"bytes", "sha256"} of each source.
      changed: names of files that were hashed before, with other bytes.
    """

    def __init__(self, sources: Sequence[Sequence[Piece]], folder: Path):
        """Hashes what is not in the STAMPS of the folder.

        Raises:
          OSError: a file cannot be read.
        """
        self._folder = folder
        self._known = _read(folder / STAMPS)
        self._stamps: dict[str, list[Any]] = {}
        paths = {str(p): piece for x in sources for piece in x for p in _paths(piece)}
        threads = min(THREADS, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            hashes = dict(zip(paths, pool.map(self._hash, paths), strict=True))
        before = {path: self._known.get(path, [""])[-1] for path in paths}
        self.changed = [
            piece.name
            for path, piece in paths.items()
            if before[path] not in ("", hashes[path])
        ]
        self.sources = [
            {
                "bytes": sum(piece.size for piece in pieces),
                "sha256": _joined(
                    (piece.name, path.name, hashes[str(path)])
                    for piece in pieces
                    for path in _paths(piece)
                ),
            }
            for pieces in sources
        ]

    def save(self) -> None:
        """Keeps the hashes of files that nobody wrote within the last seconds."""
        path = self._folder / STAMPS
        if not path.is_dir():  # else there is no place, and files are read again
            write_whole(path, json.dumps(self._stamps))

    def _hash(self, path: str) -> str:
        now, found = time.time_ns(), os.stat(path)
        stamp = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
        known = self._known.get(path)
        if known is not None and known[:-1] == stamp:
            digest = known[-1]
        else:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        if max(found.st_mtime_ns, found.st_ctime_ns) < now - SETTLED:
            self._stamps[path] = [*stamp, digest]
        return digest


def _paths(piece: Piece) -> list[Path]:
    """Returns the files of a piece that are read: none of one that is only reported."""
    if piece.kind == "tfds":
        return tfds_files(*piece.detail)
    return [] if piece.kind == "unusable" else [Path(os.path.abspath(piece.path))]


def _joined(parts: Any) -> str:
    digest = hashlib.sha256()
    for names in parts:
        digest.update(json.dumps(names).encode())
    return digest.hexdigest()


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        found = read_object(path) if path.is_file() else {}
    except (ValueError, OSError):
        return {}
    whole = (
        isinstance(x, list) and len(x) == 5 and isinstance(x[-1], str)
        for x in found.values()
    )
    return found if all(whole) else {}
