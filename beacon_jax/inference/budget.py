"""Finds the ratios that a number of slots or bytes buys."""

import bisect
import dataclasses

import numpy as np
from jaxtyping import Int

from beacon_jax.inference.row import Row
from beacon_jax.inference.validate import parse_bytes, warn, whole
from beacon_jax.model.config import divisors


@dataclasses.dataclass(frozen=True)
class Budget:
    """The slots that a row may take, and the argument that allows them.

    Attributes:
      slots: how many are allowed.
      name: the argument, with the value that was given.
      nbytes: bytes of a slot, if the argument is `max_bytes`.
      ids: bytes of the ids besides.
    """

    slots: int
    name: str
    nbytes: int | None = None
    ids: int = 0

    @classmethod
    def read(
        cls,
        max_slots: int | None,
        max_bytes: int | str | None,
        slot_nbytes: int | None = None,
        id_nbytes: int = 0,
    ) -> "Budget | None":
        """Returns the smaller of the budgets that are given; None: there is none.

        Args:
          max_slots: a number of slots.
          max_bytes: the same as bytes of keys and values: a number or "512MiB".
          slot_nbytes: bytes of one slot (`Memory.slot_nbytes`), for `max_bytes`.
          id_nbytes: bytes of the ids that a row keeps of its last full window.
        """
        found = []
        if max_slots is not None:
            whole("max_slots", max_slots, 1, "give a number of slots, from 1 on")
            found.append(cls(max_slots, f"max_slots={max_slots}"))
        if max_bytes is not None:
            if not slot_nbytes:
                raise ValueError(f"max_bytes={max_bytes!r} needs slot_nbytes.")
            slots = max(parse_bytes(max_bytes) - id_nbytes, 0) // slot_nbytes
            name = f"max_bytes={max_bytes!r}"
            found.append(cls(slots, name, slot_nbytes, id_nbytes))
        return min(found, key=lambda budget: budget.slots, default=None)

    def enough(self, slots: int) -> str:
        """Names the argument, with a value that allows for `slots`."""
        if self.nbytes is None:
            return f"max_slots={slots}"
        nbytes = slots * self.nbytes + self.ids
        return f"max_bytes={nbytes} ({slots} slots, {nbytes / 2**20:.3f} MiB)"


def spend(row: Row, budget: Budget) -> tuple[Int[np.ndarray, " n"], str]:
    """Returns the ratios that a budget buys, and a note that names them."""
    beacon = row.config.beacon
    trained = sorted({r for r in beacon.ratios if r}) if beacon else []
    larger = [r for r in divisors(row.window) if r > max(trained, default=0)]
    ladder = trained + larger if beacon else [0]
    held = lambda wished: row.held(row.applied(wished))
    fits = (i for i, r in enumerate(ladder) if held(row.uniform(r)) <= budget.slots)
    step = next(fits, None)
    if step is None:
        raise ValueError(
            _too_small(row, budget, ladder[-1], held(row.uniform(ladder[-1])))
        )
    ratio = ladder[step]
    if trained and ratio > trained[-1]:
        enough = budget.enough(held(row.uniform(trained[-1])))
        said = f"no trained ratio of {', '.join(map(str, trained))} fits, "
        said += f"x{ratio} is used, expect worse text."
        warn(
            f"{budget.name}: {said} {enough} allows x{trained[-1]}.",
            f"--{budget.name}: {said} --{enough} allows x{trained[-1]}.",
        )
    bytes_too = f" ({budget.name})" if budget.nbytes else ""
    note = f"budget of {budget.slots:,} slots{bytes_too}: "
    note += f"x{ratio}" if ratio else "uncompressed"
    if step == 0:
        return row.uniform(ratio), note
    latest = np.flatnonzero(row.free())[::-1]

    def with_latest(count: int) -> Int[np.ndarray, " n"]:
        wished = row.uniform(ratio)
        wished[latest[:count]] = ladder[step - 1]
        return wished

    # Every step down costs slots, so the largest number that fits can be bisected.
    counts, cost = range(len(latest) + 1), lambda count: held(with_latest(count))
    most = bisect.bisect_right(counts, budget.slots, key=cost) - 1
    if most:
        which = "the last window" if most == 1 else f"the last {most} windows"
        note += f", {which} x{ladder[step - 1]}"
    return with_latest(most), note


def _too_small(row: Row, budget: Budget, ratio: int, needed: int) -> str:
    parts = [f"x{ratio} is the largest ratio"]
    if not row.config.beacon:
        parts = ["the model has no beacons and cannot compress"]
    if row.before.slots:
        parts.append(f"the memory has {row.before.slots} slots already")
    if row.before.recent and (row.full or row.before.own is not None):
        parts.append(f"the last full window is kept raw, {row.window} slots")
    if row.lossless.any():
        count = int(row.lossless.sum())
        parts.append(f"{count} lossless windows take {count * row.window}")
    if row.offsets:
        parts.append(f"{sum(map(len, row.offsets.values()))} lossless tokens one each")
    what = f" ({budget.slots} slots)" if budget.nbytes else ""
    return (
        f"{budget.name}{what} is too small for this text: the smallest that works is "
        f"{budget.enough(needed)} ({'; '.join(parts)})."
    )
