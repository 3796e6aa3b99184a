"""Where raw tokens and beacons stand in a window; shapes of arrays follow from it."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Layout:
    """`groups` times (`raw` raw tokens, then `beacons` beacons).

    interleave at ratio r: W/r groups of r + 1; append: 1 group of W + W/r; no beacons:
    1 group of W + 0; a decoded token: 1 group of 1 + 0, or 1 + 1 where a beacon is due.
    """

    groups: int
    raw: int
    beacons: int

    @classmethod
    def of_window(cls, window: int, ratio: int, placement: str) -> "Layout":
        """Makes the layout of a window of `window` raw tokens (ratio 0: no beacons)."""
        if ratio == 0:
            return cls(1, window, 0)
        if placement == "append":
            return cls(1, window, window // ratio)
        return cls(window // ratio, ratio, 1)

    @property
    def length(self) -> int:
        """T, raw tokens and beacons of the window."""
        return self.groups * (self.raw + self.beacons)

    @property
    def beacon_index(self) -> np.ndarray:
        """Entries of the mixed window that are beacons."""
        entries = np.arange(self.length).reshape(self.groups, -1)
        return entries[:, self.raw :].reshape(-1)

    @property
    def tokens_before(self) -> np.ndarray:
        """Raw tokens up to each entry, its own included.

        A beacon's are those that it may have read.
        """
        raw = np.arange(self.raw + self.beacons) < self.raw
        return np.cumsum(np.tile(raw, self.groups))

    def split(self, x):
        """Splits [B, T, ...] into raw rows [B, G*r, ...], beacon rows [B, G*b, ...]."""
        grouped = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:])
        parts = grouped[:, :, : self.raw], grouped[:, :, self.raw :]
        return tuple(p.reshape(p.shape[0], -1, *p.shape[3:]) for p in parts)

    def anchors(self, raw):
        """Takes the raw row in front of each beacon, one per group."""
        return raw[:, self.raw - 1 :: self.raw]

    def join(self, raw, beacon):
        """Joins what `split` has split."""
        parts = [
            x.reshape(x.shape[0], self.groups, -1, *x.shape[2:]) for x in (raw, beacon)
        ]
        mixed = jnp.concatenate(parts, axis=2)
        return mixed.reshape(mixed.shape[0], -1, *mixed.shape[3:])
