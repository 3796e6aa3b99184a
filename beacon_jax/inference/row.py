"""Counts slots, positions and FLOPs of the next windows of one row at given ratios."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from beacon_jax import flops
from beacon_jax.core.law import Law
from beacon_jax.inference.history import History
from beacon_jax.inference.spans import marked_tokens
from beacon_jax.inference.validate import LOSSLESS, one_of
from beacon_jax.model.config import ModelConfig


class Row:
    """A row and its windows from the open one on, numbered 0 ... count - 1 here.

    Attributes:
      first: number of window 0 in the row.
      start: first token of window 0 in the row.
      text, total: tokens from there to the end of the text and of the new tokens.
      full: windows that the text fills.
      fixed: ratio of window 0 if it is open already, else None.
      lossless: windows that are not compressed, bool [count].
      offsets: window -> offsets of the raw entries kept beside its beacons.
      untrained: a compressor closes the windows of the text (`compressors`): those that
        it does not fill stay as they are, and an open one is closed with the others.
    """

    def __init__(
        self, config: ModelConfig, length: int, new: int, before: History | None
    ):
        if length < 0 or new < 0:
            raise ValueError(
                f"length={length}, new_tokens={new}: must not be negative."
            )
        self.config, self.law = config, Law.of(config)
        self.window = self.law.window
        self.before = before or History.empty()
        self.first, self.start = self.before.windows, self.before.start
        self.length = length
        self.text = self.before.length - self.start + length
        self.total = self.text + new
        self.count = max(-(-self.total // self.window), 1)
        self.fixed = self.before.opened
        self.full = self.text // self.window  # windows that the text fills
        self.lossless = np.zeros(self.count, bool)
        self.untrained = False
        self.offsets: dict[int, Int[np.ndarray, " k"]] = {}

    def with_spans(self, spans: Any, lossless: str) -> "Row":
        """Notes what the spans ask for (`plan.make_plan`); returns this row."""
        one_of("lossless", lossless, LOSSLESS)
        marked = np.flatnonzero(marked_tokens(spans, self.length))
        window, offset = np.divmod(marked + self.text - self.length, self.window)
        touched = np.unique(window)
        if lossless == "slots":
            # A window that the text does not fill closes later, when nobody knows the
            # spans any more: it is not compressed.
            closing = touched[touched < self.full]
            self.offsets = {
                int(i): offset[window == i].astype(np.int32) for i in closing
            }
            touched = touched[len(closing) :]
        if self.fixed and 0 in touched:
            raise ValueError(
                f"spans touch tokens {self.start} to {self.start + self.window} of the "
                f"row, a window that was begun at ratio {self.fixed}: start from "
                f"memory.truncate({self.start}) and give its tokens again."
            )
        self.lossless[touched] = True
        return self

    def uniform(self, ratio: int) -> Int[np.ndarray, " n"]:
        """Returns one ratio for all windows."""
        return np.full(self.count, ratio, np.int32)

    def applied(self, wished: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Returns the ratios wished for, with those of lossless and open windows."""
        ratios = np.where(self.lossless, 0, wished).astype(np.int32)
        if self.untrained:
            ratios[self.full :] = 0
        elif self.fixed is not None:
            ratios[0] = self.fixed
        return ratios

    def free(self) -> Bool[np.ndarray, " n"]:
        """Tells which windows may have another ratio than the others."""
        free = ~self.lossless
        if self.untrained:
            free[self.full :] = False
        else:
            free[0] &= self.fixed is None
        return free

    def raw(self, tokens: int) -> Int[np.ndarray, " n"]:
        """Counts the tokens in each window after `tokens` of them.

        They are int64, because FLOPs are large.
        """
        return np.clip(tokens - self.window * np.arange(self.count), 0, self.window)

    def steps(self, plan: Int[np.ndarray, " P"]) -> list[int]:
        """Lists the ratios of the windows that rows of a batch run together.

        Those are all windows of the text or, if the last full one stays raw, those in
        front of it, which may begin with one that is run again.
        """
        used = self.before.ahead(plan, -(-self.text // self.window)).tolist()
        if not self.before.recent:
            return used
        again = [] if self.before.own is None else [self.before.own]
        return (again + used[: self.full])[:-1] if self.full else []

    def slots(self, ratios: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n1"]:
        """Counts the slots in front of each window if all close, and behind the last.

        All of these windows are compressed (docs/specification.md section 2).
        """
        slots, own = self.before.slots, self.before.own
        if own is not None:
            slots -= self.window
            slots += int(self.law.kept(own, slots))
        slots = self.law.after(ratios, slots)
        for i, at in self.offsets.items():
            slots[i + 1 :] += len(at) if ratios[i] else 0
        return slots

    def in_front(self, ratios: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n1"]:
        """Counts what `slots` does as each window meets it.

        In front of a window that is open lies the one before, raw, if the row keeps
        its last full window so.
        """
        slots = self.slots(ratios)
        if not self.before.recent:
            return slots
        front = slots.copy()
        front[1:] = slots[:-1] + self.window
        front[0] = self.before.slots
        # The text's full windows are compressed at once.
        front[: self.full] = slots[: self.full]
        return front

    def positions(self, ratios: Int[np.ndarray, " n"]) -> int:
        """Returns the most positions at once (docs/specification.md section 2)."""
        return self._most(ratios, 0)

    def held(self, ratios: Int[np.ndarray, " n"]) -> int:
        """Returns the most entries in the buffer from the end of the text on."""
        return self._most(ratios, self.full)

    def _most(self, ratios: Int[np.ndarray, " n"], first: int) -> int:
        """Counts the most entries at once from window `first` on.

        A window has the most before it closes: its raw tokens and all its beacons.
        """
        slots, raw = self.in_front(ratios), self.raw(self.total)
        opened = (slots[:-1] + self.law.entries(ratios, raw))[first:][raw[first:] > 0]
        return int(max(slots[self.total // self.window], opened.max(initial=0)))

    def flops(self, ratios: Int[np.ndarray, " n"]) -> int:
        """Counts the FLOPs of reading the text.

        The open window is read from its start, as `feed` does.
        """
        used = ratios.copy()
        steps = zip(used, self.in_front(ratios), self.raw(self.text), strict=False)
        if self.before.recent and self.full:
            used[self.full - 1] = 0
            if (own := self.before.own) is not None:
                steps = [(own, self.before.slots - self.window, self.window), *steps]
        spent = sum(
            flops.window(self.config, int(r), int(m), raw=int(n)).total
            for r, m, n in steps
            if n
        )
        return spent + flops.full_attention(self.config, 0).lm_head

    def cost(self, wished: Int[np.ndarray, " n"], ratios: Int[np.ndarray, " n"]) -> str:
        """Says what the spans cost once their windows are full; "" without spans.

        Args:
          wished, ratios: before and after `applied`.
        """
        windows = -(-self.text // self.window)
        touched = int(self.lossless.sum()) or len(self.offsets)
        if not touched:
            return ""
        what = f"lossless: {touched} of {windows} windows uncompressed"
        plain = Row(self.config, self.length, self.total - self.text, self.before)
        if self.offsets:
            tokens = sum(map(len, self.offsets.values()))
            what = f"lossless: {tokens} tokens in {touched} of {windows} windows kept"
        without = int(plain.slots(plain.applied(wished))[windows])
        more = int(self.slots(ratios)[windows]) - without
        return f"{what}, {more:,} slots more (+{100 * more / max(without, 1):.0f} %)"
