"""Measures how long JAX compiles: what a program costs once, beside what it computes.

JAX reports how long each tracing, lowering and compiling (or reading from the
compilation cache) took when it ends. One may lie inside of another, so the time is that
of their union.
"""

import threading
import time
from collections.abc import Callable

from jax import monitoring

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # XLA's part begins
COMPILED = "/jax/core/compile/backend_compile_duration"
EVENTS = ("/jax/core/compile/jaxpr_trace_duration", LOWERED, COMPILED)
REMEMBERED = 1_000  # intervals that a later one may still enclose


class Watch:
    """Adds up the seconds of compilation that JAX reports, in any thread."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._lock = clock, threading.Lock()
        self._past = 0.0  # seconds of intervals that are no longer kept
        self._kept: list[tuple[float, float]] = []
        self._begun: float | None = None

    def __call__(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Listens to `jax.monitoring`: `event` took so long and ended now."""
        if event not in EVENTS:
            return
        now = self._clock()
        with self._lock:
            start = now - duration_secs
            while self._kept and self._kept[-1][0] >= start:
                self._kept.pop()
            if self._kept:
                start = max(start, self._kept[-1][1])
            self._kept.append((start, now))
            if len(self._kept) > REMEMBERED:
                old, self._kept = self._kept[:-1], self._kept[-1:]
                self._past += sum(end - begin for begin, end in old)
            self._begun = now if event == LOWERED else None

    def seconds(self) -> float:
        """Returns the seconds of all compilation so far, in this process."""
        with self._lock:
            return self._past + sum(end - start for start, end in self._kept)

    def running(self) -> float | None:
        """Returns the seconds since XLA began to compile what is not finished yet.

        None: it compiles nothing.
        """
        begun = self._begun
        return None if begun is None else self._clock() - begun


watch = Watch()
monitoring.register_event_duration_secs_listener(watch)


class Stopwatch:
    """Measures wall time from its start, apart from that of compilation."""

    def __init__(self) -> None:
        self._start = _now()

    def read(self) -> tuple[float, float]:
        """Returns the seconds of work and of compilation since the start.

        The caller waits for the devices first (`jax.block_until_ready`).
        """
        return _between(self._start, _now())

    def lap(self) -> tuple[float, float]:
        """Reads the watch and starts it again."""
        before, self._start = self._start, _now()
        return _between(before, self._start)


def _now() -> tuple[float, float]:
    return time.perf_counter(), watch.seconds()


def _between(
    start: tuple[float, float], end: tuple[float, float]
) -> tuple[float, float]:
    passed, compiled = end[0] - start[0], end[1] - start[1]
    return max(passed - compiled, 0.0), compiled
