"""Keeps account of what the slots of one row stand for: index arithmetic on the host.

The device holds keys and values only. Which source tokens a slot stands for follows
from the ratios and the number of tokens fed, so the host keeps the account.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.plan import at
from beacon_jax.model.config import ModelConfig


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
        return self.slots + int(Law.of(config).entries(self.ratio, self.raw))

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
        law, pending = Law.of(config), self.pending
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
                ratio = int(at(plan, number))
            first_open = False
            if fed - start < law.window:
                break
            entries = law.kept_entries(ratio, slots)
            if keep and number in keep:
                entries = kept_window(law, ratio, keep[number], slots)
            new, each = law.source(ratio, entries)
            spans.append(new + np.int32(start))
            slots, start, number = slots + len(new), start + law.window, number + 1
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


def kept_window(
    law: Law, ratio: int, offsets: Int[np.ndarray, " k"], slots: int
) -> Int[np.ndarray, " n"]:
    """Lists the entries of a full window that stay if some of its raw tokens do.

    Args:
      offsets: places of those tokens in the window.
      slots: in front of the window.

    Returns:
      Entries of the mixed window: sinks, then beacons and raw tokens as they lie.
    """
    entries = law.kept_entries(ratio, slots)
    if not ratio:
        return entries
    sinks = len(entries) - int(law.kept(ratio, 1))
    raw = law.entries(ratio, np.unique(offsets))
    rest = np.sort(np.concatenate([entries[sinks:], raw]))
    return np.concatenate([entries[:sinks], rest])
