"""Reads a text of any length as it comes: neither its text nor its tokens are kept.

A piece of text becomes tokens as soon as it is known where it can be cut, a piece of
some windows is fed as soon as it is full, and then both are forgotten. With `slot_cap`
the memory has a size, too: when it would hold more slots, the older half of them is
thinned (`core.move.thin`), so what is old is told in fewer and fewer slots.
"""

import codecs
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState, buffer_size
from beacon_jax.core.move import thin
from beacon_jax.core.plan import needed_slots
from beacon_jax.core.recent import feed
from beacon_jax.inference.feeding import check_memory, choose_dtype, fresh_state, own
from beacon_jax.inference.history import History
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.options import Reading
from beacon_jax.inference.plan import make_plan, warn_beyond_training
from beacon_jax.inference.room import check_buffer
from beacon_jax.inference.validate import (
    ArgumentError,
    empty,
    is_number,
    kind_of,
    readable,
    shown,
)
from beacon_jax.model import stages
from beacon_jax.tokenise import encode, encode_spans

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

CHARACTERS = 2**16  # that are made tokens at a time
MARGIN = 512  # characters behind a cut, on which its tokens do not depend any more
CUTS = 32  # places that are tried
PART = 4  # a piece adds at most one slot in so many of `slot_cap`

# What the whole text has to be known for.
WHOLE = ("method", "max_slots", "max_bytes", "spans", "recent")


def wanted(context: Any, slot_cap: int | None) -> bool:
    """Tells whether a context is read as it comes: a file, an iterator, or capped.

    With a cap there has to be one, too.
    """
    if slot_cap is not None:
        return True
    if _is_whole(context) or isinstance(context, bytes):
        return False
    return isinstance(context, os.PathLike) or hasattr(context, "__next__")


def compress(
    model: "Model", context: Any, memory: Memory | None, asked: Reading, reserve: int
) -> Memory:
    """Reads a file, an iterator of texts or token ids, or one text, as it comes.

    Raises:
      TypeError: pieces that are neither text nor ids.
      ArgumentError: an option that needs the whole text, or no text at all.
      CapacityError: `asked.capacity` is too small.
    """
    if isinstance(context, list | tuple) and not all(map(is_number, context)):
        raise ArgumentError(
            "slot_cap",
            asked.slot_cap,
            f"is of one text, and context has {len(context)}",
            remedy="compress them one after the other",
        )
    _check(model, asked, memory)
    check_memory(model, memory, 1)
    row = History.empty() if memory is None else memory.rows[0]
    reader = _Reader(model, context, memory, asked, reserve)
    source = _Source(context)
    first, pending = not row.length, row.pending
    ids = _tokens(model, source.pieces(), first=first, after=row.last)
    for piece in _pieces(ids, pending, reader):
        reader.read(piece)
        if asked.on_progress:
            asked.on_progress(reader.done, source.tokens(reader.done))
    if not reader.done:
        raise empty("context", "")
    if asked.on_progress:
        asked.on_progress(reader.done, reader.done)
    return reader.memory()


def _check(model: "Model", asked: Reading, memory: Memory | None) -> None:
    """Raises ArgumentError for what a text that is read as it comes cannot have."""
    why = "needs the whole text, and this one is read as it comes"
    if memory is not None and memory.recent:
        raise ArgumentError(
            "memory",
            memory,
            "keeps its last full window raw",
            remedy="make it without recent, or give the text itself",
        )
    for name in WHOLE:
        value = getattr(asked, name)
        if value not in (None, "beacon") and value is not False:
            remedy = f"leave {name} out, or give the text itself"
            raise ArgumentError(name, value, why, remedy=remedy)
    ratio, cap = asked.ratio, asked.slot_cap
    if isinstance(ratio, str) and ratio != "full":
        raise ArgumentError("ratio", ratio, why, remedy="give a number, ratio=8")
    beacon = model.config.beacon
    if ratio is None and beacon is not None and memory is None:
        raise ArgumentError(
            "ratio", None, "is a mix over the whole text", remedy="give ratio=8"
        )
    if cap is None:
        return
    whole = ratio if isinstance(ratio, int) and not isinstance(ratio, bool) else 0
    if not whole or beacon is None:
        raise ArgumentError(
            "ratio",
            ratio,
            f"does not go with slot_cap={cap}",
            remedy="give one number above 0, of a model with beacons",
        )
    law = Law.of(model.config)
    each = int(law.kept(whole, 1))
    least = PART * each + law.sink
    if cap < least:
        raise ArgumentError(
            "slot_cap",
            cap,
            f"is too small: a window leaves {each} slots",
            remedy=f"give {least} or more, or a higher ratio",
        )


class _Reader:
    """The memory of one row while a text goes into it, and the row's history."""

    def __init__(
        self,
        model: "Model",
        context: Any,
        memory: Memory | None,
        asked: Reading,
        reserve: int,
    ):
        self.model, self.asked, self.law = model, asked, Law.of(model.config)
        self.row = History.empty() if memory is None else memory.rows[0]
        if len(self.row.pending):  # is fed in front of the text
            self.row = self.row.cut(self.row.fed)
        if not _is_whole(context):
            self.row = self.row.forget_tokens()
        self.dtype = choose_dtype(model, memory, asked.memory_dtype)
        self.reserve, self.done = reserve, 0
        self._given = None if memory is None else memory.state
        self.state: MemoryState | None = self._given
        self.windows = asked.progress_windows * stages.count(model.net)
        if asked.slot_cap:
            each = max(int(self.law.kept(int(asked.ratio), 1)), 1)  # pyright: ignore
            most = (asked.slot_cap - self.law.sink) // PART
            self.windows = min(self.windows, max(most // each, 1))

    @property
    def wanted(self) -> int:
        """Tokens of the next piece: whole windows, behind an open one what it lacks."""
        return self.windows * self.law.window - self.row.raw

    def read(self, ids: Int[np.ndarray, " n"]) -> None:
        """Feeds a piece; makes room for it first."""
        model, config = self.model, self.model.config
        plan = make_plan(
            config, self.asked.ratio, length=len(ids), before=self.row
        ).ratios
        ahead = plan[min(self.row.windows, len(plan) - 1) :]
        if (ahead == ahead[0]).all():  # one program for every piece
            plan = ahead[:1]
        self._thin(plan, len(ids))
        warn_beyond_training(config, plan, len(ids), self.row)
        counts = np.asarray([len(ids)])
        self._grow(needed_slots(config, self._state(), counts, plan[None]))
        state = self._state()
        _, self.state = feed(
            model.net,
            model.variables,
            state,
            ids[None],
            None,
            plan,
            outputs="none",
            donate=state is not self._given,
        )
        jax.block_until_ready(self.state.slots)
        self.row = self.row.feed(self.law, plan, ids)
        self.done += len(ids)

    def memory(self) -> Memory:
        """Returns what was read, with room for what is to follow."""
        model, state, asked = self.model, self._state(), self.asked
        state = state.replace(windows=jnp.asarray([self.row.windows], jnp.int32))
        if not (asked.capacity or asked.slot_cap):
            ratios = np.asarray([[self.row.ratio]], np.int32)
            more = np.asarray([self.reserve])
            needed = needed_slots(model.config, state, more, ratios)
            state = state.trimmed(buffer_size(needed, self.law.window))
        return Memory(model.config, state, (self.row,), model.identity)

    def _state(self) -> MemoryState:
        if self.state is None:
            self.state = fresh_state(self.model, 1, self._size(0), self.dtype)
        return self.state

    def _size(self, needed: int) -> int:
        """Returns the slots of a buffer: fixed with a cap, else in doubling steps."""
        asked, w = self.asked, self.law.window
        if asked.capacity:
            return asked.capacity
        room = self.law.room({int(asked.ratio)}) if asked.slot_cap else 2 * w  # pyright: ignore
        if asked.slot_cap:
            return max(asked.slot_cap + room, needed) + self.reserve
        # Twice as large each time it grows, so that few programs are compiled.
        had = 0 if self.state is None else self.state.capacity
        least = max(needed + self.reserve, room)
        return max(buffer_size(least, w), 2 * had if needed > had else had)

    def _grow(self, needed: int) -> None:
        state = self._state()
        size = self._size(needed)
        if size > state.capacity:
            check_buffer(self.model, 1, size, self.dtype)
            self.state = own(state.resized(size), state)

    def _thin(self, plan: Int[np.ndarray, " P"], tokens: int) -> None:
        """Thins the older half of the slots until the piece fits under the cap."""
        cap = self.asked.slot_cap
        if not cap:
            return
        fed = np.zeros(tokens, np.int32)
        while self.row.feed(self.law, plan, fed).slots > cap:
            first = int(np.asarray(self._state().sinks)[0])
            count = (self.row.slots - first) // 4  # pairs: of the older half
            if not count:  # `_check` has seen to that, but for a memory that goes on
                return
            state = self._state()
            if state is self._given:
                state = state.copy()
            places = [jnp.asarray([n], jnp.int32) for n in (first, count)]
            self.state = thin(self.model.config, state, *places)
            self.row = self.row.thinned(first, count)


# --- where the text comes from ------------------------------------------------------


class _Source:
    """Pieces of a text, and how much of it is read."""

    def __init__(self, context: Any):
        self._context, self._size, self._read = context, 0, 0

    def pieces(self) -> Iterator[Any]:
        """Yields texts, or arrays of ids."""
        if isinstance(self._context, os.PathLike):
            yield from self._of_file(Path(self._context))
            return
        one = _is_whole(self._context)
        given: Iterable[Any] = [self._context] if one else self._context
        for number, piece in enumerate(given):
            if isinstance(piece, str):
                readable(f"context[{number}]", piece)
            elif isinstance(piece, bytes) or not _is_ids(piece):
                raise TypeError(
                    f"context[{number}]={shown(piece)} is {kind_of(piece)}: an "
                    "iterator gives pieces of one text, or token ids."
                )
            yield piece

    def tokens(self, done: int) -> int:
        """Estimates the tokens of the whole text; 0: nothing is known."""
        if not self._size:
            return 0
        return max(done, round(done * self._size / max(self._read, 1)))

    def _of_file(self, path: Path) -> Iterator[str]:
        if path.is_dir() or not path.exists():
            what = "is a folder" if path.is_dir() else "is not there"
            raise ArgumentError("context", str(path), what, remedy="name a text file")
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            while data := file.read(CHARACTERS):
                try:
                    text = decoder.decode(data)
                except UnicodeDecodeError as error:
                    raise self._not_text(path, error) from None
                self._read += len(data)
                yield text
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise self._not_text(path, error) from None

    def _not_text(self, path: Path, error: UnicodeDecodeError) -> ArgumentError:
        return ArgumentError(
            "context",
            str(path),
            f"is not UTF-8 at or behind byte {self._read + error.start:,}",
            remedy="convert it, or give open(path, encoding=...)",
        )


def _is_whole(context: Any) -> bool:
    """Tells whether the text is there as a whole: its tokens are kept."""
    return isinstance(context, str | np.ndarray | list | tuple)


def _is_ids(piece: Any) -> bool:
    if isinstance(piece, int | np.integer) and not isinstance(piece, bool):
        return True
    ids = np.asarray(piece) if isinstance(piece, list | tuple | np.ndarray) else None
    return (
        ids is not None and ids.ndim == 1 and (ids.dtype.kind in "iu" or not len(ids))
    )


def _tokens(
    model: "Model", pieces: Iterator[Any], *, first: bool, after: int | None
) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields the ids of a text; the same as of the whole text at once."""
    text = _Text(model, first, after)
    for piece in pieces:
        if isinstance(piece, str):
            yield from text.add(piece)
            continue
        yield from text.end()
        ids = np.atleast_1d(np.asarray(piece))
        if ids.size:
            yield model.encode(ids, "context", first=False)
            text = _Text(model, False, int(ids[-1]))
    yield from text.end()


class _Text:
    """Text that is not made tokens yet."""

    def __init__(self, model: "Model", first: bool, after: int | str | None):
        self.model, self._first, self._after = model, first, after
        self._held, self._next = "", CHARACTERS

    def add(self, text: str) -> Iterator[Int[np.ndarray, " n"]]:
        """Takes more text; yields tokens that nothing behind them changes."""
        self._held += text
        while len(self._held) >= self._next:
            cut = self._cut()
            if cut is None:  # one word as long as that: wait for more
                self._next = 2 * len(self._held)
                return
            ids, at = cut
            yield ids
            self._first, self._after = False, self._held[:at][-MARGIN:]
            self._held, self._next = self._held[at:], CHARACTERS

    def end(self) -> Iterator[Int[np.ndarray, " n"]]:
        """Yields the rest."""
        if self._held:
            model, text = self.model, self._held
            first, after = self._first, self._after
            yield model.encode(text, "context", first=first, after=after)
            self._first, self._after = False, self._held[-MARGIN:]
        self._held = ""

    def _cut(self) -> tuple[Int[np.ndarray, " n"], int] | None:
        """Finds a border of tokens behind which the text has the same tokens alone.

        Returns:
          The ids in front of it, and its character. None: there is none.
        """
        held, tokenizer = self._held, self.model.tokenizer
        if tokenizer is None:  # the message is that of `encode`
            self.model.encode(held, "context", first=self._first)
        at = "start" if self._first else "behind"
        ids, spans = encode_spans(tokenizer, held, at, self._after)
        starts, last = spans[:, 0], len(held) - MARGIN
        border = np.flatnonzero((starts[1:] == spans[:-1, 1]) & (starts[1:] > 0)) + 1
        border = border[starts[border] < last][::-1]
        words = [i for i in border[:4096] if held[starts[i] - 1].isspace()]
        spaces = [i for i in border[:4096] if held[starts[i]].isspace()]
        for i in (*words[: CUTS // 2], *spaces[: CUTS // 2], *border[:CUTS]):
            at = int(starts[i])
            rest = encode(tokenizer, held[at:], "behind", held[:at][-MARGIN:])
            if np.array_equal(rest, ids[i:]):
                return np.asarray(ids[:i], np.int32), at
        return None


def _pieces(
    ids: Iterator[Int[np.ndarray, " n"]],
    pending: Int[np.ndarray, " p"],
    reader: _Reader,
) -> Iterator[Int[np.ndarray, " n"]]:
    """Joins ids to what `reader` wants next; the last piece is what is left."""
    parts, count = [pending], len(pending)
    for more in ids:
        parts.append(more)
        count += len(more)
        while count >= (size := reader.wanted):
            joined = np.concatenate(parts).astype(np.int32)
            yield joined[:size]
            parts, count = [joined[size:]], count - size
    if count:
        yield np.concatenate(parts).astype(np.int32)
