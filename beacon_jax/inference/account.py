"""The account of what a memory holds and what that is worth; every report shows it."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from beacon_jax.inference.history import History

MIB = 2**20
ID_NBYTES = 4  # of a token id on the device


@dataclasses.dataclass(frozen=True)
class Account:
    """The account of one row of a memory.

    The open window holds the last tokens, which do not fill a window yet. It is held
    raw, with the beacons that stand among its tokens. So a short text takes more than
    its ratio says.

    Attributes:
      tokens: source tokens, those still to be fed included.
      slots: entries of closed windows, which never change again.
      open_tokens: raw tokens of the open window.
      entries: all that is held: slots, raw tokens and beacons of the open window.
      nbytes: bytes of the entries: keys and values of all layers. If the last full
        window lies raw among the slots, those of its ids, too.
      ratios: ratios planned for the row's windows, ascending, the open one included;
        0: uncompressed.
      fed: tokens that the entries stand for.
      recent: slots that are the raw entries of the last full window.
    """

    tokens: int
    slots: int
    open_tokens: int
    entries: int
    nbytes: int
    ratios: tuple[int, ...]
    fed: int
    recent: int = 0

    @classmethod
    def of(cls, row: History, entries: int, slot_nbytes: int) -> "Account":
        """Makes the account of a row.

        Args:
          entries: that the row holds (`Memory.entries`).
          slot_nbytes: bytes of one entry (`Memory.slot_nbytes`).
        """
        starts = row.marks[:-1, 1]
        # Sinks and entries that were kept have 0 beside the beacons' ratio.
        closed = np.maximum.reduceat(row.ratios, starts) if len(starts) else []
        # A compressor's slots all have 0: the ratio is that of what it left of a piece.
        tokens, slots = np.diff(row.marks, axis=0).T
        left = np.rint(tokens / np.maximum(slots, 1)).astype(int)
        left = np.where(np.asarray(closed, int) == 0, left, 1)
        closed = np.where(left > 1, left, closed)
        raw = 0 if row.own is None else row.slots - int(starts[-1])
        closed = closed[:-1] if raw else closed
        # Behind what a compressor left, an open window says nothing.
        opened = None if (left > 1).any() and not row.opened else row.opened
        planned = {*map(int, closed), row.own, opened}
        return cls(
            tokens=row.length,
            slots=row.slots,
            open_tokens=row.raw,
            entries=entries,
            nbytes=entries * slot_nbytes + raw * ID_NBYTES,
            ratios=tuple(sorted(r for r in planned if r is not None)),
            fed=row.fed,
            recent=raw,
        )

    @property
    def ratio(self) -> float:
        """Tokens per entry held, the open window included."""
        return self.fed / max(self.entries, 1)

    @property
    def planned(self) -> str:
        """The ratios that the row's windows are compressed by, in words."""
        return ratio_words(self.ratios)

    def worth(self) -> str:
        """Says which ratio was planned and, where it differs, what the row has now."""
        if not any(self.ratios):
            return self.planned
        held = f"x{self.ratio:.1f}"
        if self.open_tokens:
            return f"{self.planned} planned; {held} with the open window"
        if held == f"{self.planned}.0":
            return self.planned
        return f"{self.planned} planned; {held} held"

    def holds(self) -> str:
        """Says how many slots, open tokens and bytes the row holds."""
        slots = f"{self.slots:,} memory slots"
        if self.recent:
            slots += f" (the last {self.recent:,} raw)"
        text = f"{slots} + {self.open_tokens:,} in the open window"
        if beacons := self.entries - self.slots - self.open_tokens:
            text += f" with {beacons:,} beacon{'s' if beacons > 1 else ''}"
        return f"{text} ({self.nbytes / MIB:,.3f} MiB)"


def ratio_words(ratios: Sequence[int]) -> str:
    """Names ratios: "x8", "uncompressed" or "mix of x2, x4 and x8"."""
    words = [f"x{r}" if r else "uncompressed" for r in ratios] or ["uncompressed"]
    if len(words) == 1:
        return words[0]
    return f"mix of {', '.join(words[:-1])} and {words[-1]}"
