"""Memories as resources: in RAM while there is room, on disk for good.

A memory is two files in the store's folder, `ID.beacon` (a beacon pack, which is
checked by its hashes whenever it is read) and `ID.json` (what is told of it). The
second is written last, and each as a whole or not at all: a memory is there when its
JSON is. So several processes may share a folder, and a kill leaves no half memory. An
id is a hash of the model, the text and the settings: what two write under one id is the
same.
"""

import collections
import errno
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from beacon_jax import paths
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.packs import PackError
from beacon_jax.serving import programs

type About = dict[str, Any]

ID = re.compile("mem-[0-9a-f]{32}")
STALE = 24 * 3600  # seconds: no process writes one file for so long


class Unknown(LookupError):
    """There is no memory of this id."""

    def __init__(self, name: str):
        super().__init__(
            f"memory {name[:80]!r} is not there: POST /v1/memories makes one, GET "
            "/v1/memories lists those that are."
        )


class Full(ValueError):
    """There is no room for a memory, and no folder to put others into."""


class Unwritable(Exception):
    """The store's folder cannot be written: it is full, read-only or gone."""

    def __init__(self, error: OSError):
        super().__init__(
            "the memory cannot be kept, the folder of the store takes no more "
            f"({error.strerror or type(error).__name__}): delete memories, or let the "
            "server's administrator make room."
        )


def make_id(*parts: Any) -> str:
    """Makes an id of what a memory is made of: JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return f"mem-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class Store:
    """The memories of a server. Its methods may be called from any thread.

    Attributes:
      most: bytes of RAM that memories may take together.
    """

    def __init__(self, model: Model, folder: Path | None, most: int):
        """Opens a folder; None: memories are in RAM alone, and end with the process.

        Raises:
          OSError: the folder cannot be made or written.
        """
        self.model, self.folder, self.most = model, folder, most
        self._lock = threading.RLock()
        self._held: collections.OrderedDict[str, Memory] = collections.OrderedDict()
        self._about: dict[str, About] = {}
        self._read: dict[str, tuple[int, About]] = {}  # of a file, by its time
        if folder is not None:
            paths.check_folder("--store", folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep(folder)

    # --- what is there -----------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def about(self, name: str) -> About:
        """Returns what is told of a memory.

        Raises:
          Unknown: it is not there.
        """
        found = self._find(name)
        if found is None:
            raise Unknown(name)
        with self._lock:
            return found | {
                "resident": name in self._held,
                "stored": self.folder is not None,
            }

    def all(self) -> list[About]:
        """Returns what is told of all memories of this model, the newest first."""
        names = set(self._about)
        if self.folder is not None:
            names |= {x.stem for x in self.folder.glob("mem-*.json")}
        found = []
        for name in names:
            try:
                found.append(self.about(name))
            except Unknown:  # another model's, or it has just been deleted
                continue
        return sorted(found, key=lambda x: (-x["created"], x["id"]))

    def get(self, name: str) -> Memory:
        """Returns a memory, on the host.

        Raises:
          Unknown: it is not there.
          PackError: its file is damaged, or another model's.
        """
        self.about(name)
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
        if self.folder is None:
            raise Unknown(name)
        try:
            memory = programs.on_host(Memory.load(self._pack(name), self.model))
        except FileNotFoundError:
            raise Unknown(name) from None
        self._hold(name, memory)
        return memory

    # --- what changes it ---------------------------------------------------------

    def put(self, name: str, memory: Memory, about: Mapping[str, Any]) -> About:
        """Keeps a memory, on disk first. Returns what is told of it.

        Raises:
          Full: without a folder, and there is no room.
          Unwritable: the folder cannot be written.
        """
        about = dict(about) | {"id": name, "created": int(time.time())}
        if self.folder is not None:
            try:
                self._write(name, memory, about)
            except OSError as error:
                raise Unwritable(error) from error
            self._hold(name, memory)
        else:
            with self._lock:
                self.check_room(nbytes(memory))
                self._about[name] = about
                self._hold(name, memory)
        # It may have been deleted since, here or by another process.
        return about | {"resident": True, "stored": self.folder is not None}

    def _write(self, name: str, memory: Memory, about: About) -> None:
        """Writes both files, the pack first."""
        folder = self._pack(name).parent
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "nothing may be written there")
        memory.save(self._pack(name), overwrite=True)
        text = json.dumps(about | {"hash": self._model_hash()})
        paths.write_whole(self._json(name), text)

    def rename(self, name: str, new: str, about: Mapping[str, Any]) -> About:
        """Puts the memory `name` under another id, too."""
        return self.put(new, self.get(name), about)

    def delete(self, name: str) -> None:
        """Deletes a memory, from disk too.

        Raises:
          Unknown: it is not there.
          Unwritable: its files cannot be removed.
        """
        self.about(name)
        try:
            if self.folder is not None:  # the JSON first: without it nothing is there
                self._json(name).unlink(missing_ok=True)
                self._pack(name).unlink(missing_ok=True)
        except OSError as error:
            raise Unwritable(error) from error
        finally:
            with self._lock:
                self._held.pop(name, None)
                self._about.pop(name, None)
                self._read.pop(name, None)

    def check_room(self, more: int) -> None:
        """Raises Full if there is neither room for `more` bytes nor a folder."""
        if self.folder is None and self.held_nbytes + more > self.most:
            raise Full(
                f"{more:,} bytes of memory are too many beside {self.held_nbytes:,} of "
                f"{self.most:,}: delete memories, or start the server with --store or "
                "a larger --store_bytes."
            )

    @property
    def held_nbytes(self) -> int:
        """Bytes of the memories in RAM."""
        with self._lock:
            return sum(nbytes(memory) for memory in self._held.values())

    @property
    def held(self) -> int:
        """Counts the memories in RAM."""
        return len(self._held)

    # --- files -------------------------------------------------------------------

    def _hold(self, name: str, memory: Memory) -> None:
        """Keeps a memory in RAM; those used longest ago go, which are on disk."""
        with self._lock:
            self._held[name] = memory
            self._held.move_to_end(name)
            if self.folder is not None:
                while len(self._held) > 1 and self.held_nbytes > self.most:
                    self._held.popitem(last=False)

    def _find(self, name: str) -> About | None:
        """Reads what is told of a memory; None: not there, or another model's."""
        if not ID.fullmatch(name):
            return None
        with self._lock:
            if name in self._about:
                return self._about[name]
        if self.folder is None:
            return None
        path = self._json(name)
        try:
            changed = path.stat().st_mtime_ns
            known = self._read.get(name)
            if known is None or known[0] != changed:
                self._read[name] = known = changed, json.loads(path.read_text())
        except (OSError, ValueError):
            self._read.pop(name, None)
            return None
        about = dict(known[1])
        return about if about.pop("hash", None) == self._model_hash() else None

    def _pack(self, name: str) -> Path:
        assert self.folder is not None and ID.fullmatch(name)
        return self.folder / f"{name}.beacon"

    def _json(self, name: str) -> Path:
        assert self.folder is not None and ID.fullmatch(name)
        return self.folder / f"{name}.json"

    def _model_hash(self) -> list[str | None]:
        identity = self.model.identity
        return [identity.base, identity.beacon]

    def _sweep(self, folder: Path) -> None:
        """Removes what killed processes left half written."""
        for path in _partials(folder):
            try:
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()
            except OSError:
                continue


def usable(store: Store, name: str) -> bool:
    """Tells whether a memory is there and whole; one that is damaged is deleted."""
    if name not in store:
        return False
    try:
        store.get(name)
    except Unknown:
        return False
    except PackError:
        store.delete(name)
        return False
    return True


def nbytes(memory: Memory) -> int:
    """Counts the bytes of a memory in RAM."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(memory.state))


def _partials(folder: Path) -> Iterator[Path]:
    yield from folder.glob(".mem-*.partial")
