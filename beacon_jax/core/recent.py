"""Rows whose last full window lies raw in the memory, and how text is fed to them.

Let q be a row's last full window. Those before it are compressed. It was run at ratio
0, so that its raw entries are the last slots, and the open window reads both. When the
next window is full, q is run again at its own ratio over what lies before it, and that
window at ratio 0 over the result. So a row's memory is a function of its tokens alone
(docs/specification.md section 2.1).

Slots are only appended, and a key is rotated at its slot. To drop q is therefore to
count its slots no more.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from beacon_jax.core import plan
from beacon_jax.core.feed import (
    FeedOutput,
    Pieces,
    padded,
    power_of_two,
    scan_windows,
)
from beacon_jax.core.feed import feed as feed_plain
from beacon_jax.core.loss import IGNORE
from beacon_jax.core.memory import MemoryState, Recent, batch_axis
from beacon_jax.model.net import Net

# What a memory has besides its slots: of the open window, on the host while rows run.
COUNTED = ("raw", "ratio", "windows", "tokens")


def feed(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[np.ndarray, "B T"] | Int[Array, "B T"],
    lengths: Int[np.ndarray, " B"] | Int[Array, " B"] | None,
    ratios: plan.Ratios,
    *,
    outputs: str = "last",
    labels: Int[np.ndarray, "B T"] | Int[Array, "B T"] | None = None,
    close: bool = True,
    donate: bool = False,
    pieces: Pieces | None = None,
) -> tuple[FeedOutput, MemoryState]:
    """Feeds any memory as `core.feed.feed` does, which has the arguments.

    Where rows keep their last full window raw, a token's outputs are those that it gets
    in the open window, over the raw one. So a window of tokens with outputs of their
    own is run three times: open, at ratio 0 and at its own. For outputs="last" that is
    so for the last tokens alone, and only if they fill a window. Rows may differ in
    their ratios.

    Args:
      outputs: as in `core.feed.feed`, or "none": `last_logits` of rows whose tokens
        fill their windows mean nothing.

    Raises:
      CapacityError, ValueError: as `core.feed.feed`.
    """
    if memory.recent is None:
        return feed_plain(
            net,
            variables,
            memory,
            tokens,
            lengths,
            ratios,
            outputs="last" if outputs == "none" else outputs,
            labels=labels,
            close=close,
            donate=donate,
            pieces=pieces,
        )
    if outputs in ("loss", "score") and labels is None:
        raise ValueError(
            f"labels=None: outputs={outputs!r} needs shifted labels [B, T]."
        )
    tokens = np.asarray(tokens)
    rows, total = tokens.shape
    lengths = np.full(rows, total) if lengths is None else np.asarray(lengths)
    planned = plan.of_rows(ratios, rows)
    plan.check_capacity(net.config, memory, lengths, planned)
    model = _Model(net, variables)
    memory = memory if donate else memory.copy()
    new = [line[:n] for line, n in zip(tokens, lengths.tolist(), strict=True)]
    if outputs in ("last", "none"):
        behind = int(outputs == "last")  # a last token is read in an open window
        text = _Text.of(memory, new, planned, behind)
        memory = _advance(model, memory, text, pieces)
        out, memory = _read_open(model, memory, text)
        if pieces:
            pieces.fed(total)
    else:
        labels = None if labels is None else np.asarray(labels)
        wanted = _Wanted(outputs, labels, total)
        out, memory = _every_token(model, memory, new, planned, wanted)
    return out, _settled(model, memory) if close else memory


def settle(net: Net, variables: dict[str, Any], memory: MemoryState) -> MemoryState:
    """Closes open windows that are full: two windows are run for each of their rows.

    Takes the memory over. A memory whose rows keep no raw window is returned as it is.
    """
    if memory.recent is None:
        return memory
    return _settled(_Model(net, variables), memory)


class _Model(NamedTuple):
    """What a window is run with."""

    net: Net
    variables: dict[str, Any]


class _Text(NamedTuple):
    """The tokens of every row that are run now, and how.

    A row's windows are those to compress, the one at ratio 0 (both only if windows
    close) and the open one.

    Attributes:
      slots: in front of them [B].
      new: how many of them close that have not been full before, of each row.
      ids: tokens of each row.
      ratios: of each row, the own ones of its windows.
    """

    slots: np.ndarray
    new: list[int]
    ids: list[np.ndarray]
    ratios: list[list[int]]

    @classmethod
    def of(
        cls,
        memory: MemoryState,
        given: Sequence[np.ndarray],
        planned: Int[np.ndarray, "B P"],
        behind: int,
    ) -> "_Text":
        """Lays out old tokens that are run again and new ones.

        Args:
          given: new tokens of each row.
          behind: so many tokens of a row with any are left to the open window.
        """
        assert memory.recent is not None
        state = jax.device_get(memory.replace(k=None, v=None))
        old, made = state.recent, cls(np.array(state.slots), [], [], [])
        for i, raw in enumerate(state.raw.tolist()):
            count = max(raw + len(given[i]) - behind, 0) // memory.window
            again = int(old.length[i]) if count else 0
            opened = int(state.ratio[i]) if raw else None
            used = plan.ahead(planned[i], int(state.windows[i]), count + 1, opened)
            made.slots[i] -= again
            made.new.append(count)
            parts = (old.tokens[i, :again], state.tokens[i, :raw], given[i])
            made.ids.append(np.concatenate(parts))
            made.ratios.append([int(old.ratio[i])] * bool(again) + used.tolist())
        return made

    def compressed(self) -> list[list[int]]:
        """Returns the ratios of the windows that are compressed, of each row."""
        return [ratios[:-2] for ratios in self.ratios]

    def whole(self, window: int) -> list[np.ndarray]:
        """Returns the tokens of each row's window at ratio 0; none if none closes."""
        pairs = zip(self.ids, self.ratios, strict=True)
        return [ids[: (len(r) - 1) * window][-window:] for ids, r in pairs]

    def rest(self, window: int) -> list[np.ndarray]:
        """Returns the tokens of each row's open window."""
        pairs = zip(self.ids, self.ratios, strict=True)
        return [ids[(len(r) - 1) * window :] for ids, r in pairs]


def _settled(model: _Model, memory: MemoryState) -> MemoryState:
    full = np.flatnonzero(np.asarray(memory.raw) == memory.window)
    if not len(full):
        return memory
    # The other rows of a batch would be computed, too. Rows that are split over devices
    # stay where they are.
    apart = len(full) < memory.rows and model.net.partition is None
    part, index = memory, full
    if apart:  # padded, so that few programs serve all numbers of rows
        index = np.resize(full, min(power_of_two(len(full)), memory.rows))
        part = _take(memory, jnp.asarray(index))
    nothing = [np.zeros(0, np.int32)] * part.rows
    text = _Text.of(part, nothing, np.zeros((part.rows, 1), np.int32), 0)
    part = _advance(model, part, text, None)
    return _put(memory, part, jnp.asarray(index)) if apart else part


def _advance(
    model: _Model, memory: MemoryState, text: _Text, pieces: Pieces | None
) -> MemoryState:
    """Runs the windows of a text that are full; the rest is laid open, but not run.

    Rows of which no window closes stay as they are.
    """
    w, old, steps = memory.window, memory.recent, text.compressed()
    assert old is not None
    windows, *last = jax.device_get((memory.windows, old.tokens, old.ratio, old.length))
    bare = memory.replace(recent=None, slots=_numbers(text.slots))
    for group in plan.agreeing(steps):
        counts = np.zeros(memory.rows, int)
        counts[group] = [len(steps[i]) * w for i in group]
        if not counts.any():
            continue
        ratios = np.asarray(max((steps[i] for i in group), key=len), np.int32)
        ratios = plan.at(ratios, np.arange(power_of_two(len(ratios))))
        pairs = zip(text.ids, counts, strict=True)
        tokens = padded((ids[:n] for ids, n in pairs), int(counts.max()))
        bare = _run(model, bare, tokens, counts, ratios, pieces=pieces)[1]
    if (closes := np.asarray(text.new) > 0).any():
        tokens, own = padded(text.whole(w), w), [r[-2:][0] for r in text.ratios]
        bare = _run(model, bare, tokens, closes * w, np.zeros(1, np.int32))[1]
        pairs = zip((tokens, own, np.full(len(own), w)), last, strict=True)
        rows = lambda x: closes.reshape(-1, *(1,) * (x.ndim - 1))
        last = [np.where(rows(y), x, y) for x, y in pairs]
    rest = text.rest(w)
    return bare.replace(
        raw=_numbers([len(r) for r in rest]),
        ratio=_numbers([r[-1] for r in text.ratios]),
        windows=_numbers(windows + text.new),
        tokens=_numbers(padded(rest, w)),
        recent=Recent(*map(_numbers, last)),
    )


def _read_open(
    model: _Model,
    memory: MemoryState,
    text: _Text,
    outputs: str = "last",
    labels: Int[np.ndarray, "B W"] | None = None,
) -> tuple[FeedOutput, MemoryState]:
    """Runs the open windows of all rows, and leaves full ones open.

    Outputs of tokens are those of the windows [B, W].
    """
    rest = text.rest(memory.window)
    counts = np.asarray([len(r) for r in rest])
    ratios = np.asarray([r[-1] for r in text.ratios], np.int32)
    tokens = padded(rest, memory.window)
    found, state = None, memory.replace(recent=None)
    for ratio in np.unique(ratios[counts > 0]) if counts.any() else ratios[:1]:
        mine = np.where(ratios == ratio, counts, 0)
        out, state = _run(
            model, state, tokens, mine, ratio[None], outputs=outputs, labels=labels
        )
        found = out if found is None else _merged(found, out, jnp.asarray(mine > 0))
    assert found is not None
    counted = {name: getattr(memory, name) for name in COUNTED}
    return found, state.replace(recent=memory.recent, **counted)


def _merged(old: FeedOutput, new: FeedOutput, rows: Array) -> FeedOutput:
    """Takes the outputs of some rows from `new`, of the others from `old`."""
    choose = lambda a, b: jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), b, a)
    return jax.tree.map(choose, old, new)


def _every_token(
    model: _Model,
    memory: MemoryState,
    new: list[np.ndarray],
    planned: Int[np.ndarray, "B P"],
    wanted: "_Wanted",
) -> tuple[FeedOutput, MemoryState]:
    """Reads every window open, so that each token gets outputs of its own."""
    w, lengths = memory.window, np.asarray([len(tokens) for tokens in new])
    place = np.zeros((len(new), wanted.size), int)  # of each token among all windows
    done, found = np.zeros_like(lengths), []
    while not found or (done < lengths).any():
        memory = _settled(model, memory)
        raw = np.asarray(memory.raw)
        stop = np.minimum(done + w - raw, lengths)
        labels = np.full((len(new), w), IGNORE, np.int32)
        for i, (at, a, b) in enumerate(zip(raw, done, stop, strict=True)):
            place[i, a:b] = len(found) * w + at + np.arange(b - a)
            if wanted.labels is not None:
                labels[i, at : at + b - a] = wanted.labels[i, a:b]
        part = [x[a:b] for x, a, b in zip(new, done, stop, strict=True)]
        text = _Text.of(memory, part, planned, 1)
        memory = _advance(model, memory, text, None)
        given = labels if wanted.labels is not None else None
        out, memory = _read_open(model, memory, text, wanted.outputs, given)
        if found:
            goes_on = jnp.asarray(stop > done)[:, None]
            last = jnp.where(goes_on, out.last_logits, found[-1].last_logits)
            out = out._replace(last_logits=last)
        found.append(out)
        done = stop

    def of_tokens(*windows: Array) -> Array:
        """Takes the tokens' places: [B, W, ...] of each window -> [B, T, ...]."""
        whole = jnp.concatenate(windows, axis=1)
        return jnp.take_along_axis(
            whole, place.reshape(*place.shape, *(1,) * (whole.ndim - 2)), axis=1
        )

    each = jax.tree.map(of_tokens, *(out[1:] for out in found))
    return FeedOutput(found[-1].last_logits, *each), memory


class _Wanted(NamedTuple):
    """The outputs of each token that are wanted.

    Attributes:
      outputs, labels: as in `feed`.
      size: T, tokens of the longest row.
    """

    outputs: str
    labels: Int[np.ndarray, "B T"] | None
    size: int


def _run(
    model: _Model,
    memory: MemoryState,
    tokens: Int[np.ndarray, "B T"],
    counts: Int[np.ndarray, " B"],
    ratios: Int[np.ndarray, " P"],
    **how: Any,
) -> tuple[FeedOutput, MemoryState]:
    """Runs windows behind the slots of the rows that have tokens, at one plan.

    Takes over the memory but for what is `COUNTED`, which is undefined afterwards.

    Args:
      how: keywords of `core.feed.scan_windows`; without "outputs" the windows close.
    """
    none = lambda: jnp.zeros((memory.rows,), jnp.int32)
    bare = memory.replace(
        raw=none(),
        ratio=none(),
        windows=none(),
        tokens=jnp.zeros(memory.tokens.shape, jnp.int32),
    )
    planned = plan.of_rows(ratios, memory.rows)
    given = (bare, tokens, counts.astype(np.int32), planned)
    close = "outputs" not in how
    return scan_windows(model.net, model.variables, *given, close=close, **how)


def _numbers(values: Any) -> Array:
    return jnp.asarray(np.asarray(values, np.int32))


@jax.jit
def _take(memory: MemoryState, rows: Int[Array, " b"]) -> MemoryState:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=batch_axis(x)), memory)


@functools.partial(jax.jit, donate_argnames="memory")
def _put(memory: MemoryState, part: MemoryState, rows: Int[Array, " b"]) -> MemoryState:
    """Writes `part` over some rows; one that is named twice is the same both times."""

    def put(x: Array, new: Array) -> Array:
        return x.at[(slice(None),) * batch_axis(x) + (rows,)].set(new)

    return jax.tree.map(put, memory, part)
