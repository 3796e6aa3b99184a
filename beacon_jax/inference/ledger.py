"""Keeps account of what the slots of one row stand for: index arithmetic on the host.

The device holds keys and values only. Which source tokens a slot stands for follows
from the ratios and the number of tokens fed, so the host keeps the account.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from beacon_jax.core.memory import default_window
from beacon_jax.core.windows import window_slots
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.layout import Layout


@dataclasses.dataclass(frozen=True, eq=False)
class Ledger:
    """The account of one row. A value: every change returns a new one.

    Attributes:
      spans: source tokens [start, end) of each closed slot. A beacon sees everything
        in front of it; its span is the tokens between it and the beacon before.
      ratios: tokens per slot as compressed, 0 for a raw entry that was kept.
      marks: (tokens, slots) behind each closed window, the first row (0, 0). A memory
        can be cut at them.
      fed: tokens that the device has seen.
      tokens: ids of everything fed and of what is still to be fed behind it (after
        `cut` inside a window); None: not kept.
      ratio: of the open window, or of the one begun last.
    """

    spans: Int[np.ndarray, "M 2"]
    ratios: Int[np.ndarray, " M"]
    marks: Int[np.ndarray, "P 2"]
    fed: int
    tokens: Int[np.ndarray, " n"] | None
    ratio: int = 0

    @classmethod
    def empty(cls, *, keep_tokens: bool = True) -> "Ledger":
        return cls(
            spans=np.zeros((0, 2), np.int32),
            ratios=np.zeros(0, np.int32),
            marks=np.zeros((1, 2), np.int32),
            fed=0,
            tokens=np.zeros(0, np.int32) if keep_tokens else None,
        )

    @property
    def slots(self) -> int:
        """Closed slots, sinks among them."""
        return len(self.spans)

    @property
    def raw(self) -> int:
        """Tokens in the open window."""
        return self.fed - int(self.marks[-1, 0])

    def entries(self, config: ModelConfig) -> int:
        """Entries in use: slots, raw tokens of the open window and their beacons."""
        append = config.beacon and config.beacon.placement == "append"
        beacons = self.raw // self.ratio if self.ratio and not append else 0
        return self.slots + self.raw + beacons

    @property
    def windows(self) -> int:
        return len(self.marks) - 1

    @property
    def pending(self) -> Int[np.ndarray, " n"]:
        """Tokens that are part of the row but not fed yet."""
        if self.tokens is None:
            return np.zeros(0, np.int32)
        return self.tokens[self.fed :]

    @property
    def length(self) -> int:
        """Tokens of the row, pending ones included."""
        return self.fed + len(self.pending)

    def feed(
        self,
        config: ModelConfig,
        plan: Int[np.ndarray, " P"],
        tokens: Int[np.ndarray, " n"],
        *,
        keep: Mapping[int, Int[np.ndarray, " k"]] | None = None,
    ) -> "Ledger":
        """Returns the account after feeding `tokens`, which begin with what is pending.

        Args:
          plan: ratio of each window of the row by its number, the last one going on.
          keep: raw tokens of a window, by its number, that stay beside its beacons.
        """
        w, pending = default_window(config), self.pending
        assert np.array_equal(tokens[: len(pending)], pending)
        kept = self.tokens
        if kept is not None:
            kept = np.concatenate([kept[: self.fed], np.asarray(tokens, np.int32)])
        fed, ratio = self.fed + len(tokens), self.ratio
        start, slots = (int(x) for x in self.marks[-1])
        first_open = self.raw > 0
        spans, ratios, marks = [self.spans], [self.ratios], [self.marks]
        number = self.windows
        while start < fed:
            if not first_open:
                ratio = int(plan[min(number, len(plan) - 1)])
            first_open = False
            if fed - start < w:
                break
            if keep and number in keep:
                at = keep[number]
                _, new, each = kept_window(config, ratio, at, first=slots == 0)
                new = new + np.int32(start)
            else:
                new, each = closed_window(config, ratio, start, first=slots == 0)
            slots, start, number = slots + len(new), start + w, number + 1
            spans.append(new)
            ratios.append(each)
            marks.append(np.array([[start, slots]], np.int32))
        joined = (np.concatenate(x) for x in (spans, ratios, marks))
        return Ledger(*joined, fed=fed, tokens=kept, ratio=ratio)

    def closed(
        self, spans: Int[np.ndarray, "n 2"], ratios: Int[np.ndarray, " n"]
    ) -> "Ledger":
        """Closes the open window with these slots instead of those of its ratio.

        Args:
          spans: source tokens of each slot, counted from the row's first.
        """
        slots = self.slots + len(spans)
        return dataclasses.replace(
            self,
            spans=np.concatenate([self.spans, spans.astype(np.int32)]),
            ratios=np.concatenate([self.ratios, ratios.astype(np.int32)]),
            marks=np.concatenate([self.marks, np.array([[self.fed, slots]], np.int32)]),
        )

    def cut(self, tokens: int) -> "Ledger":
        """Returns the account of the first `tokens` tokens.

        Windows that end there or before stay, and so does the front of the open window.
        Tokens of a window that was closed become pending.

        Raises:
          ValueError: more tokens than there are, or tokens that were not kept.
        """
        if not 0 <= tokens <= self.length:
            raise ValueError(
                f"tokens={tokens} must be between 0 and the {self.length} that the "
                "memory holds."
            )
        kept = None if self.tokens is None else self.tokens[:tokens]
        if tokens >= self.marks[-1, 0]:
            return dataclasses.replace(self, fed=min(tokens, self.fed), tokens=kept)
        whole = int(np.flatnonzero(self.marks[:, 0] <= tokens)[-1])
        start, slots = (int(x) for x in self.marks[whole])
        if kept is None and tokens > start:
            raise ValueError(
                f"tokens={tokens} lies inside a window that is compressed, and the "
                f"tokens were not kept: truncate to {start}, where a window ends, or "
                "keep the tokens (save(..., tokens=True))."
            )
        return Ledger(
            spans=self.spans[:slots],
            ratios=self.ratios[:slots],
            marks=self.marks[: whole + 1],
            fed=start,
            tokens=kept,
            ratio=self.ratio,
        )

    def forget_tokens(self) -> "Ledger":
        """Returns the account without token ids; none of them may be pending."""
        if len(self.pending):
            raise ValueError(
                f"tokens=False, but {len(self.pending)} tokens are still to be fed "
                "(after truncate): continue the memory first, or keep the tokens."
            )
        return dataclasses.replace(self, tokens=None)


def closed_window(
    config: ModelConfig, ratio: int, start: int, *, first: bool
) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Returns the spans and ratios of the slots that a full window leaves.

    See docs/specification.md section 2.

    Args:
      start: the window's first token.
      first: nothing is in front of the window, so that sinks stay.
    """
    w = default_window(config)
    edges = np.arange(0, w + 1, ratio or 1, dtype=np.int32)
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    ratios = np.full(len(spans), ratio, np.int32)
    sink = config.beacon.sink if config.beacon else 0
    if ratio and first and sink:
        # Copies of the first mixed entries: raw tokens and, if interleaved, beacons.
        entry = np.arange(sink)
        group, raw, token = entry, np.ones(sink, bool), entry
        if config.beacon and config.beacon.placement == "interleave":
            group, at = np.divmod(entry, ratio + 1)
            raw, token = at < ratio, group * ratio + at
        kept = np.where(
            raw[:, None],
            np.stack([token, token + 1], axis=1),
            spans[np.minimum(group, len(spans) - 1)],
        )
        spans = np.concatenate([kept.astype(np.int32), spans])
        ratios = np.concatenate([np.where(raw, 0, ratio).astype(np.int32), ratios])
    assert len(spans) == window_slots(config, ratio, first=first, window=w)
    return spans + np.int32(start), ratios


def kept_window(
    config: ModelConfig, ratio: int, offsets: Int[np.ndarray, " k"], *, first: bool
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, "n 2"], Int[np.ndarray, " n"]]:
    """Returns what a full window leaves if some raw tokens stay beside its beacons.

    Args:
      offsets: places of those tokens in the window.

    Returns:
      For each slot: its entry of the mixed window, its source tokens counted from the
      window's first, and its ratio. Entries keep their order, behind the sinks.
    """
    w, sink = (
        default_window(config),
        config.beacon.sink if config.beacon and first else 0,
    )
    spans, ratios = closed_window(config, ratio, 0, first=first)
    if not ratio:
        return np.arange(w), spans, ratios
    placement = config.beacon.placement if config.beacon else "interleave"
    beacons = Layout.of_window(w, ratio, placement).beacon_index
    raw = np.unique(offsets)
    entry = raw + raw // ratio if placement == "interleave" else raw
    place = np.concatenate([beacons, entry])
    spans = np.concatenate([spans, np.stack([raw, raw + 1], axis=1)])
    ratios = np.concatenate([ratios, np.zeros(len(raw), ratios.dtype)])
    order = np.concatenate([np.arange(sink), sink + np.argsort(place, kind="stable")])
    place = np.concatenate([np.arange(sink), place])
    return place[order], spans[order].astype(np.int32), ratios[order].astype(np.int32)
