"""Compiles the update of a run, and counts the steps that devices still work on."""

import time
from collections import deque
from typing import Any

import jax

SLOW_STEP = 1.0  # seconds


class Programs:
    """The compiled update, one program for each shape of the batches.

    Args:
      update: jitted: (state, frozen, batch, plans) -> (state, values).
    """

    def __init__(self, update: Any):
        self._update = update
        self._made: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self._made)

    def prepare(self, state, frozen, batch, plans) -> float:
        """Compiles what these arguments need; returns the seconds that it took.

        They are 0.0 if the program is there already.
        """
        key = _shapes(batch, plans)
        if key in self._made:
            return 0.0
        began = time.perf_counter()
        self._made[key] = self._update.lower(state, frozen, batch, plans).compile()
        return time.perf_counter() - began

    def __call__(self, state, frozen, batch, plans) -> Any:
        """Runs the program that `prepare` has compiled for these shapes."""
        return self._made[_shapes(batch, plans)](state, frozen, batch, plans)


def _shapes(batch: dict[str, jax.Array], plans: jax.Array) -> Any:
    return plans.shape, *((name, x.shape) for name, x in sorted(batch.items()))


class Flight:
    """Steps that were started and may not have ended.

    There are two at most, so that a signal is answered soon and the devices do not wait
    for the host. If steps take more than a second there is one: a moment of waiting is
    nothing then.

    Attributes:
      in_a_row, skipped: counts of updates that were not finite, the last ones of the
        steps that have ended, and all of them.
    """

    def __init__(self, skipped: tuple[int, int]):
        self.in_a_row, self.skipped = skipped
        self._started: deque[dict[str, Any]] = deque()
        self._slow, self._landed = False, time.perf_counter()

    def add(self, values: dict[str, Any]) -> None:
        """Takes in what the update of a step returned."""
        self._started.append(values)

    def land(self, *, all_of_them: bool) -> None:
        """Waits for the steps before the last one, or for all of them."""
        while len(self._started) > (0 if all_of_them or self._slow else 1):
            values = self._started.popleft()
            self.in_a_row = int(values["nonfinite_in_a_row"])
            self.skipped = int(values["nonfinite"])
            now = time.perf_counter()
            self._slow, self._landed = now - self._landed > SLOW_STEP, now
