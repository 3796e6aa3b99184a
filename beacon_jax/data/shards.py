"""Writes one shard of a prepared folder: reads its parts, tokenises, reports.

The code runs in worker processes, or in the main process if that works alone. What a
shard holds depends on its job alone, so that a folder is the same whatever number of
processes made it, and however often it was interrupted. Only the index (14 bytes an
example) and a bounded report are kept in memory.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beacon_jax import runtime
from beacon_jax.data.examples import Made, Rules, make_examples
from beacon_jax.data.heldout import HELD_OUT
from beacon_jax.data.prepared import (
    INDEX,
    encode,
    example_hash,
    shard_name,
    write_json,
)
from beacon_jax.data.sources import Dropped, Piece, Record, held_out, read_part
from beacon_jax.data.tally import ShardCounts, clock
from beacon_jax.paths import FULL, whole_file
from beacon_jax.resources import load_tokenizer

_ENTRY = struct.Struct("<ihQ")  # the bytes of an INDEX


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
    """Writer of shards: a process has one, with its tokenizer, for all its jobs."""

    def __init__(
        self, tokenizer: Any, rules: Rules, counters: Any, vocab_size: int | None = None
    ):
        self.tokenizer, self.rules, self.counters = tokenizer, rules, counters
        self.vocab_size = vocab_size

    def write(self, job: Job) -> int:
        """Writes the shard of a job, its index and its report; returns job.index.

        Raises:
          CancelledError: the main process set the STOP slot.
          ValueError: as `make_examples`.
          OSError: the disk is full, say.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        partial = job.path.with_name(f".{job.path.name}.{os.getpid()}.partial")
        counts = ShardCounts()
        index = bytearray()  # 14 bytes an example; a list of tuples takes 200
        # One record a group: reading one row decompresses no other.
        with _written(partial):
            writer = ArrayRecordWriter(str(partial), "group_size:1")
            for part in job.parts:
                for row in self._counted(part):
                    made = self._made(part, row)
                    for example in made.examples:
                        data = encode(example)
                        writer.write(data)
                        index += _ENTRY.pack(
                            len(example.tokens), part.source, example_hash(data)
                        )
                    counts.add(part.source, row.where, made)
            writer.close()
            partial.rename(job.path)
        with whole_file(job.index_path) as file:
            np.save(file, np.frombuffer(index, INDEX))
        write_json(job.report_path, counts.value)
        return job.index

    def _made(self, part: Piece, row: Record | Dropped) -> Made:
        if isinstance(row, Dropped):
            return Made(reason=row.reason)
        if held_out(part, row, self.rules.heldout):
            return Made(reason=HELD_OUT)
        made = make_examples(row, self.tokenizer, self.rules, self.vocab_size)
        self._count(EXAMPLES, len(made.examples))
        self._count(TOKENS, sum(len(x.tokens) for x in made.examples))
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


@contextlib.contextmanager
def _written(partial: Path) -> Iterator[None]:
    """Removes a file that could not be written, which others may need the room of.

    Raises:
      OSError: in place of what array_record raises, with its number if that is known.
    """
    try:
        yield
    except RuntimeError as error:
        for number in FULL:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(partial)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def start_worker(
    tokenizer_folder: str, rules: Rules, counters: Any, vocab_size: int | None
) -> None:
    """Sets up a worker process, which ends when its parent does."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    runtime.quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _worker = Worker(load_tokenizer(tokenizer_folder), rules, counters, vocab_size)


def run_job(job: Job) -> int:
    """Runs a job in a process that `start_worker` set up."""
    assert _worker is not None
    return _worker.write(job)


_worker: Worker | None = None


def _size(row: Record | Dropped) -> int:
    """Returns the approximate bytes of a row."""
    if isinstance(row, Dropped):
        return 0
    if row.text is not None:
        return len(row.text)
    if row.turns is not None:
        return sum(len(content) for _, content in row.turns)
    return 4 * len(row.tokens[0]) if row.tokens is not None else 0


class ShardProgress:
    """Shows a line now and then: examples, tokens, rate, MB, time left."""

    def __init__(
        self,
        jobs: Sequence[Job],
        counters: Any,
        show: Callable[[str], None],
        interval: float = 5.0,
    ):
        self._counters, self._show, self._interval = counters, show, interval
        self._total = sum(job.size for job in jobs)
        self._before = sum(job.size for job in jobs if job.finished())
        self._began = time.monotonic()

    def line(self, elapsed: float) -> str:
        """Returns the line that is shown after so many seconds."""
        counters = self._counters
        examples, tokens, size = counters[EXAMPLES], counters[TOKENS], counters[BYTES]
        left = self._total - self._before - size
        eta = clock(left * elapsed / size) if size else "?"
        return (
            f"{examples:,} examples  {tokens:,} tokens  {tokens / elapsed:,.0f} tok/s  "
            f"{(self._before + size) / 1e6:,.0f}/{self._total / 1e6:,.0f} MB  ETA {eta}"
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Shows how far the shards are while the block works on them."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(self._interval):
                self._show(self.line(time.monotonic() - self._began))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
