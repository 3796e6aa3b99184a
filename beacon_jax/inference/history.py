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
      marks: (tokens, slots) behind each closed window, or piece that a compressor
        closed, the first row (0, 0). A memory can be cut at them.
      fed: tokens that the device has seen.
      tokens: ids of everything fed and of what is still to be fed behind it (after
        `cut` inside a window); None: not kept.
      ratio: of the window begun last. While none is open, the device has that of the
        next one in its place.
      recent: whether the row keeps its last full window raw (`core.recent`).
      own: ratio at which the window that lies raw is run again; None: none lies so.
      fixed: windows in front that are never run again, because they were mounted.
    """

    spans: Int[np.ndarray, "M 2"]
    ratios: Int[np.ndarray, " M"]
    marks: Int[np.ndarray, "P 2"]
    fed: int
    tokens: Int[np.ndarray, " n"] | None
    ratio: int = 0
    recent: bool = False
    own: int | None = None
    fixed: int = 0

    @classmethod
    def empty(cls, recent: bool = False) -> "History":
        """Makes the history of a row that has read nothing."""
        none, mark = np.zeros(0, np.int32), np.zeros((1, 2), np.int32)
        return cls(none.reshape(0, 2), none, mark, 0, none, recent=recent)

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

    @property
    def last(self) -> int | None:
        """The last token of the row; None: there is none, or ids were not kept."""
        kept = self.tokens
        return int(kept[-1]) if kept is not None and len(kept) else None

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
        ratio = int(begun[-1]) if len(begun) else self.ratio
        before, own = self, self.own
        closing = begun[: (fed - self.start) // law.window].copy()
        if self.recent and len(closing):
            assert not keep
            if own is not None:
                before = self._without_last()
                closing = np.append([own], closing).astype(np.int32)
            own = int(closing[-1])
            closing[-1] = 0
        spans, ratios, marks = [before.spans], [before.ratios], [before.marks]
        start, slots = before.start, before.slots
        for i, each in enumerate(closing.tolist()):
            raw = (keep or {}).get(before.windows + i, ())
            new, kept_ratios = law.source(each, kept_window(law, each, raw, slots))
            spans.append(new + np.int32(start))
            ratios.append(kept_ratios)
            start, slots = start + law.window, slots + len(new)
            marks.append(np.array([[start, slots]], np.int32))
        joined = (np.concatenate(x) for x in (spans, ratios, marks))
        of_row = {"recent": self.recent, "own": own, "fixed": self.fixed}
        return History(*joined, fed=fed, tokens=kept, ratio=ratio, **of_row)

    def _without_last(self) -> "History":
        """Returns the history with the last closed window as if it were open."""
        slots = int(self.marks[-2, 1])
        return dataclasses.replace(
            self,
            spans=self.spans[:slots],
            ratios=self.ratios[:slots],
            marks=self.marks[:-1],
        )

    def evenly(
        self,
        slots: int,
        tokens: Int[np.ndarray, " n"] | Sequence[int] = (),
        *,
        anew: bool = True,
    ) -> "History":
        """Returns the history behind `tokens` more, with `slots` slots, none open.

        Layers and heads may have kept different tokens, so the text that the new slots
        are of is divided evenly among them: that of the open window and `tokens`.

        Args:
          anew: all slots are new, of the whole text.
        """
        first, had = (0, 0) if anew else (self.start, self.slots)
        end = self.fed + len(tokens)
        edges = np.linspace(first, end, slots - had + 1).astype(np.int32)
        spans = np.stack([edges[:-1], edges[1:]], axis=1)
        marks, kept = self.marks[:1] if anew else self.marks, self.tokens
        if kept is not None:
            new = np.asarray(tokens, np.int32)
            kept = np.concatenate([kept[: self.fed], new])
        zeros = np.zeros(len(spans), np.int32)
        return dataclasses.replace(
            self,
            spans=np.concatenate([self.spans[:had], spans]),
            ratios=np.concatenate([self.ratios[:had], zeros]),
            marks=np.concatenate([marks, np.array([[end, slots]], np.int32)]),
            fed=end,
            tokens=kept,
            ratio=0,
        )

    def thinned(self, first: int, count: int) -> "History":
        """Returns the history where one of two slots stays (`core.move.thin`).

        It stands for the text of both. The row can be cut no more at windows that ended
        among them.
        """
        end = first + 2 * count
        pairs, ratios = self.spans[first:end], np.maximum(self.ratios[first:end], 1)
        spans = np.stack([pairs[::2, 0], pairs[1::2, 1]], axis=1)
        after = self.marks[self.marks[:, 1] >= end] - np.array([0, count], np.int32)
        before = self.marks[self.marks[:, 1] <= first]
        return dataclasses.replace(
            self,
            spans=np.concatenate([self.spans[:first], spans, self.spans[end:]]),
            ratios=np.concatenate(
                [self.ratios[:first], ratios[::2] + ratios[1::2], self.ratios[end:]]
            ),
            marks=np.concatenate([before, after]).astype(np.int32),
        )

    def close(self) -> "History":
        """Returns the history with each token of the open window a slot of its own.

        No window of it is run again.
        """
        if not self.raw:
            return dataclasses.replace(self, own=None, fixed=self.windows)
        token = np.arange(self.start, self.fed, dtype=np.int32)
        mark = np.array([[self.fed, self.slots + self.raw]], np.int32)
        return dataclasses.replace(
            self,
            spans=np.concatenate([self.spans, np.stack([token, token + 1], axis=1)]),
            ratios=np.concatenate([self.ratios, np.zeros_like(token)]),
            marks=np.concatenate([self.marks, mark]),
            own=None,
            fixed=self.windows + 1,
        )

    def cut(self, tokens: int) -> "History":
        """Returns the history of the first `tokens` tokens.

        Windows that end there or before stay, and so does the front of the open window.
        Tokens of a window that was closed become pending. If the row keeps its last
        full window raw, so do those of the one that is the last then.

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
        windows = self._windows_left(tokens)
        if windows == self.windows:
            return dataclasses.replace(self, fed=min(tokens, self.fed), tokens=kept)
        marks = self.marks[: windows + 1]
        start, slots = marks[-1].tolist()
        return dataclasses.replace(
            self,
            spans=self.spans[:slots],
            ratios=self.ratios[:slots],
            marks=marks,
            fed=start,
            tokens=kept,
            own=None,
            fixed=min(self.fixed, windows),
        )

    def _windows_left(self, tokens: int) -> int:
        """Counts the closed windows that stay if the row is cut at `tokens`."""
        ends = self.marks[1:, 0]
        count = int((ends <= tokens).sum())
        if not self.recent or count <= self.fixed:
            return count
        if count == self.windows:
            # Behind an earlier cut none lies raw, and the last one may be pending.
            behind = tokens - self.start >= self.marks[-1, 0] - self.marks[-2, 0]
            return count if self.own is not None or behind else count - 1
        return count - 1

    def cut_place(self, tokens: int) -> int:
        """Finds the last place at or before `tokens` where the row can be cut.

        Without token ids it cannot be cut inside a window that was closed, nor where
        one would have to be run again.
        """
        if self.tokens is not None or tokens >= self.start:
            return tokens
        ends = self.marks[: self.fixed + 1 if self.recent else None, 0]
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
    """Joins histories that are closed; all count from the first one's start."""
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
        recent=rows[0].recent,
        fixed=sum(row.windows for row in rows),
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
