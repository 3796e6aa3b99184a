"""Finds question-answer pairs in a model's answers, and keeps them in a file."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from beacon_jax.forms import unlike

KEYS = (("question", "answer"), ("q", "a"))
Pair = tuple[str, str]


class Answers:
    """A file that keeps answers: one JSON line {"key", "pairs"} for each.

    Lines are only ever appended. Memory holds the places of the lines, not the answers.
    A damaged line, such as the last one of a process that was killed, stays where it is
    and counts as no answer.
    """

    def __init__(self, path: Path):
        self.path = path
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "Answers":
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(
                f"out: another run is writing {self.path}; wait for it or end it"
            ) from None
        self._file.seek(0)
        place = 0
        line = b"\n"
        for line in self._file:
            row = self._read(line)
            if not unlike(row, {"key": str, "pairs": [[str]]}, "row") and all(
                len(pair) == 2 for pair in row["pairs"]
            ):
                self._places[row["key"]] = place
            place += len(line)
        if not line.endswith(b"\n"):
            self._file.write(b"\n")
            self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @staticmethod
    def _read(line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        return row if isinstance(row, dict) else {}

    def known(self) -> set[str]:
        """Returns the keys that have an answer."""
        return set(self._places)

    def add(self, key: str, pairs: Sequence[Pair]) -> None:
        """Keeps an answer, which is on the disk when this returns. Thread-safe."""
        line = json.dumps({"key": key, "pairs": pairs}, ensure_ascii=True) + "\n"
        with self._lock:
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self._places[key] = place

    def get(self, key: str) -> list[Pair]:
        """Returns the pairs of a segment.

        The list is empty if the segment has no answer, or an answer without any pair.
        """
        if key not in self._places:
            return []
        with self._lock:
            self._file.seek(self._places[key])
            return [(q, a) for q, a in self._read(self._file.readline())["pairs"]]


def parse_pairs(answer: str) -> list[Pair]:
    """Returns the questions and answers in what a model wrote.

    Takes JSON lists and objects: nested or one a line, inside code fences or prose, and
    cut off in the middle (what is complete before the cut counts). Leaves out pairs
    with an empty or missing side, and repeated questions.
    """
    decoder = json.JSONDecoder(strict=False)  # line ends inside strings are forgiven
    found: dict[str, str] = {}
    at = answer.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            for question, text in _pairs_in(value):
                found.setdefault(question, text)
        at = answer.find("{", end)
    return list(found.items())


def _pairs_in(value: Any) -> Iterator[Pair]:
    if isinstance(value, list):
        for item in value:
            yield from _pairs_in(item)
    if not isinstance(value, dict):
        return
    lower = {key.lower(): item for key, item in value.items()}
    for question, answer in KEYS:
        one, other = lower.get(question), lower.get(answer)
        if isinstance(one, str) and isinstance(other, str | int | float):
            if one.strip() and str(other).strip():
                yield one.strip(), str(other).strip()
            return
    for item in value.values():
        yield from _pairs_in(item)
