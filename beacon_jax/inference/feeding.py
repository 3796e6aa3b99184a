"""Feeds the rows of a batch into a memory; rows with the same plan go together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.core.feed import Pieces, padded
from beacon_jax.core.law import Law
from beacon_jax.core.memory import (
    CapacityError,
    MemoryState,
    buffer_size,
    init_memory,
)
from beacon_jax.core.move import keep_entries
from beacon_jax.core.plan import needed_slots
from beacon_jax.core.recent import feed
from beacon_jax.inference import leaves
from beacon_jax.inference.compatible import check_same_model
from beacon_jax.inference.decode import Decoded
from beacon_jax.inference.history import History, kept_window
from beacon_jax.inference.memory import Memory, join_rows, take_rows
from beacon_jax.inference.options import PIECE_WINDOWS, OnProgress, Reading
from beacon_jax.inference.plan import Plan, group_rows, stack_ratios
from beacon_jax.inference.room import check_buffer
from beacon_jax.inference.validate import ArgumentError
from beacon_jax.model import stages
from beacon_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model


def histories(
    memory: Memory | None, rows: int, recent: bool = False
) -> Sequence[History]:
    """Returns the rows' histories so far; they are empty without a memory."""
    return memory.rows if memory is not None else [History.empty(recent)] * rows


class Fit(NamedTuple):
    """What the buffer of a memory is to hold.

    Attributes:
      capacity: slots; None: as many as are needed.
      new: tokens per row that are to follow.
      dtype: of keys and values of a new memory; None: that of the model.
      recent: whether rows of a new memory keep their last full windows raw.
      logits: those after each row's last token are needed. Without them fewer windows
        may be run (`core.recent.feed`).
      width: rows are padded to so many tokens: calls of one width share a program,
        whatever the rows' lengths up to it.
      piece: windows that are fed at a time where progress is to be shown.
    """

    capacity: int | None = None
    new: np.ndarray | int = 0
    dtype: str | None = None
    recent: bool = False
    logits: bool = True
    width: int = 0
    piece: int = PIECE_WINDOWS


def feed_rows(
    model: "Model",
    rows: list[np.ndarray],
    plans: list[Plan],
    memory: Memory | None,
    fit: Fit,
    on_progress: OnProgress | None = None,
) -> tuple[jax.Array, Memory]:
    """Feeds each row what is pending of it and its tokens.

    Rows whose plans agree in every step are fed by one call or, with `on_progress`, by
    one call per `fit.piece` windows.

    Returns:
      The logits after each row's last token, and the new memory.
    """
    before = histories(memory, len(rows), fit.recent)
    fed = [np.concatenate([x.pending, r]) for x, r in zip(before, rows, strict=True)]
    ratios, dtype = stack_ratios(plans), fit.dtype
    state = memory.state if memory else _nothing(model, len(rows), fit)
    lengths, done = np.asarray([len(r) for r in fed]), 0
    size = _room(model.config, state, ratios, lengths + fit.new, fit.capacity, plans)
    if size > state.capacity:
        check_buffer(model, len(rows), size, choose_dtype(model, memory, dtype))
    groups = _groups(model.config, rows, plans, before)
    outs, states = [], []
    for group in groups:
        whole = len(group) == len(rows)
        if memory is None:
            part = fresh_state(model, len(group), size, dtype, fit.recent)
        else:
            part = state if whole else take_rows(state, np.asarray(group))
            part = own(part.resized(size), state)
        out, part = _feed_group(
            model,
            part,
            [fed[i] for i in group],
            ratios[group],
            plans[group[0]].keep,
            donate=part is not state,
            fit=fit,
            on_fed=_counted(on_progress, lengths, group, done),
        )
        done += int(lengths[group].sum())
        outs.append(out)
        states.append(part)
    order = np.argsort(np.concatenate(groups))
    logits, state = outs[0], states[0]
    if len(groups) > 1:
        logits, state = jnp.concatenate(outs), join_rows(states)
        if (order != np.arange(len(order))).any():
            logits, state = logits[order], take_rows(state, order)
    law = Law.of(model.config)
    after = tuple(
        history.feed(law, plan.ratios, row, keep=plan.keep)
        for history, plan, row in zip(before, plans, fed, strict=True)
    )
    return logits, Memory(model.config, state, after, model.identity)


def own(part: MemoryState, state: MemoryState) -> MemoryState:
    """Returns `part` without arrays that belong to `state`, too.

    `part` is donated if it is not `state`. Arrays of `state` would be gone then: a
    larger buffer shares the lengths with the smaller one.
    """
    if part is state:
        return part
    copied = lambda new, old: jnp.copy(new) if new is old else new
    return jax.tree.map(copied, part, state)


def _groups(
    config: ModelConfig,
    rows: list[np.ndarray],
    plans: list[Plan],
    before: Sequence[History],
) -> list[list[int]]:
    """Groups rows that are fed together; one that keeps raw entries is fed alone."""
    alone = [i for i, plan in enumerate(plans) if plan.keep]
    rest = [i for i, plan in enumerate(plans) if not plan.keep]
    if not rest:
        return [[i] for i in alone]
    groups = group_rows(
        config,
        [plans[i] for i in rest],
        [len(rows[i]) for i in rest],
        [before[i] for i in rest],
    )
    return [[rest[i] for i in group] for group in groups] + [[i] for i in alone]


def _counted(
    on_progress: OnProgress | None, lengths: np.ndarray, group: list[int], before: int
) -> Callable[[int], None] | None:
    """Makes a group's callback: it gets the tokens fed per row of the group.

    It passes on the tokens fed of the whole batch.
    """
    if on_progress is None:
        return None
    total, mine = int(lengths.sum()), lengths[group]
    return lambda fed: on_progress(before + int(np.minimum(mine, fed).sum()), total)


def _feed_group(
    model: "Model",
    state: MemoryState,
    rows: list[np.ndarray],
    ratios: np.ndarray,
    keep: Mapping[int, np.ndarray],
    *,
    donate: bool,
    fit: Fit,
    on_fed: Callable[[int], None] | None = None,
) -> tuple[jax.Array, MemoryState]:
    """Feeds a group by one call, and one more per window that keeps raw entries.

    Such a window keeps them beside its beacons. It is left open when it is full, and
    then closed with what is to stay.
    """
    config, window = model.config, state.window
    lengths = np.asarray([len(r) for r in rows])
    longest = max(fit.width, *map(len, rows))
    tokens = padded(rows, longest)
    done, begun = 0, -int(state.raw[0]) if keep else 0

    def fill(state: MemoryState, stop: int, donate: bool, *, close: bool) -> Any:
        count = np.clip(lengths, 0, stop) - done
        here, pieces = tokens[:, done:stop], None
        if on_fed:
            tell, first = on_fed, done
            # A pipeline runs empty at the end of each piece.
            size = fit.piece * window * stages.count(model.net)
            pieces = Pieces(size, lambda count: tell(first + count))
        out, state = feed(
            model.net,
            model.variables,
            state,
            here,
            count,
            ratios,
            outputs="last" if fit.logits else "none",
            close=close,
            donate=donate,
            pieces=pieces,
        )
        return out.last_logits, state

    first = int(state.windows[0]) if keep else 0
    for number in sorted(keep):
        stop = begun + (number - first + 1) * window
        if stop > lengths.max():
            break  # the window stays open
        logits, state = fill(state, stop, donate, close=False)
        place = kept_window(
            Law.of(config), int(state.ratio[0]), keep[number], int(state.slots[0])
        )
        state = keep_entries(
            config,
            state,
            jnp.asarray(place)[None],
            jnp.full((1,), len(place), jnp.int32),
        )
        done, donate = stop, True
        if done == lengths.max():
            return logits, state
    return fill(state, int(lengths.max()), donate, close=True)


def choose_dtype(model: "Model", memory: Memory | None, asked: str | None) -> str:
    """Chooses the dtype of keys and values, as `Model.compress` documents it.

    Raises:
      ValueError: a dtype that no memory has, or that the given one does not have.
    """
    own = model.net.dtype.name
    if asked not in (None, own, "int8"):
        raise ValueError(
            f"memory_dtype={asked!r} is not possible: use 'int8', or None for {own}, "
            "which the model computes in."
        )
    if memory is None:
        return asked or own
    has = memory.dtype
    if asked not in (None, has):
        raise ValueError(
            f"memory_dtype={asked!r}, but the memory is {has} and stays so: leave "
            "memory_dtype out, or compress its text again."
        )
    return has


def choose_recent(
    model: "Model", memory: Memory | None, asked: Reading, keep: bool
) -> bool:
    """Chooses whether rows keep their last full windows raw: as `memory` has it.

    Args:
      keep: spans are given, whose own entries may have to stay beside beacons.

    Raises:
      ArgumentError: what the memory does not have, or what cannot be combined.
    """
    has = bool(asked.recent) if memory is None else memory.recent
    if asked.recent not in (None, has):
        made = "with" if has else "without"
        raise ArgumentError(
            "recent",
            asked.recent,
            f"but the memory was made {made} it and stays so",
            remedy="leave recent out, or compress its text again",
            flags="leave --recent out, or compress its text again",
        )
    if has and model.config.beacon is None:
        raise ArgumentError(
            "recent",
            has,
            "needs beacons, but this model has none and keeps every token",
            remedy="leave recent out",
            flags="leave --recent out",
        )
    if has and keep and asked.lossless == "slots":
        raise ArgumentError(
            "lossless",
            asked.lossless,
            "cannot be combined with recent, whose last full window is compressed when "
            "its spans are no longer known",
            remedy="use lossless='windows'",
            flags="use --lossless=windows",
        )
    return has


def fresh_state(
    model: "Model",
    rows: int,
    capacity: int,
    dtype: str | None = None,
    recent: bool = False,
) -> MemoryState:
    """Makes an empty memory, split over the devices of the model."""
    dtype = choose_dtype(model, None, dtype)
    return leaves.empty(model.config, rows, capacity, dtype, model.partition, recent)


def _nothing(model: "Model", rows: int, fit: Fit) -> MemoryState:
    """Makes a memory of one slot on the host, which only says that it is empty."""
    dtype = choose_dtype(model, None, fit.dtype)
    make = lambda: init_memory(model.config, rows, 1, dtype, fit.recent)
    shape = jax.eval_shape(make)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shape)


def _room(
    config: ModelConfig,
    state: MemoryState,
    ratios: np.ndarray,
    new: np.ndarray,
    capacity: int | None,
    plans: list[Plan],
) -> int:
    """Slots of a buffer that `new` tokens per row fit into."""
    extra = max(sum(map(len, plan.keep.values())) for plan in plans)
    needed = needed_slots(config, state, new, ratios) + extra
    if capacity:
        size = max(capacity, state.capacity)
        if size < needed:
            raise CapacityError(size, needed)
        return size
    if needed <= state.capacity:
        return state.capacity
    return buffer_size(needed, state.window)


def check_memory(model: "Model", memory: Memory | None, rows: int) -> None:
    """Raises ValueError for a memory of other rows or of another model."""
    if memory is None:
        return
    if len(memory) != rows:
        raise ValueError(
            f"memory has {len(memory)} rows for {rows} texts: give one of one row "
            "(memory[i]) or one row per text."
        )
    if memory.identity is not model.identity:
        check_same_model(memory, model)


def decoded_memory(memory: Memory, plans: list[Plan], result: Decoded) -> Memory:
    """Returns the memory after decoding: up to the end of each row's text."""
    rows, law = [], Law.of(memory.config)
    for row, plan, fed, surplus in zip(
        memory.rows, plans, result.fed, result.surplus, strict=True
    ):
        after = row.feed(law, plan.ratios, fed[fed >= 0])
        rows.append(after.cut(after.length - int(surplus)) if surplus else after)
    memory = dataclasses.replace(memory, state=result.memory, rows=tuple(rows))
    return memory.with_rows(memory.rows) if result.surplus.any() else memory
