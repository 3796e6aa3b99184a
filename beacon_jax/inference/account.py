"""What a memory holds and what that is worth: the one account that all others show."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from beacon_jax.inference.ledger import Ledger
from beacon_jax.model.config import ModelConfig

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Account:
    """Of one row.

    The open window, the last tokens that do not fill a window yet, is held raw, with
    the beacons that stand among them: a short text takes more than its ratio says.

    Attributes:
      tokens: source tokens, those still to be fed included.
      slots: entries of closed windows, which never change again.
      open_tokens: raw tokens of the open window.
      entries: all that is held: slots, raw tokens and beacons of the open window.
      nbytes: of the entries, keys and values of all layers.
      ratios: planned for its windows, ascending, the open one included; 0: none.
      fed: tokens that the entries stand for.
    """

    tokens: int
    slots: int
    open_tokens: int
    entries: int
    nbytes: int
    ratios: tuple[int, ...]
    fed: int

    @classmethod
    def of(cls, config: ModelConfig, row: Ledger, slot_nbytes: int) -> "Account":
        """
        Args:
          slot_nbytes: bytes of one entry (`Memory.slot_nbytes`).
        """
        entries, starts = row.entries(config), row.marks[:-1, 1]
        # Sinks and entries that were kept have 0 beside the beacons' ratio.
        closed = np.maximum.reduceat(row.ratios, starts) if len(starts) else []
        planned = {int(r) for r in closed} | ({int(row.ratio)} if row.raw else set())
        return cls(
            tokens=row.length,
            slots=row.slots,
            open_tokens=row.raw,
            entries=entries,
            nbytes=entries * slot_nbytes,
            ratios=tuple(sorted(planned)),
            fed=row.fed,
        )

    @property
    def ratio(self) -> float:
        """Tokens per entry held, the open window included."""
        return self.fed / max(self.entries, 1)

    @property
    def planned(self) -> str:
        """The ratios that its windows are compressed by, in words."""
        return ratio_words(self.ratios)

    def worth(self) -> str:
        """The ratio as planned and as it is."""
        if not any(self.ratios):
            return self.planned
        held = f"x{self.ratio:.1f}"
        if self.open_tokens:
            return f"{self.planned} planned; {held} with the open window"
        if held == f"{self.planned}.0":
            return self.planned
        return f"{self.planned} planned; {held} held"

    def holds(self) -> str:
        """Slots, open window and bytes."""
        text = f"{self.slots:,} memory slots + {self.open_tokens:,} in the open window"
        if beacons := self.entries - self.slots - self.open_tokens:
            text += f" with {beacons:,} beacon{'s' if beacons > 1 else ''}"
        return f"{text} ({self.nbytes / MIB:,.3f} MiB)"


def ratio_words(ratios: Sequence[int]) -> str:
    """ "x8", "uncompressed" or "mix of x2, x4 and x8"."""
    words = [f"x{r}" if r else "uncompressed" for r in ratios] or ["uncompressed"]
    if len(words) == 1:
        return words[0]
    return f"mix of {', '.join(words[:-1])} and {words[-1]}"
