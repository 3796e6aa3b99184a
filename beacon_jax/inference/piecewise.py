"""Reads texts piece by piece, and lets a compressor close each piece.

What the text does not fill a window with stays as it is, and so does what is generated.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from beacon_jax.core.feed import padded
from beacon_jax.core.law import Law, default_window
from beacon_jax.core.memory import CapacityError, MemoryState, buffer_size
from beacon_jax.core.plan import at
from beacon_jax.core.recent import feed
from beacon_jax.inference.compressors import KNOWN, METHODS, Compressor, Piece, find
from beacon_jax.inference.feeding import Fit, choose_dtype, fresh_state, histories, own
from beacon_jax.inference.history import History
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.options import OnProgress, Reading
from beacon_jax.inference.plan import Plan
from beacon_jax.inference.room import check_buffer
from beacon_jax.inference.validate import ArgumentError, kind_of, shown
from beacon_jax.model.config import BeaconConfig, ModelConfig

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

PLAIN = np.zeros(1, np.int32)  # a plan: every window at ratio 0


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
    """What a piece takes of one row, and what is kept of it.

    Attributes:
      tokens: ids of its slots, whole windows.
      given: how many of them are fed now; the others were in an open window.
      wanted: slots that each of its windows leaves.
      stays: which of its tokens stay as they are.
    """

    tokens: Int[np.ndarray, " n"]
    given: int
    wanted: Int[np.ndarray, " w"]
    stays: Bool[np.ndarray, " n"]

    @property
    def count(self) -> int:
        """Counts the slots that are kept."""
        return int(self.wanted.sum())


_NOTHING = Share(*(np.zeros(0, np.int32), 0, np.zeros(0, int), np.zeros(0, bool)))


def feed_compressed(
    model: "Model",
    method: Compressor,
    rows: list[np.ndarray],
    plans: list[Plan],
    memory: Memory | None,
    fit: Fit,
    on_progress: OnProgress | None = None,
) -> Memory:
    """Feeds each row its tokens, and closes its full windows by a compressor.

    Args:
      plans: of each row: how many slots its windows leave (by the law of `planning`),
        and which tokens stay as they are.

    Raises:
      CapacityError: `fit.capacity` is too small.
    """
    before = histories(memory, len(rows))
    fed = [np.concatenate([x.pending, r]) for x, r in zip(before, rows, strict=True)]
    law = Law.of(planning(model.config))
    w = law.window
    trained = model.config.trained_positions
    shares = [
        _shares(*each, law, functools.partial(_windows, method, trained, w))
        for each in zip(before, fed, plans, strict=True)
    ]
    news = np.broadcast_to(fit.new, (len(rows),))
    needed = max(
        _needed(h, s, len(f) + int(new), w, method.evicts)
        for h, s, f, new in zip(before, shares, fed, news, strict=True)
    )
    dtype = choose_dtype(model, memory, fit.dtype)
    if fit.capacity and fit.capacity < needed:
        raise CapacityError(fit.capacity, needed)
    capacity = fit.capacity or buffer_size(needed, w)
    if memory is None or capacity > memory.capacity:
        check_buffer(model, len(rows), capacity, dtype)
    if memory is None:
        state = fresh_state(model, len(rows), capacity, fit.dtype)
    else:
        state = own(memory.state.resized(capacity), memory.state)
    reader = _Reader(model, method, state, None if memory is None else memory.state)
    budgets = [sum(share.count for share in each) for each in shares]
    done, total = 0, sum(map(len, fed))
    after, rest = list(before), fed
    for number in range(max(map(len, shares))):
        now = [each[number] if number < len(each) else _NOTHING for each in shares]
        tokens = [x[: share.given] for x, share in zip(rest, now, strict=True)]
        rest = [x[share.given :] for x, share in zip(rest, now, strict=True)]
        reader.piece(tokens, now, budgets)
        slots = np.asarray(reader.state.slots).tolist()
        after = [
            row.evenly(n, new, anew=method.evicts) if len(share.tokens) else row
            for row, new, n, share in zip(after, tokens, slots, now, strict=True)
        ]
        done += sum(map(len, tokens))
        if on_progress:
            on_progress(done, total)
    if any(map(len, rest)):
        reader.read(rest)
        after = [h.feed(law, PLAIN, r) for h, r in zip(after, rest, strict=True)]
        if on_progress:
            on_progress(total, total)
    windows = jnp.asarray([row.windows for row in after], jnp.int32)
    state = reader.state.replace(windows=windows)
    if not fit.capacity:  # a piece took more room than what is left of it
        held = max(row.slots + row.raw for row in after)
        state = state.trimmed(buffer_size(held + int(news.max()) + 2 * w, w))
    return Memory(model.config, state, tuple(after), model.identity)


class _Reader:
    """The memory while it is read; the given one is never taken over."""

    def __init__(
        self,
        model: "Model",
        method: Compressor,
        state: MemoryState,
        given: MemoryState | None,
    ):
        self.model, self.method, self.state, self._given = model, method, state, given
        self._slots = np.asarray(state.slots)  # before anything was read

    def read(self, tokens: list[np.ndarray]) -> None:
        """Feeds tokens as they are, whole windows or the rest of a text."""
        lengths = np.asarray(list(map(len, tokens)), np.int32)
        most = int(lengths.max())
        if not most:
            return
        _, self.state = feed(
            self.model.net,
            self.model.variables,
            self.state,
            padded(tokens, -(-most // self.state.window) * self.state.window),
            lengths,
            PLAIN,
            outputs="none",
            donate=self.state is not self._given,
        )

    def piece(
        self,
        tokens: list[np.ndarray],
        now: Sequence[Share],
        budgets: Sequence[int],
    ) -> None:
        """Feeds a piece and replaces its slots.

        Args:
          budgets: slots that each row's text may leave in all.
        """
        start = np.asarray(self.state.slots)
        self.read(tokens)
        stop = np.asarray(self.state.slots)
        stays = [share.stays for share in now]
        count = np.asarray([share.count for share in now])
        if self.method.evicts:
            # The cache has its size from the first window on.
            start, most = np.zeros_like(stop), self._slots + np.asarray(budgets)
            reads = np.asarray(list(map(len, tokens))) > 0
            count = np.where(reads, np.minimum(stop, most), stop)
            stays = [np.zeros(n, bool) for n in stop]
        ids = [share.tokens for share in now]
        wanted = [share.wanted for share in now]
        piece = make_piece(self.model, self.state, start, stop, ids, wanted)
        self.state = close(self.method, piece, count, stays)


def make_piece(
    model: "Model",
    state: MemoryState,
    start: Int[np.ndarray, " B"],
    stop: Int[np.ndarray, " B"],
    tokens: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
) -> Piece:
    """Makes a piece of slots start ... stop - 1 of each row; see `Piece`."""
    longest = lambda rows: max(map(len, rows))
    return Piece(
        model.net,
        model.variables,
        state,
        start,
        stop,
        padded(tokens, longest(tokens)),
        padded(wanted, longest(wanted)),
        model.tokenizer,
    )


def close(
    method: Compressor,
    piece: Piece,
    count: Int[np.ndarray, " B"],
    stays: Sequence[Bool[np.ndarray, " n"]] | None = None,
    observe: Callable[[Piece], Any] | None = None,
) -> MemoryState:
    """Replaces the slots of a piece by `count` of them, as a compressor does.

    Args:
      stays: of each row, the slots of the piece that stay; None: none has to.
      observe: in place of the compressor's own.

    Returns:
      The memory; the piece's is taken over.

    Raises:
      ValueError: the compressor left another number of slots.
    """
    if (np.asarray(count) == piece.lengths).all():
        return piece.state
    slot, start = np.arange(piece.state.capacity), piece.start
    forced = slot < start[:, None]
    for row, first, last, each in zip(
        forced, start, piece.stop, stays or (), strict=False
    ):
        row[first:last] = each
    kept = jnp.asarray(count, jnp.int32)
    seen = (observe or method.observe)(piece)
    scores = method.score(piece, seen, kept)
    scores = jnp.nan_to_num(scores)  # finite, as infinite ones mean more here
    place = lambda x: jnp.asarray(x)[None, :, None]
    scores = jnp.where(place(slot < piece.stop[:, None]), scores, -jnp.inf)
    scores = jnp.where(place(forced), jnp.inf, scores)
    state = method.make(piece, seen, scores, kept)
    left, right = np.asarray(state.slots), start + np.asarray(count)
    if (left != right).any():
        raise ValueError(
            f"method={method.name} left {left.tolist()} slots where {right.tolist()} "
            "were to stay: its `make` has to keep `count` of each row."
        )
    return state


def _windows(method: Compressor, trained: int, window: int, kept: int) -> int:
    """Returns the windows of a piece: as many as positions are trained for.

    Args:
      kept: slots that are left of a row in all.
    """
    for size in range(max(method.piece_tokens // window, 1), 1, -1):
        read = size * window
        if kept + read + min(method.repeats, read) + window <= trained:
            return size
    return 1


def _shares(
    history: History,
    fed: np.ndarray,
    plan: Plan,
    law: Law,
    size_of: Callable[[int], int],
) -> list[Share]:
    """Cuts a row's full windows into pieces of size_of(slots left in all) windows."""
    w, opened = law.window, history.raw
    full = (opened + len(fed)) // w
    if not full:
        return []
    past = history.tokens
    if opened and past is None:
        raise ValueError(
            f"memory has {opened} tokens in an open window whose ids were not kept: "
            "truncate it to where a window ends, or keep the tokens (save(..., "
            "tokens=True))."
        )
    head = fed[:0] if past is None else past[history.start : history.fed]
    tokens = np.concatenate([head, fed]).astype(np.int32)[: full * w]
    ratios = at(plan.ratios, history.windows + np.arange(full))
    counts, stays = np.diff(law.after(ratios, history.slots)), np.repeat(ratios == 0, w)
    for number, offsets in plan.keep.items():
        window = number - history.windows
        if 0 <= window < full:
            stays[window * w + np.asarray(offsets)] = True
            counts[window] += len(offsets)
    counts = np.minimum(counts, w)
    found, size = [], size_of(history.slots + int(counts.sum()))
    for begin in range(0, full, size):
        end = min(begin + size, full)
        here = slice(begin * w, end * w)
        given = (end - begin) * w - (opened if begin == 0 else 0)
        found.append(Share(tokens[here], given, counts[begin:end], stays[here]))
    return found


def _needed(
    history: History, shares: list[Share], tokens: int, window: int, evicts: bool
) -> int:
    """Counts the slots that a row takes at most, with a window more behind."""
    slots = most = history.slots
    for share in shares:
        most = max(most, slots + len(share.tokens))
        slots += share.count
        tokens -= share.given
    rest = tokens + (0 if shares else history.raw)
    if evicts:
        most = max(most, slots + window)
    return max(most, slots + rest) + 2 * window


def choose_compressor(
    config: ModelConfig, memory: Memory | None, asked: Reading
) -> Compressor | None:
    """Chooses what closes windows; None: the beacons, or nothing.

    Raises:
      TypeError, ArgumentError: no method, or one that cannot do what is asked for.
    """
    given = asked.method
    if given is None:
        return None
    if isinstance(given, str) and given == "beacon":
        if config.beacon is None:
            raise ArgumentError(
                "method",
                given,
                "needs beacons, but this model has none",
                remedy=f"use {', '.join(METHODS)}, which need no training",
            )
        return None
    if isinstance(given, str):
        method = find(given)
    elif isinstance(given, Compressor):
        method = given
    else:
        raise TypeError(
            f"method={shown(given)} is {kind_of(given)}: give 'beacon', "
            f"{', '.join(map(repr, KNOWN))}, or an object of a class of "
            "beacon_jax.Compressor."
        )
    _check(method, memory, asked)
    return method


def _check(method: Compressor, memory: Memory | None, asked: Reading) -> None:
    """Raises ArgumentError for options that a compressor has no use for."""
    name = method.name or type(method).__name__
    if asked.ratio is None and asked.max_slots is None and asked.max_bytes is None:
        raise ArgumentError(
            "method",
            name,
            "needs to know by how much",
            remedy="give ratio=4, max_slots or max_bytes",
            flags="give --ratio=4, --max_slots or --max_bytes",
        )
    if asked.recent or (memory is not None and memory.recent):
        raise ArgumentError(
            "method",
            name,
            "cannot go with recent, which beacons have",
            remedy="leave recent out: what does not fill a window stays as it is",
            flags="leave --recent out: what does not fill a window stays as it is",
        )
    if asked.spans is not None and (method.evicts or not method.splits):
        able = ", ".join(n for n, kind in METHODS.items() if kind.splits)
        if method.evicts:
            why = "cannot keep spans: what is old goes, whatever it is"
        elif asked.lossless == "slots":
            why = "cannot keep single tokens beside what it makes of the others"
        else:
            return
        raise ArgumentError(
            "method",
            name,
            why,
            remedy=f"use one of {able}"
            + ("" if method.evicts else ", or lossless='windows'"),
            flags=f"use one of {able}"
            + ("" if method.evicts else ", or --lossless=windows"),
        )
    opened = [row.opened for row in memory.rows] if memory is not None else []
    if any(opened):
        raise ArgumentError(
            "method",
            name,
            f"cannot go on in a window that has beacons (x{max(filter(None, opened))})",
            remedy="truncate the memory to where a window ends, or go on with beacons",
        )


def planning(config: ModelConfig) -> ModelConfig:
    """Returns the config that a compressor's plans are made with.

    Slots are counted as those of the model's beacons; for a model without any as those
    of windows at ratios from 2 to 32, without sinks.
    """
    if config.beacon is not None:
        return config
    w = default_window(config)
    ratios = tuple(r for r in (2, 4, 8, 16, 32) if w % r == 0) or (1,)
    return dataclasses.replace(config, beacon=BeaconConfig(window=w, ratios=ratios))
