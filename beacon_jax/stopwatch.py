"""Wall time apart from compilation."""

import threading
import time
from typing import Any

import jax

# What JAX reports of making a program: tracing, lowering, and compiling it or reading
# it from the compilation cache. They nest, so that their sum counts seconds twice.
STAGES = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class _Compiling:
    """Seconds of this process in which at least one program was being made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[float, float]] = []  # disjoint, in order of their ends
        self._before = 0.0  # seconds of spans that are no longer listed
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: Any) -> None:
        if event not in STAGES:
            return
        end = time.perf_counter()
        start = end - duration_secs
        with self._lock:
            # A stage is reported at its end: those inside it came before.
            while self._spans and self._spans[-1][1] > start:
                start = min(start, self._spans.pop()[0])
            self._spans.append((start, end))
            if len(self._spans) > 1000:  # an outer stage never holds that many
                self._before += sum(b - a for a, b in self._spans[:500])
                del self._spans[:500]

    def seconds(self) -> float:
        with self._lock:
            return self._before + sum(b - a for a, b in self._spans)


_COMPILING = _Compiling()  # JAX's listeners belong to the process as well


class Stopwatch:
    """Measures laps, each as seconds of work and seconds of compilation.

    Compilation is what JAX did to make programs in that time: tracing, lowering,
    compiling or reading the compilation cache, in any thread.
    """

    def __init__(self) -> None:
        self._mark = time.perf_counter(), _COMPILING.seconds()

    def lap(self) -> tuple[float, float]:
        """Returns the seconds of work and of compilation since the last lap.

        The caller waits for the devices first (`jax.block_until_ready`).
        """
        now = time.perf_counter(), _COMPILING.seconds()
        compiled = now[1] - self._mark[1]
        whole, self._mark = now[0] - self._mark[0], now
        return max(whole - compiled, 0.0), min(compiled, whole)
