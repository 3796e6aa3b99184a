"""Writes one shard of a prepared folder: reads its parts, tokenises, reports.

The code runs in worker processes, or in the main process if that works alone. What a
shard holds depends on its job alone, so that a folder is the same whatever number of
processes made it, and however often it was interrupted. Only the index (14 bytes an
example) and a bounded report are kept in memory.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beacon_jax import runtime
from beacon_jax.data.examples import EXPECTED, Example, Made, Rules, make_examples
from beacon_jax.data.heldout import HELD_OUT
from beacon_jax.data.prepared import (
    INDEX,
    encode,
    example_hash,
    shard_name,
    write_json,
)
from beacon_jax.data.sources import Dropped, Piece, Record, held_out, read_part
from beacon_jax.resources import load_tokenizer

FIRST = 5  # places that a report names for every reason
BAD_ROWS = 1_000  # bad rows of a shard that dropped.jsonl may hold


class Job(NamedTuple):
    """A shard: number `index` of `count`, the parts it holds, the folder it goes to."""

    index: int
    count: int
    parts: tuple[Piece, ...]
    folder: str

    @property
    def path(self) -> Path:
        return Path(self.folder) / shard_name(self.index, self.count)

    @property
    def index_path(self) -> Path:
        return self.path.with_suffix(".index.npy")

    @property
    def report_path(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def size(self) -> int:
        """Bytes of the sources that the shard is made from."""
        return sum(part.size for part in self.parts)

    def finished(self) -> bool:
        """Tells whether the shard is complete. The report is written last."""
        files = (self.report_path, self.index_path, self.path)
        return all(file.exists() for file in files)


# Slots of the array that workers and main process share.
EXAMPLES, TOKENS, BYTES, STOP = range(4)


class Worker:
    """The things a process needs for any job: tokenizer, rules, and shared counters."""

    def __init__(self, tokenizer: Any, rules: Rules, counters: Any):
        self.tokenizer, self.rules, self.counters = tokenizer, rules, counters

    def write(self, job: Job) -> int:
        """Writes the shard of a job, its index and its report; returns job.index.

        Raises:
          CancelledError: the main process set the STOP slot.
          OSError: the disk is full, say.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        partial = job.path.with_name(f".{job.path.name}.{os.getpid()}.partial")
        report, index = _Report(), _Index()
        # One record a group: reading one row decompresses no other.
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for part in job.parts:
            for row in self._counted(part):
                made = self._made(part, row)
                for example in made.examples:
                    data = encode(example)
                    writer.write(data)
                    index.add(len(example.tokens), part.source, example_hash(data))
                report.add(part.source, row.where, made)
        writer.close()
        partial.rename(job.path)
        _save(job.index_path, index.array())
        write_json(job.report_path, report.value)
        return job.index

    def _made(self, part: Piece, row: Record | Dropped) -> Made:
        if isinstance(row, Dropped):
            return Made(reason=row.reason)
        if held_out(part, row, self.rules.heldout):
            return Made(reason=HELD_OUT)
        made = make_examples(row, self.tokenizer, self.rules)
        self._count(EXAMPLES, len(made.examples))
        self._count(TOKENS, _tokens(made.examples))
        return made

    def _counted(self, part: Piece) -> Iterator[Record | Dropped]:
        """Yields the rows of a part and counts its bytes.

        Between rows, bytes are estimated by the length of what the rows hold; at the
        end they are exact.
        """
        done = 0
        for row in read_part(part):
            if self.counters[STOP]:
                raise concurrent.futures.CancelledError
            size = min(_size(row), part.size - done)
            self._count(BYTES, size)
            done += size
            yield row
        self._count(BYTES, part.size - done)

    def _count(self, slot: int, number: int) -> None:
        with self.counters.get_lock():
            self.counters[slot] += number


def start_worker(tokenizer_folder: str, rules: Rules, counters: Any) -> None:
    """Sets up a worker process, which ends when its parent does."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    runtime.quiet()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = Worker(load_tokenizer(tokenizer_folder), rules, counters)


def run_job(job: Job) -> int:
    """Runs a job in a process that `start_worker` set up."""
    assert _worker is not None
    return _worker.write(job)


_worker: Worker | None = None


def _tokens(examples: tuple[Example, ...]) -> int:
    return sum(len(example.tokens) for example in examples)


def _size(row: Record | Dropped) -> int:
    """Returns the approximate bytes of a row."""
    if isinstance(row, Dropped):
        return 0
    if row.text is not None:
        return len(row.text)
    if row.turns is not None:
        return sum(len(content) for _, content in row.turns)
    return 4 * len(row.tokens[0]) if row.tokens is not None else 0


class _Index:
    """The index of a shard, which grows in blocks.

    It takes 14 bytes an example, where a list of tuples takes 200.
    """

    def __init__(self):
        self._blocks: list[np.ndarray] = []
        self._rows: list[tuple[int, int, int]] = []

    def add(self, *row: int) -> None:
        self._rows.append(row)  # type: ignore[arg-type]
        if len(self._rows) == 4096:
            self._flush()

    def _flush(self) -> None:
        self._blocks.append(np.asarray(self._rows, INDEX))
        self._rows = []

    def array(self) -> np.ndarray:
        self._flush()
        return np.concatenate(self._blocks)


class _Report:
    """Counts of a shard by source, as JSON."""

    def __init__(self):
        self.value: dict[str, Any] = {"sources": {}, "bad": []}

    def _source(self, source: int) -> dict[str, Any]:
        keys = ("rows", "examples", "tokens", "labelled", "cut")
        new = {**dict.fromkeys(keys, 0), "drops": {}}
        return self.value["sources"].setdefault(str(source), new)

    def add(self, source: int, where: str, made: Made) -> None:
        """Counts a row and what became of it."""
        counts = self._source(source)
        counts["rows"] += 1
        if made.reason:
            self._drop(counts["drops"], where, made)
            return
        counts["examples"] += len(made.examples)
        counts["tokens"] += _tokens(made.examples)
        counts["labelled"] += sum(int(x.labelled.sum()) for x in made.examples)
        counts["cut"] += made.lost

    def _drop(self, drops: dict[str, Any], where: str, made: Made) -> None:
        bad = made.reason not in EXPECTED
        new = {"rows": 0, "tokens": 0, "bad": bad, "first": []}
        drop = drops.setdefault(made.reason, new)
        drop["rows"] += 1
        drop["tokens"] += made.lost
        if len(drop["first"]) < FIRST:
            drop["first"].append(where)
        if bad and len(self.value["bad"]) < BAD_ROWS:
            self.value["bad"].append([where, made.reason])


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.rename(path)
