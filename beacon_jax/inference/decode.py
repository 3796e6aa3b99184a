"""Generates tokens: one jitted loop over sampling and the model's next step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from beacon_jax.core.decode import decode_step
from beacon_jax.core.loss import Likely, likely
from beacon_jax.core.memory import MemoryState
from beacon_jax.core.plan import check_capacity, of_rows, static_ratios
from beacon_jax.core.recent import settle
from beacon_jax.inference.finite import check_finite
from beacon_jax.inference.sampling import Sampling, row_keys, row_seeds, sample
from beacon_jax.model.net import Net

# Tokens per call of the loop: text appears that often, one compile for all. The first
# call makes one token, which nobody has to wait for 15 others for.
BLOCK = 16

NO_NUMBER = -2  # in place of a token: the logits were not finite

# (row, its new tokens [n] so far) -> how many of them to keep if it is done, or None.
Finished = Callable[[int, Int[np.ndarray, " n"]], int | None]


class Decoded(NamedTuple):
    """The result of `decode`.

    Attributes:
      tokens: int32 [B, n], padded with -1 behind each row's end.
      lengths: [B] tokens per row; the end token is not among them.
      logits: [B, V] after the last token that each row was fed. If `finished` ended a
        row, that token lies behind the row's end.
      memory: holds the tokens above besides what it held, and `surplus` more.
      surplus: [B] tokens that the memory holds behind the end of a row. They are in it
        only if `finished` ended the row and a window was closed between there and the
        end of the block (`BLOCK`): cut them off, or do not continue this row. 0 for
        all other rows.
      fed: int32 [B, n + surplus], all tokens fed including the surplus, -1 behind.
    """

    tokens: Int[np.ndarray, "B n"]
    lengths: Int[np.ndarray, " B"]
    logits: Float[Array, "B V"]
    memory: MemoryState
    surplus: Int[np.ndarray, " B"]
    fed: Int[np.ndarray, "B m"]


class Decoding(NamedTuple):
    """Settings of decoding.

    Attributes:
      max_new_tokens: one number, or one per row.
      sampling: numbers for all rows or one per row (`make_sampling`).
      seeds: one per row, or one number (`row_seeds` says how rows differ then).
      seen: tokens of each row so far (`seen_tokens`), of the repetition penalty.
      eos_ids: end tokens; None: those of the config.
      finished: called after each block for every row that went on in it, with all its
        new tokens; a row is done once it returns how many of them to keep.
      on_tokens: called with each block [B, <= BLOCK] as it is ready, after `finished`,
        without what that took away; what earlier calls passed on stays passed on.
    """

    max_new_tokens: int | Sequence[int] | np.ndarray
    sampling: Sampling
    seeds: int | Sequence[int] | np.ndarray = 0
    seen: Bool[np.ndarray, "B V"] | None = None
    eos_ids: tuple[int, ...] | None = None
    finished: Finished | None = None
    on_tokens: Callable[[np.ndarray], None] | None = None


class Rows(NamedTuple):
    """Settings of each row.

    Attributes:
      sampling, seeds: [B].
      limits: new tokens, counted from the first; a row stops there.
      start: number of the next token among the new ones, of all rows or of each.
      steps: tokens per row that the loop makes at most; BLOCK or fewer.
      told: whether somebody asks how likely the tokens were (`Loop.likely`).
    """

    sampling: Sampling
    seeds: UInt32[Array, " B"] | UInt32[np.ndarray, " B"]
    limits: Int[Array, " B"] | Int[np.ndarray, " B"]
    start: Int[Array, "*B"] | Int[np.ndarray, "*B"] | np.int32 = np.int32(0)
    steps: Int[Array, ""] | np.int32 = np.int32(BLOCK)
    told: Bool[Array, ""] | np.bool_ = np.True_


class Loop(NamedTuple):
    """The state that blocks pass on besides the memory: all that `sample` needs.

    Attributes:
      likely: how likely the tokens of the block were [B, BLOCK]; None: nobody asks.
    """

    logits: Float[Array, "B V"]
    active: Bool[Array, " B"] | Bool[np.ndarray, " B"]
    seen: Bool[Array, "B V"] | Bool[np.ndarray, "B V"] | None
    likely: Likely | None = None


@functools.partial(
    jax.jit,
    static_argnames=("net", "eos_ids", "static", "steady"),
    donate_argnames="memory",
)
def decode_block(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    loop: Loop,
    ratios: Int[Array, "B P"],
    asked: Rows,
    *,
    eos_ids: tuple[int, ...],
    static: tuple[int, ...],
    steady: bool = False,
) -> tuple[Int[Array, "B n"], Loop, MemoryState]:
    """Generates up to BLOCK tokens per row.

    The memory is donated: its buffer is written in place. Where rows keep their last
    full window raw, the loop ends when an open window is full (`recent.settle`). A row
    whose logits are not finite ends with NO_NUMBER: its arg max would be a token.
    `steady`: see `decode_step`.
    """
    ends = jnp.asarray(eos_ids, jnp.int32)
    rows = jnp.arange(loop.logits.shape[0])

    def unfinished(state: tuple) -> jax.Array:
        step, _, loop, memory = state
        goes_on = (step < asked.steps) & loop.active.any()
        if memory.recent is not None:
            goes_on &= ~_full(memory).any()
        return goes_on

    def body(state: tuple) -> tuple:
        step, tokens, (logits, active, seen, told), memory = state
        number = asked.start + step
        keys = row_keys(asked.seeds, number)
        token = sample(keys, logits, asked.sampling, seen)
        finite = jnp.isfinite(logits).all(axis=-1)
        nothing = jnp.where(active & ~finite, NO_NUMBER, -1)
        active &= finite & ~jnp.isin(token, ends)
        tokens = tokens.at[:, step].set(jnp.where(active, token, nothing))
        if seen is not None:
            seen = seen.at[rows, token].max(active)
        if told is not None:
            told = _tell(told, step, asked.told, logits, token)
        new, memory = decode_step(
            net,
            variables,
            memory,
            jnp.where(active, token, 0),
            ratios,
            active,
            static=static,
            steady=steady,
        )
        logits = jnp.where(active[:, None], new, logits)
        active &= number + 1 < asked.limits
        return step + 1, tokens, Loop(logits, active, seen, told), memory

    tokens = jnp.full((len(rows), BLOCK), -1, jnp.int32)
    state = (jnp.int32(0), tokens, loop, memory)
    _, tokens, loop, memory = jax.lax.while_loop(unfinished, body, state)
    return tokens, loop, memory


def decode(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    logits: Float[Array, "B V"],
    ratios: Int[np.ndarray, "*B P"],
    asked: Decoding,
    *,
    donate: bool = False,
) -> Decoded:
    """Continues each row until an end token, its `max_new_tokens` or `finished`.

    Every returned token is also fed, so that the memory can be continued from. A row
    that has ended costs nothing but its share of the batch; no row's tokens depend on
    the others.

    Args:
      memory: has room for the new tokens.
      logits: after each row's last token, from `feed` or an earlier `decode`.
      ratios: of the windows of the whole sequence, counted from its first token; one
        plan for all rows or one per row.
      donate: the memory is not needed again: its buffer is written in place. Otherwise
        it is copied, and stays as it is.

    Raises:
      ValueError: max_new_tokens below 1, a repetition penalty without `seen`, settings
        for another number of rows, or logits that are not finite.
      CapacityError: the memory is too small; it states the capacity needed.
    """
    rows = logits.shape[0]
    limits = _limits(asked.max_new_tokens, rows)
    sampling = _settings(asked.sampling, asked.seen, rows)
    ends = net.config.eos_ids if asked.eos_ids is None else tuple(asked.eos_ids)
    plans = of_rows(ratios, rows)
    check_capacity(net.config, memory, limits, plans)
    static = static_ratios(memory, plans)
    if not donate:
        memory = memory.copy()
    # Small arguments stay numpy: each operation on the device is a program of its own.
    loop = Loop(logits, np.ones(rows, bool), asked.seen)
    seeds, steps = row_seeds(asked.seeds, rows), np.int32(BLOCK)
    every = Rows(sampling, seeds, limits, steps=steps)
    fed = np.full((rows, 0), -1, np.int32)
    keep = np.full(rows, -1)  # tokens to keep of a row that `finished` ended
    most, start, stop = int(limits.max()), 0, 1
    while start < most:
        block, loop, memory = decode_block(
            net,
            variables,
            memory,
            loop,
            plans,
            every._replace(
                limits=limits if start else np.minimum(limits, stop),
                start=np.int32(start),
            ),
            eos_ids=ends,
            static=static,
        )
        if memory.recent is not None and np.asarray(_full(memory)).any():
            stop = start + int((np.asarray(block) >= 0).any(axis=0).sum())
            memory = settle(net, variables, memory)
        # A loop's last block has empty columns behind the largest limit.
        block = np.asarray(block)[:, : min(stop, most) - start]
        check_finite(block != NO_NUMBER, "logits", net.dtype.name)
        fed = np.concatenate([fed, block], axis=1)
        active = np.array(loop.active)
        if start == 0:  # its limit stopped rows that go on
            active = (block[:, 0] >= 0) & (limits > stop)
            loop = loop._replace(active=active)
        if asked.finished:
            _ask(asked.finished, fed, start, keep)
            active &= keep < 0
            loop = loop._replace(active=active)
        if asked.on_tokens:
            asked.on_tokens(_kept(fed, keep)[:, start:])
        if not active.any():
            break
        start, stop = stop, stop + BLOCK
    return _decoded(fed, keep, loop.logits, memory)


def _tell(
    told: Likely, step: jax.Array, wanted: Any, logits: jax.Array, tokens: jax.Array
) -> Likely:
    """Writes down how likely the tokens of a step were, if somebody asks."""

    def write(told: Likely) -> Likely:
        new = likely(logits, tokens)
        return jax.tree.map(lambda whole, x: whole.at[:, step].set(x), told, new)

    return jax.lax.cond(wanted, write, lambda told: told, told)


def _full(memory: MemoryState) -> Bool[Array, " B"]:
    """Says which open windows are full."""
    return memory.raw == memory.window


def _limits(max_new_tokens: Any, rows: int) -> Int[np.ndarray, " B"]:
    given = np.asarray(max_new_tokens, np.int32)
    if given.ndim and given.shape != (rows,):
        raise ValueError(
            f"max_new_tokens has shape {given.shape} for {rows} rows: one per row."
        )
    if given.min(initial=1) < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    return np.broadcast_to(given, (rows,))


def _settings(sampling: Sampling, seen: Any, rows: int) -> Sampling:
    """Returns the settings as one per row, checked against the batch."""
    for name, value in vars(sampling).items():
        if value.ndim and value.shape != (rows,):
            raise ValueError(
                f"{name} has shape {value.shape} for {rows} rows: one per row."
            )
    penalty = np.atleast_1d(np.asarray(sampling.repetition_penalty))
    if seen is None and (penalty != 1).any():
        raise ValueError(
            f"repetition_penalty={penalty.tolist()} needs to know the rows' tokens: "
            "give seen=seen_tokens(rows, vocab_size)."
        )
    return sampling.for_rows(rows)


def _ask(finished: Finished, fed: np.ndarray, start: int, keep: np.ndarray) -> None:
    """Writes into `keep` what `finished` says of the rows of the last block."""
    for row in np.flatnonzero(fed[:, start] >= 0):
        answer = finished(int(row), fed[row][fed[row] >= 0])
        if answer is not None:
            keep[row] = answer


def _kept(fed: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Returns the tokens fed, -1 behind the end of each row."""
    column = np.arange(fed.shape[1])
    beyond = (keep[:, None] >= 0) & (column >= keep[:, None])
    return np.where(beyond, -1, fed)


def _decoded(fed, keep, logits, memory: MemoryState) -> Decoded:
    """Cuts the rows that `finished` ended, as far as that needs no feeding again."""
    tokens = _kept(fed, keep)
    count = lambda tokens: (tokens >= 0).sum(axis=1)
    lengths, surplus = count(tokens), count(fed) - count(tokens)
    if surplus.any():
        # Entries of the open window do not depend on those behind them, and `raw`
        # tokens of it are visible: fewer of them is the memory before the others.
        raw = np.asarray(memory.raw)
        back = np.where(surplus <= raw, surplus, 0)
        memory = memory.replace(raw=jnp.asarray(raw - back))
        surplus = surplus - back
    most = max(int(lengths.max()), 1)
    held = max(int((lengths + surplus).max()), 1)
    column = np.arange(held)
    fed = np.where(column < (lengths + surplus)[:, None], fed[:, :held], -1)
    return Decoded(tokens[:, :most], lengths, logits, memory, surplus, fed)
