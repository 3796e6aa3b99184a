"""Traces some steps of a run, to show where its time goes.

--config.profile_steps=10,13 writes a trace of steps 10 to 13 to WORKDIR/profile. Look
at it with `xprof --logdir=WORKDIR/profile` (pip install xprof), or open its
trace.json.gz in ui.perfetto.dev. The first steps compile: profile later ones.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import jax

from beacon_jax.training.console import say


class Profiler:
    """Traces the steps from the first to the last of `steps`, once per process.

    Steps are counted from 1, as in the progress line. Call `before` and `after` around
    every step; leaving the context ends a trace that is still running.

    Args:
      folder: receives the trace.
      steps: see `parse_steps`.
    """

    def __init__(self, folder: Path, steps: Sequence[int] | str):
        self._folder = folder
        self._first, self._last = parse_steps(steps) or (1, 0)
        self._running, self._step = False, contextlib.ExitStack()

    def before(self, step: int, ready: Any) -> None:
        """Starts the trace if `step` is in the range.

        It waits for `ready` (the state), so that steps dispatched earlier are not part
        of it.
        """
        if not self._first <= step <= self._last:
            return
        if not self._running:
            jax.block_until_ready(ready)
            jax.profiler.start_trace(self._folder)
            self._running = True
        named = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._step.enter_context(named)

    def after(self, step: int, ready: Any) -> None:
        """Ends the trace behind the last step, once `ready` is there."""
        self._step.close()
        if self._running and step >= self._last:
            jax.block_until_ready(ready)
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._step.close()
        if self._running:
            self._stop()

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
        say(f"wrote a trace to {self._folder}")


def parse_steps(steps: Sequence[int] | str) -> tuple[int, int] | None:
    """Reads the first and last step to trace, counted from 1.

    Args:
      steps: (first, last), (only,), the same as text ("10,13"), or nothing for None.

    Raises:
      ValueError: anything else.
    """
    given: list[Any] = list(steps)
    if isinstance(steps, str):
        given = [part.strip() for part in steps.split(",")] if steps.strip() else []
        given = [int(part) if part.isdecimal() else part for part in given]
    if not given:
        return None
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    if not whole or len(given) > 2 or not 1 <= given[0] <= given[-1]:
        raise ValueError(
            f"profile_steps={steps!r} is no range of steps: give the first and the "
            "last, as in --config.profile_steps=10,13, counted from 1."
        )
    return given[0], given[-1]
