"""Continuous batching: requests join and leave one running decode loop.

One thread owns the device's batch. Each turn it feeds one window of one prompt, then
makes a block of tokens of every row by one call. So nobody waits longer than a window
and a block, and no token costs a decision in Python. Prompts take turns, window by
window: a short one overtakes a long one. (The loop is that of `inference.decode`.)
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from beacon_jax.core.law import Law
from beacon_jax.core.loss import Likely
from beacon_jax.inference.decode import BLOCK, NO_NUMBER, Rows
from beacon_jax.inference.finite import check_finite
from beacon_jax.inference.history import History
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.options import Completion
from beacon_jax.inference.sampling import Sampling, make_sampling
from beacon_jax.serving import programs
from beacon_jax.serving.device import Device
from beacon_jax.serving.rows import (
    Ask,
    Ended,
    Event,
    Failed,
    Prompt,
    Read,
    Row,
    Ticket,
)
from beacon_jax.serving.turns import Turns

PROMPTS = 4  # that are read in turns; the others wait
BETWEEN = 4  # most tokens per row between two windows of prompts
PATIENCE = 0.05  # seconds of a block that nobody minds, where a window takes less

# What a request does not say; of free rows, too.
DEFAULTS: dict[str, Any] = {
    field.name: getattr(Completion, field.name)
    for field in dataclasses.fields(Sampling)
}


class Busy(Exception):
    """The queue is full; `seconds` says when to ask again."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(
            f"{waiting} requests are waiting, as many as may: ask again in {seconds} s."
        )
        self.seconds = seconds


class TooLong(ValueError):
    """A request needs more slots than a row has."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of the engine.

    Attributes:
      rows: answers that grow at the same time.
      slots: of a row: memory, prompt and answer.
      queue: requests that may wait.
      dtype: of keys and values.
    """

    rows: int
    slots: int
    queue: int
    dtype: str


class Observer:
    """Hears of what the engine does; metrics are one. Every method may be left out."""

    def waited(self, seconds: float) -> None: ...
    def read(self, tokens: int) -> None: ...
    def began(self, seconds: float) -> None: ...
    def made(self, tokens: int, rows: int, seconds: float) -> None: ...


class Engine:
    """The running batch, and the thread that drives it.

    `submit` and `cancel` may be called from any thread.
    """

    def __init__(
        self,
        model: Model,
        shape: Shape,
        observer: Observer | None = None,
        turns: Turns | None = None,
        device: Device | None = None,
    ):
        """Makes an engine; `start` starts its thread.

        Args:
          turns: who may use the devices; None: nobody else does.
          device: what they hold (`followers.Leader`: of several processes).
        """
        self.model, self.shape = model, shape
        self._turns = turns or Turns(needed=False)
        self._device = device or Device(model, shape.rows, shape.dtype)
        self._number = 0  # of the next prompt
        self._warming, self._warm_biased = threading.Lock(), False
        self._window_seconds, self._step_seconds = 0.0, PATIENCE  # of the last ones
        self.law = Law.of(model.config)
        beacon = model.config.beacon
        self.static = tuple(sorted({0, *(beacon.ratios if beacon else ())}))
        self.sizes = programs.sizes(model.window, shape.slots)
        self._observer = observer or Observer()
        self._changed = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._closing = False
        self._prompts: collections.deque[Prompt] = collections.deque()
        self._ready: collections.deque[Prompt] = collections.deque()
        self._rows: list[Row | None] = [None] * shape.rows
        self._ratios = np.zeros((shape.rows, 1), np.int32)
        self._seeds = np.zeros(shape.rows, np.uint32)
        self._limits = np.ones(shape.rows, np.int32)
        self._sampling: dict[str, Any] = {
            name: np.full(shape.rows, value, np.asarray(value).dtype)
            for name, value in DEFAULTS.items()
        }
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- what other threads call -------------------------------------------------

    def warm(self, done: Callable[[int, int], None]) -> None:
        """Compiles every program; calls `done` with (sizes compiled, of how many)."""
        for number, size in enumerate(self.sizes):
            done(number, len(self.sizes))
            self._device.warm(size, self.static)
        done(len(self.sizes), len(self.sizes))

    def warm_biased(self) -> None:
        """Compiles, once, what answers behind memories whose slots have a bias.

        Whoever makes such a memory calls it, in a thread of its own, so that nobody
        waits for it later.
        """
        with self._warming, self._turns:
            if not self._warm_biased:
                for size in self.sizes:
                    self._device.warm(size, self.static, True)
                self._warm_biased = True

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, ask: Ask, tell: Callable[[Event], None]) -> Ticket:
        """Puts a request into the queue; `tell` hears of it from the engine's thread.

        Raises:
          TooLong: it needs more slots than a row has.
          Busy: the queue is full, or the engine is closing.
        """
        self.check(ask)
        ticket = Ticket(ask, tell, left=len(ask.seeds))
        with self._changed:
            waiting = len(self._waiting)
            if self._closing or waiting >= self.shape.queue:
                raise Busy(waiting, 1 + waiting // self.shape.rows)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def check(self, ask: Ask) -> int:
        """Returns the slots that a request needs.

        Raises:
          TooLong: more than a row has.
        """
        # Ratios that are not the model's own are compiled when they are first met.
        self.static = tuple(sorted({*self.static, ask.ratio, *_opened(ask)}))
        needed = ask.slots(self.law, self.static)
        if needed > self.shape.slots:
            has = ask.before.slots
            raise TooLong(
                f"{len(ask.fed):,} tokens of prompt and up to {ask.max_new_tokens:,} "
                f"of answer behind {has:,} slots of memory need {needed:,} slots, a "
                f"row has {self.shape.slots:,}: shorten them, compress more, or start "
                "the server with a larger --slots."
            )
        return needed

    def cancel(self, ticket: Ticket) -> None:
        """Takes a request back; nothing is told any more."""
        ticket.cancelled = True
        with self._changed:
            self._changed.notify()

    def close(self, seconds: float) -> None:
        """Takes no more requests; waits until those that were taken have ended.

        After `seconds` the rest is given up.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)

    @property
    def running(self) -> bool:
        """Whether the thread is still at work."""
        return self._thread.is_alive()

    def state(self) -> dict[str, int]:
        """Counts requests: waiting, being read, and rows that answer."""
        return {
            "waiting": len(self._waiting),
            "reading": len(self._prompts) + len(self._ready),
            "answering": sum(row is not None for row in self._rows),
        }

    # --- the thread --------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._busy() and not self._closing:
                    self._changed.wait()
                if self._closing and not self._busy():
                    return
            try:
                with self._turns:
                    self._turn()
            except Exception as error:  # of the device: all that were in it have failed
                self._fail_all(error)

    def _busy(self) -> bool:
        return bool(
            self._waiting or self._prompts or self._ready or self._active().any()
        )

    def _active(self) -> np.ndarray:
        return np.asarray([row is not None for row in self._rows])

    def _turn(self) -> None:
        """Feeds a window of one prompt, and makes a block of tokens of every row."""
        self._drop_cancelled()
        self._admit()
        if self._prompts:
            prompt = self._prompts.popleft()
            try:
                self._read_window(prompt)
            except Exception as error:  # the state that it took over is its own
                self._fail(prompt.ticket, error)
                self._device.drop(prompt.number)
        self._join()
        if self._active().any():
            self._decode(self._steps())

    def _steps(self) -> int:
        """Chooses how many tokens each row gets before the next window is read.

        While rows are free and several prompts could have them, rows get few, so that
        more of them share the next steps.
        """
        prompts = len(self._prompts) + len(self._waiting)
        if not prompts:  # who comes meanwhile waits as long as a window takes
            longest = max(self._window_seconds, PATIENCE)
            return min(max(int(longest / self._step_seconds), 1), BLOCK)
        active = int(self._active().sum())
        if active == self.shape.rows or prompts == 1:
            return BETWEEN
        return max(BETWEEN * active // self.shape.rows, 1)

    def _drop_cancelled(self) -> None:
        with self._changed:
            kept = [t for t in self._waiting if not t.cancelled]
            self._waiting = collections.deque(kept)
        for queue in (self._prompts, self._ready):
            for prompt in list(queue):
                if prompt.ticket.cancelled:
                    queue.remove(prompt)
                    self._device.drop(prompt.number)
        for number, row in enumerate(self._rows):
            if row is not None and row.ticket.cancelled:
                self._leave(number)

    def _admit(self) -> None:
        """Takes requests from the queue, as many as there are rows for."""
        free = int((~self._active()).sum()) - len(self._prompts) - len(self._ready)
        while free > 0 and len(self._prompts) < PROMPTS:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            ticket.started = time.perf_counter()
            self._observer.waited(ticket.started - ticket.asked)
            ask, free = ticket.ask, free - 1
            number, self._number = self._number, self._number + 1
            try:
                size = programs.fitting(self.sizes, self.check(ask))
                self._device.place(number, ask.memory, size)
            except Exception as error:
                self._fail(ticket, error)
                continue
            choices = list(range(len(ask.seeds)))
            self._prompts.append(Prompt(ticket, number, ask.fed, left=choices))

    def _read_window(self, prompt: Prompt) -> None:
        """Feeds a prompt up to the end of its window."""
        ask, w = prompt.ticket.ask, self.law.window
        opened = (ask.before.raw + prompt.done) % w
        end = min(prompt.done + w - opened, len(prompt.tokens))
        labels = None
        if ask.echo:
            labels = np.append(prompt.tokens, 0)[prompt.done + 1 : end + 1]
        tokens, begin = prompt.tokens[prompt.done : end], time.perf_counter()
        told = self._device.window(
            prompt.number, tokens, ask.ratio, self.static, labels
        )
        if told is not None:
            prompt.likely.append(told)
        self._window_seconds = time.perf_counter() - begin
        self._observer.read(end - prompt.done)
        prompt.done = end
        if end < len(prompt.tokens):
            self._prompts.append(prompt)
            return
        prompt.ticket.read = time.perf_counter()
        likely = None
        if prompt.likely:
            parts = zip(*prompt.likely, strict=True)
            likely = Likely(*(np.concatenate(part)[:-1] for part in parts))
        prompt.ticket.tell(Read(likely))
        if ask.max_new_tokens:
            self._ready.append(prompt)
            return
        self._device.drop(prompt.number)
        prompt.ticket.first = prompt.ticket.ended = prompt.ticket.read
        entries = self._entries(ask, [])
        for choice in prompt.left:
            prompt.ticket.tell(Ended(choice, "length", None, entries))

    def _join(self) -> None:
        """Gives free rows to prompts that have been read."""
        while self._ready and (free := np.flatnonzero(~self._active())).size:
            prompt = self._ready[0]
            self._insert(prompt, prompt.left[0], int(free[0]))
            prompt.left.pop(0)
            if not prompt.left:
                self._ready.popleft()
                self._device.drop(prompt.number)

    def _insert(self, prompt: Prompt, choice: int, row: int) -> None:
        model, ask = self.model, prompt.ticket.ask
        seen = np.zeros(model.config.vocab_size, bool)
        if ask.sampling.get("repetition_penalty", 1.0) != 1.0:
            read = ask.before.tokens
            assert read is not None  # `prompts` has checked that
            seen[read] = True
            seen[prompt.tokens] = True
        alone = not self._active().any()
        self._device.insert(prompt.number, row, seen, alone)
        self._ratios[row] = ask.ratio
        self._seeds[row] = ask.seeds[choice]
        self._limits[row] = ask.max_new_tokens
        for name, values in self._sampling.items():
            values[row] = ask.sampling.get(name, DEFAULTS[name])
        self._rows[row] = Row(prompt.ticket, choice, model.tokenizer)

    def _decode(self, steps: int) -> None:
        """Makes up to `steps` tokens of every row."""
        begin, active = time.perf_counter(), self._active()
        counts = [len(row.fed) if row else 0 for row in self._rows]
        told = any(row is not None and row.ticket.ask.likely for row in self._rows)
        asked = Rows(
            Sampling(**self._sampling),
            self._seeds,
            self._limits,
            np.asarray(counts, np.int32),
            np.int32(steps),
            np.bool_(told),
        )
        tokens, goes_on, likely = self._device.block(
            active, self._ratios, asked, self.static
        )
        end = time.perf_counter()
        made = int((tokens >= 0).sum())
        columns = int((tokens >= 0).any(axis=0).sum())
        if columns:
            each = (end - begin) / columns
            self._step_seconds = max(each, 1e-6)
            self._observer.made(made, int(active.sum()), each)
        for number in np.flatnonzero(active).tolist():
            row = self._rows[number]
            if row is None:  # freed with another choice of its request, which failed
                continue
            new = tokens[number][tokens[number] >= 0]
            if (tokens[number] == NO_NUMBER).any():
                self._not_finite(number)
                continue
            if not row.ticket.first:
                row.ticket.first = end
                self._observer.began(end - row.ticket.asked)
            mine = None
            if likely is not None and row.ticket.ask.likely:
                mine = Likely(*(x[number] for x in likely))
            if piece := row.add(new, mine):
                row.ticket.tell(piece)
            if row.stopped or not goes_on[number]:
                self._end(number)

    def _end(self, number: int) -> None:
        """Tells a row's end, and frees it."""
        row = self._rows[number]
        assert row is not None
        ticket, ask = row.ticket, row.ticket.ask
        if piece := row.finish():
            ticket.tell(piece)
        full = len(row.fed) >= ask.max_new_tokens
        finish = "length" if full and not row.stopped else "stop"
        entries = self._entries(ask, row.fed[: row.kept])
        memory = self._memory(number, ask, row) if ask.keep else None
        self._leave(number)
        ticket.left -= 1
        if not ticket.left:
            ticket.ended = time.perf_counter()
        ticket.tell(Ended(row.choice, finish, memory, entries))

    def _after(self, ask: Ask, answer: list[int]) -> History:
        fed = np.append(ask.fed, np.asarray(answer, ask.fed.dtype))
        return ask.before.feed(self.law, np.asarray([ask.ratio]), fed)

    def _entries(self, ask: Ask, answer: list[int]) -> int:
        """Counts the entries behind an answer, without tokens behind a stop."""
        after = self._after(ask, answer)
        return after.slots + int(self.law.entries(after.ratio, after.raw))

    def _memory(self, number: int, ask: Ask, row: Row) -> Memory:
        """Copies what a row holds to the host, up to the end of its text."""
        state, model = self._device.taken(number), self.model
        after, surplus = self._after(ask, row.fed), len(row.fed) - row.kept
        memory = Memory(model.config, state, (after,), model.identity)
        if surplus:
            memory = memory.truncate(after.length - surplus)
        return programs.on_host(memory)

    def _leave(self, number: int) -> None:
        """Frees a row."""
        self._device.release(number)
        self._rows[number] = None  # last: an error finds it there (`_fail_all`)
        for name, values in self._sampling.items():  # no draws for the others' sake
            values[number] = DEFAULTS[name]

    def _not_finite(self, number: int) -> None:
        row = self._rows[number]
        assert row is not None
        try:
            check_finite(np.zeros((1, 1), bool), "logits", self.model.net.dtype.name)
        except ValueError as error:
            self._fail(row.ticket, error)
        self._drop_cancelled()

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """Tells a request that it has failed; its other rows are freed, too."""
        if not ticket.cancelled:
            ticket.cancelled = True
            ticket.tell(Failed(error))

    def _fail_all(self, error: Exception) -> None:
        """Starts anew after an error of the device; what was in it has failed."""
        tickets = [p.ticket for p in (*self._prompts, *self._ready)]
        tickets += [row.ticket for row in self._rows if row is not None]
        self._prompts.clear()
        self._ready.clear()
        self._rows = [None] * self.shape.rows
        self._device.reset()
        for ticket in tickets:
            self._fail(ticket, error)


def _opened(ask: Ask) -> set[int]:
    """Returns the ratio of the window that a prompt goes on in, which it keeps."""
    opened = ask.before.opened
    return set() if opened is None else {opened}


def checked(sampling: dict[str, Any]) -> dict[str, float]:
    """Returns settings of sampling; TypeError or ValueError names one out of range."""
    make_sampling(**{**DEFAULTS, **sampling})
    return sampling
