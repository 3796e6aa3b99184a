"""The slot law: what a window's ratio leaves in the memory, written once.

A window of W raw tokens at ratio r gets W / r beacons. While it is open, its entries
are the raw tokens and the beacons among them. When it is full, its beacons become
slots of the memory and the rest goes; behind an empty memory the first `sink` entries
stay, too. At ratio 0 there are no beacons, and every token becomes a slot. (Sections
3.1 and 3.2 of the paper; docs/specification.md section 2.)

Every method takes numbers, numpy arrays or jax arrays, traced or not, and broadcasts
them. What comes out is an array of the same library.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.model.config import ModelConfig

PLAIN_WINDOW = 512  # most tokens that a model without beacons is fed at a time


def default_window(config: ModelConfig) -> int:
    """Returns W of the beacons; a plain model is fed in windows of up to 512."""
    if config.beacon:
        return config.beacon.window
    return min(PLAIN_WINDOW, config.max_position)


@dataclasses.dataclass(frozen=True)
class Law:
    """The law of one model.

    Attributes:
      window: W, raw tokens of a full window.
      sink: entries that stay in front of the first compressed window.
      placement: "interleave": a beacon behind every r tokens; "append": all beacons
        behind the last token of a full window.
    """

    window: int
    sink: int = 0
    placement: str = "interleave"

    @classmethod
    def of(cls, config: ModelConfig, window: int | None = None) -> "Law":
        """Makes the law of a model; `window` in place of its own."""
        window = window or default_window(config)
        beacon = config.beacon
        return cls(window, beacon.sink, beacon.placement) if beacon else cls(window)

    # --- an open window ---------------------------------------------------------

    def beacons(self, ratio: Any, raw: Any) -> Any:
        """Counts the beacons among the first `raw` tokens of a window."""
        xp = _library(ratio, raw)
        if self.placement == "append":
            raw = xp.where(raw == self.window, raw, 0)
        return xp.where(ratio > 0, raw // xp.maximum(ratio, 1), 0)

    def entries(self, ratio: Any, raw: Any) -> Any:
        """Counts the entries of a window that has `raw` tokens: they and their beacons.

        For raw < W this is also the entry that token number `raw` takes.
        """
        return raw + self.beacons(ratio, raw)

    def room(self, ratios: Iterable[int]) -> int:
        """Counts the entries that a window and its beacons need at any of the ratios.

        A buffer has as many behind its slots.
        """
        most = max((self.window // r for r in ratios if r > 0), default=0)
        return self.window + max(most, self.sink)

    # --- a window that closes ---------------------------------------------------

    def kept(self, ratio: Any, slots: Any) -> Any:
        """Counts the slots that a full window leaves behind `slots` of them."""
        xp = _library(ratio, slots)
        beacons = self.window // xp.maximum(ratio, 1)
        beacons = beacons + xp.where(slots == 0, self.sink, 0)
        return xp.where(ratio > 0, beacons, self.window)

    def after(self, ratios: Any, slots: int = 0) -> Int[np.ndarray, " n1"]:
        """Counts the slots in front of each of n full windows, and behind the last.

        Args:
          ratios: of the windows, [n].
          slots: in front of the first.
        """
        ratios = np.asarray(ratios, np.int64).reshape(-1)
        added = self.kept(ratios, 1)
        added[:1] = self.kept(ratios[:1], slots)
        return slots + np.append(0, np.cumsum(added))

    def closed(self, ratio: int, windows: int) -> int:
        """Counts the slots of `windows` full windows at one ratio."""
        if windows < 1:
            return 0
        return int(self.kept(ratio, 0) + (windows - 1) * self.kept(ratio, 1))

    def place(self, ratio: Any, slots: Any, new: Any) -> Any:
        """Finds the entry of a full window that becomes its new slot number `new`.

        Numbers that the window does not leave (`kept`) get the last beacon's.
        """
        xp = _library(ratio, slots, new)
        sink = xp.where(slots == 0, self.sink, 0)
        per = xp.maximum(ratio, 1)
        nth = xp.clip(new - sink, 0, self.window // per - 1)
        beacon = (nth + 1) * (per + 1) - 1
        if self.placement == "append":
            beacon = self.window + nth
        return xp.where((ratio == 0) | (new < sink), new, beacon)

    def slot_of(self, ratio: Any, slots: Any, token: Any) -> Any:
        """Finds the slot that stands for a token of a window that closes.

        A sink stands for itself, a beacon for the rest of its unit.

        Args:
          slots: in front of the window.
          token: its number in the window.
        """
        xp = _library(ratio, slots, token)
        sink, entry = xp.where(slots == 0, self.sink, 0), self.entries(ratio, token)
        unit = sink + token // xp.maximum(ratio, 1)
        return slots + xp.where((ratio == 0) | (entry < sink), entry, unit)

    def kept_entries(self, ratio: int, slots: int = 0) -> Int[np.ndarray, " n"]:
        """Lists the entries of a full window that become slots, [sink | beacons]."""
        return self.place(ratio, slots, np.arange(self.kept(ratio, slots)))

    def source(
        self, ratio: int, entry: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
        """Finds the tokens that entries of a window stand for.

        A beacon sees everything in front of it. It stands for the tokens between it
        and the beacon before.

        Returns:
          The tokens [start, end), counted from the window's first, and how many raw
          tokens make one slot: `ratio`, and 0 for a raw entry.
        """
        per = max(ratio, 1)
        if self.placement == "append" or not ratio:
            raw, token, nth = entry < self.window, entry, entry - self.window
        else:
            nth, at = np.divmod(entry, per + 1)
            raw, token = at < per, nth * per + at
        start = np.where(raw, token, nth * per)
        end = np.where(raw, token + 1, (nth + 1) * per)
        spans = np.stack([start, end], axis=1).astype(np.int32)
        return spans, np.where(raw, 0, ratio).astype(np.int32)


def _library(*numbers: Any) -> Any:
    """Returns jax.numpy if any of the numbers is an array of jax, else numpy."""
    return jnp if any(isinstance(x, jax.Array) for x in numbers) else np
