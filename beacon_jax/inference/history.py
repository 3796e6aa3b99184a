"""Records what a row of a memory has read, and what its slots stand for.

The device holds keys, values and counts (`core.memory.MemoryState`). It does not know
which source tokens a slot stands for, nor the tokens of closed windows. The host keeps
these.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.plan import ahead


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """The history of one row. A value: every change returns a new one.

    The counts `slots`, `raw` and `windows` are lengths of its arrays. They are those of
    the row's `MemoryState`, because both are made of the same windows.

    Attributes:
      spans: source tokens [start, end) of each closed slot. A beacon sees everything
        in front of it; its span is the tokens between it and the beacon before.
      ratios: tokens per slot as compressed, 0 for a raw entry that was kept.
      marks: (tokens, slots) behind each closed window, the first row (0, 0). A memory
        can be cut at them.
      fed: tokens that the device has seen.
      tokens: ids of everything fed and of what is still to be fed behind it (after
        `cut` inside a window); None: not kept.
      ratio: of the window begun last. While none is open, the device has that of the
        next one in its place.
    """

    spans: Int[np.ndarray, "M 2"]
    ratios: Int[np.ndarray, " M"]
    marks: Int[np.ndarray, "P 2"]
    fed: int
    tokens: Int[np.ndarray, " n"] | None
    ratio: int = 0

    @classmethod
    def empty(cls) -> "History":
        """Makes the history of a row that has read nothing."""
        none = np.zeros(0, np.int32)
        return cls(none.reshape(0, 2), none, np.zeros((1, 2), np.int32), 0, none)

    @property
    def slots(self) -> int:
        """Closed slots, sinks among them."""
        return len(self.spans)

    @property
    def start(self) -> int:
        """First token of the open window, where the last closed one ends."""
        return int(self.marks[-1, 0])

    @property
    def raw(self) -> int:
        """Tokens in the open window."""
        return self.fed - self.start

    @property
    def opened(self) -> int | None:
        """Ratio of the open window; None: no window is open."""
        return self.ratio if self.raw else None

    @property
    def windows(self) -> int:
        """Windows closed so far."""
        return len(self.marks) - 1

    @property
    def pending(self) -> Int[np.ndarray, " n"]:
        """Tokens that are part of the row but not fed yet."""
        kept = np.zeros(0, np.int32) if self.tokens is None else self.tokens
        return kept[self.fed :]

    @property
    def length(self) -> int:
        """Tokens of the row, pending ones included."""
        return self.fed + len(self.pending)

    def ahead(self, plan: Int[np.ndarray, " P"], count: int) -> Int[np.ndarray, " n"]:
        """Returns the ratios of the next `count` windows, the open one first.

        Args:
          plan: ratio of each window of the row by its number, the last one going on. A
            window that is open keeps the ratio it was begun with.
        """
        return ahead(plan, self.windows, count, self.opened)

    def feed(
        self,
        law: Law,
        plan: Int[np.ndarray, " P"],
        tokens: Int[np.ndarray, " n"],
        *,
        keep: Mapping[int, Int[np.ndarray, " k"]] | None = None,
    ) -> "History":
        """Returns the history after feeding `tokens`, which begin with what is pending.

        Args:
          plan: ratio of each window of the row by its number, the last one going on.
          keep: raw tokens of a window, by its number, that stay beside its beacons.
        """
        pending, kept = self.pending, self.tokens
        assert np.array_equal(tokens[: len(pending)], pending)
        if kept is not None:
            kept = np.concatenate([kept[: self.fed], np.asarray(tokens, np.int32)])
        fed = self.fed + len(tokens)
        begun = self.ahead(plan, -(-(fed - self.start) // law.window))
        spans, ratios, marks = [self.spans], [self.ratios], [self.marks]
        start, slots = self.start, self.slots
        for i, ratio in enumerate(begun[: (fed - start) // law.window].tolist()):
            raw = (keep or {}).get(self.windows + i, ())
            new, each = law.source(ratio, kept_window(law, ratio, raw, slots))
            spans.append(new + np.int32(start))
            ratios.append(each)
            start, slots = start + law.window, slots + len(new)
            marks.append(np.array([[start, slots]], np.int32))
        ratio = int(begun[-1]) if len(begun) else self.ratio
        joined = (np.concatenate(x) for x in (spans, ratios, marks))
        return History(*joined, fed=fed, tokens=kept, ratio=ratio)

    def close(self) -> "History":
        """Returns the history with each token of the open window a slot of its own."""
        if not self.raw:
            return self
        token = np.arange(self.start, self.fed, dtype=np.int32)
        mark = np.array([[self.fed, self.slots + self.raw]], np.int32)
        return dataclasses.replace(
            self,
            spans=np.concatenate([self.spans, np.stack([token, token + 1], axis=1)]),
            ratios=np.concatenate([self.ratios, np.zeros_like(token)]),
            marks=np.concatenate([self.marks, mark]),
        )

    def cut(self, tokens: int) -> "History":
        """Returns the history of the first `tokens` tokens.

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
        if (place := self.cut_place(tokens)) < tokens:
            raise ValueError(
                f"tokens={tokens} lies inside a window that is compressed, and the "
                f"tokens were not kept: truncate to {place}, where a window ends, or "
                "keep the tokens (save(..., tokens=True))."
            )
        if tokens >= self.start:
            return dataclasses.replace(self, fed=min(tokens, self.fed), tokens=kept)
        marks = self.marks[self.marks[:, 0] <= tokens]
        start, slots = marks[-1].tolist()
        spans, ratios = self.spans[:slots], self.ratios[:slots]
        return History(spans, ratios, marks, start, kept, self.ratio)

    def cut_place(self, tokens: int) -> int:
        """Finds the last place at or before `tokens` where the row can be cut.

        Without token ids it cannot be cut inside a window that was closed.
        """
        if self.tokens is not None or tokens >= self.start:
            return tokens
        ends = self.marks[:, 0]
        return int(ends[ends <= tokens][-1])

    def forget_tokens(self) -> "History":
        """Returns the history without token ids; none of them may be pending."""
        if len(self.pending):
            raise ValueError(
                f"tokens=False, but {len(self.pending)} tokens are still to be fed "
                "(after truncate): continue the memory first, or keep the tokens."
            )
        return dataclasses.replace(self, tokens=None)


def join(rows: Sequence[History]) -> History:
    """Joins histories without open windows; all count from the first one's start."""
    steps = [(row.fed, row.slots) for row in rows]
    before = np.cumsum([(0, 0), *steps], axis=0, dtype=np.int32)  # (tokens, slots)
    ids = [row.tokens for row in rows if row.tokens is not None]
    pairs = list(zip(rows, before, strict=False))
    return History(
        spans=np.concatenate([row.spans + start for row, (start, _) in pairs]),
        ratios=np.concatenate([row.ratios for row in rows]),
        marks=np.concatenate(
            [rows[0].marks[:1], *(row.marks[1:] + place for row, place in pairs)]
        ),
        fed=int(before[-1, 0]),
        tokens=np.concatenate(ids) if len(ids) == len(rows) else None,
        ratio=rows[-1].ratio,
    )


def kept_window(
    law: Law, ratio: int, offsets: Sequence[int] | Int[np.ndarray, " k"], slots: int
) -> Int[np.ndarray, " n"]:
    """Lists the entries of a full window that stay if some of its raw tokens do.

    Args:
      offsets: places of those tokens in the window.
      slots: in front of the window.

    Returns:
      Entries of the mixed window: sinks, then beacons and raw tokens as they lie.
    """
    entries = law.kept_entries(ratio, slots)
    if not ratio or not len(offsets):
        return entries
    sinks = len(entries) - int(law.kept(ratio, 1))
    raw = law.entries(ratio, np.unique(offsets))
    rest = np.sort(np.concatenate([entries[sinks:], raw]))
    return np.concatenate([entries[:sinks], rest])
