"""Texts become memories: one at a time, in a thread beside the engine's.

A text is read in pieces of a window or so, and the engine's blocks go between them.
Equal texts with equal settings are read once, whoever asks, however often.
"""

import collections
import contextlib
import dataclasses
import threading
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.memory import CapacityError, slot_nbytes
from beacon_jax.inference.account import Account
from beacon_jax.inference.compressors import METHODS
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.serving.device import Device
from beacon_jax.serving.engine import Busy, TooLong
from beacon_jax.serving.store import About, Store, make_id, usable
from beacon_jax.serving.turns import Turns

FAILED = 100  # memories that could not be made, whose errors are kept

type Settings = dict[str, Any]  # options of `Model.compress`, as JSON


class Cancelled(Exception):
    """Nobody waits for the memory any more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """What is to be read.

    Attributes:
      tokens: behind the parent.
      settings: ratio, max_slots, max_bytes, method, spans (token ranges), lossless.
      parent: id of the memory that is continued.
      messages: the conversation that the tokens are, with those of the parent.
      base: tokens of the row in front of that conversation; None: all are.
      name: for people.
    """

    tokens: Int[np.ndarray, " n"]
    settings: Settings
    parent: str | None = None
    messages: list[dict[str, str]] | None = None
    base: int | None = None
    name: str | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A memory in the making.

    Attributes:
      tokens, total: read so far, of how many.
      about: of the memory, once it is there.
      error: why it could not be made.
    """

    id: str
    source: Source
    total: int
    tokens: int = 0
    about: About | None = None
    error: Exception | None = None
    waiting: int = 0  # clients; 0 with `alone` False: nobody needs it
    alone: bool = False  # goes on without clients
    listeners: list[Callable[[], object]] = dataclasses.field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.about is not None or self.error is not None

    def tell(self) -> None:
        """Tells those who listen that something has changed."""
        for listener in list(self.listeners):
            with contextlib.suppress(RuntimeError):  # the server has ended
                listener()


class Reading:
    """The thread that makes memories, and its queue.

    Its methods may be called from any thread.
    """

    def __init__(
        self,
        device: Device,
        store: Store,
        turns: Turns,
        *,
        slots: int,
        queue: int,
        on_read: Callable[[int], object] = lambda tokens: None,
        on_biased: Callable[[], object] = lambda: None,
    ):
        """Starts the thread.

        Args:
          on_read: called with the tokens of each text that has become a memory.
          on_biased: called before a memory whose slots have a bias is there.
          device: as that of the engine.
          slots: of a row of the engine: a memory of more is of no use.
          queue: texts that may wait.
        """
        self.model, self._device = device.model, device
        self.store, self._turns = store, turns
        self._slots, self._queue, self._read_tokens = slots, queue, on_read
        self._on_biased = on_biased
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}
        self._failed: collections.OrderedDict[str, Exception] = (
            collections.OrderedDict()
        )
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="reading", daemon=True)
        self._thread.start()

    def id_of(self, source: Source) -> str:
        """Returns the id of the memory that a source becomes."""
        # The conversation is not part of it, but for its tokens: equal ones are equal.
        identity = self.model.identity
        tokens = np.asarray(source.tokens, "<i4").tobytes().hex()
        dtype = self.model.net.dtype.name
        made_by = [identity.base, identity.beacon, dtype, repr(self.model.config)]
        return make_id(made_by, source.parent, tokens, source.settings)

    def submit(self, source: Source, *, alone: bool = False) -> Job:
        """Puts a source into the queue, or returns the job that has it already.

        A memory that is there already comes as a job that is done.

        Raises:
          Busy: the queue is full, or the server is closing.
        """
        name = self.id_of(source)
        there = usable(self.store, name)
        with self._changed:
            job = self._jobs.get(name)
            if job is not None:
                job.alone |= alone
                job.waiting += 1
                return job
            job = Job(name, source, len(source.tokens), waiting=1, alone=alone)
            if there and name in self.store:
                job.tokens, job.about = job.total, self.store.about(name)
                return job
            if self._closing or len(self._waiting) >= self._queue:
                raise Busy(len(self._waiting), 5)
            self._jobs[name] = job
            self._failed.pop(name, None)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def leave(self, job: Job) -> None:
        """A client no longer waits; without any the job ends at its next piece."""
        with self._changed:
            job.waiting -= 1
            if job.waiting <= 0 and not job.alone and job in self._waiting:
                self._waiting.remove(job)  # its place in the queue is free
                self._drop(job)
                job.error = _unwanted()

    def find(self, name: str) -> Job | None:
        """Returns the job that makes a memory; None: there is none."""
        return self._jobs.get(name)

    def failure(self, name: str) -> Exception | None:
        """Returns why a memory could not be made that no client waited for."""
        return self._failed.get(name)

    def jobs(self) -> list[Job]:
        """Returns the jobs that have not ended."""
        with self._changed:
            return list(self._jobs.values())

    def cancel(self, name: str) -> None:
        """Ends a job at its next piece, whoever waits."""
        with self._changed:
            if (job := self._jobs.get(name)) is not None:
                job.waiting, job.alone = -(10**9), False
                self._drop(job)

    def fork(self, parent: str, name: str | None) -> About:
        """Makes another id of the same memory.

        Raises:
          Unknown: it is not there.
        """
        about = self.store.about(parent) | {"parent": parent}
        if name is not None:
            about["name"] = name
        for key in ("resident", "stored"):
            about.pop(key)
        return self.store.rename(parent, make_id(parent, uuid.uuid4().hex), about)

    def keep(self, memory: Memory, source: Source) -> About:
        """Puts what an answer left into the store."""
        name = make_id(self.id_of(source), source.messages)
        if name in self.store:
            return self.store.about(name)
        return self.store.put(name, memory, self._told(memory, source))

    @property
    def running(self) -> bool:
        """Whether the thread is still at work."""
        return self._thread.is_alive()

    def close(self, seconds: float) -> None:
        """Takes no more texts; gives those that were not read up."""
        with self._changed:
            self._closing = True
            for job in self._jobs.values():
                job.waiting, job.alone = -(10**9), False
            self._changed.notify()
        self._thread.join(seconds)

    # --- the thread --------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                job.about = self._read(job)
                self._read_tokens(job.total)
            except Exception as error:
                job.error = error
            with self._changed:
                self._drop(job)
                if job.error is not None and job.alone:
                    self._failed[job.id] = job.error
                    while len(self._failed) > FAILED:
                        self._failed.popitem(last=False)
            job.tell()

    def _drop(self, job: Job) -> None:
        """Takes a job off the list; the next to ask for the same gets a new one."""
        if self._jobs.get(job.id) is job:
            del self._jobs[job.id]

    def _check_wanted(self, job: Job) -> None:
        """Raises Cancelled if nobody waits for a job: from then on nobody can."""
        with self._changed:
            if job.waiting <= 0 and not job.alone:
                self._drop(job)
                raise _unwanted()

    def _read(self, job: Job) -> About:
        self._check_wanted(job)
        source, settings = job.source, dict(job.source.settings)
        parent = self.store.get(source.parent) if source.parent else None

        def progress(tokens: int, total: int) -> None:
            job.tokens, job.total = tokens, total
            job.tell()
            self._check_wanted(job)
            self._turns.pause()

        method = settings.get("method")
        if method in (None, "beacon"):  # others need room for what they look at
            settings["capacity"] = self._slots
        notes: list[str] = []
        try:
            with self._turns:
                memory = self._device.compress(
                    source.tokens, parent, settings, notes.append, progress
                )
        except CapacityError as error:
            raise self._too_long(error.needed) from None
        needed = int(memory.entries[0]) + self.model.window
        if needed > self._slots:
            raise self._too_long(needed)
        self._check_wanted(job)
        if memory.state.biased:
            self._on_biased()
        told = self._told(memory, source) | {"notes": notes}
        return self.store.put(job.id, memory, told)

    def _too_long(self, slots: int) -> TooLong:
        return TooLong(
            f"the memory needs {slots:,} slots, a row of the server has "
            f"{self._slots:,}: compress more, or start it with a larger --slots."
        )

    def _told(self, memory: Memory, source: Source) -> About:
        """Returns what is told of a memory."""
        row, config = memory.rows[0], self.model.config
        account = memory.account()
        slot = slot_nbytes(config, self.model.net.dtype)
        spans = source.settings.get("spans")
        method = source.settings.get("method")
        return {
            "object": "memory",
            "status": "ready",
            "name": source.name,
            "tokens": row.length,
            "slots": account.entries,
            "bytes": account.nbytes,
            "full_bytes": row.length * slot,
            "ratio": round(row.length / max(account.entries, 1), 2),
            "method": method or ("beacon" if config.beacon else "none"),
            "settings": source.settings,
            "windows": windows(memory, account),
            "spans": spans,
            "parent": source.parent,
            "messages": source.messages,
            "base": row.length if source.base is None else source.base,
            "biased": memory.state.biased,
        }


def _unwanted() -> Cancelled:
    return Cancelled("the memory was not made: nobody waits for it.")


def windows(memory: Memory, account: Account) -> list[dict[str, float]]:
    """Lists what each window became: its tokens, slots and ratio; the open one last."""
    row = memory.rows[0]
    found = [
        {"tokens": tokens, "slots": slots, "ratio": round(tokens / max(slots, 1), 2)}
        for tokens, slots in np.diff(row.marks, axis=0).tolist()
    ]
    if row.raw:
        opened = account.entries - account.slots
        found.append({"tokens": row.raw, "slots": opened, "ratio": 1, "open": True})
    return found


def planned_slots(model: Model, tokens: int, ratio: float) -> int:
    """Estimates the slots of `tokens` at a ratio, for progress."""
    law = Law.of(model.config)
    full = tokens // law.window * law.window
    return round(full / max(ratio, 1)) + tokens - full


def methods(model: Model) -> list[str]:
    """Lists the methods that a client may name."""
    return [*(["beacon"] if model.config.beacon else []), *METHODS]
