"""The loop over windows: training loss, feeding, decoding one token.

Every function is pure. One window step is shared by all of them: mixed window ->
decoder over [memory | window] -> beacons' keys and values appended to the memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.attention.device import target
from beacon_jax.core.loss import IGNORE, token_losses, token_scores
from beacon_jax.core.memory import CapacityError, MemoryState
from beacon_jax.core.move import keep_places
from beacon_jax.core.step import (
    NOOP,
    lookup,
    new_entries,
    slots_added,
    window_branches,
)
from beacon_jax.core.windows import open_room, window_slots
from beacon_jax.model.buffers import put_all_layers
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.partition import active, partitioned
from beacon_jax.model.rotary import inverse_frequencies
from beacon_jax.runtime import launched


class FeedOutput(NamedTuple):
    """last_logits: after each row's last new token; the others per new token, undefined
    beyond a row's length and None unless asked for. greedy: the label is the most
    likely token."""

    last_logits: Float[Array, "B V"]
    logits: Float[Array, "B T V"] | None
    token_loss: Float[Array, "B T"] | None
    greedy: Bool[Array, "B T"] | None = None


def row_plans(
    ratios: Int[np.ndarray, "*B P"] | Int[Array, "*B P"], rows: int
) -> Int[np.ndarray, "B P"]:
    """Returns a plan for each row, from one for all of them or one for each."""
    plan = np.asarray(ratios, np.int32)
    return np.broadcast_to(plan, (rows, plan.shape[-1]))


def needed_slots(
    config: ModelConfig,
    memory: MemoryState,
    new_tokens: Int[np.ndarray, " B"],
    ratios: Int[np.ndarray, "*B P"],
) -> int:
    """Returns the capacity that `new_tokens` more need; reads B small numbers back."""
    w = memory.window
    needed = 0
    state = (memory.slots, memory.raw, memory.ratio, memory.windows, new_tokens)
    columns = [np.broadcast_to(np.asarray(x), memory.slots.shape) for x in state]
    plans = row_plans(ratios, memory.rows)
    for slots, raw, ratio, windows, new, plan in zip(*columns, plans, strict=True):
        total, used = int(raw) + int(new), {int(ratio)} if raw else set()
        slots = int(slots)
        for i in range(total // w + 1):
            at = min(int(windows) + i, len(plan) - 1)
            r = int(ratio) if i == 0 and raw else int(plan[at])
            used.add(r)
            if (i + 1) * w <= total:
                slots += window_slots(config, r, first=slots == 0, window=w)
        needed = max(needed, slots + open_room(config, tuple(used), w))
    return needed


def check_capacity(
    config: ModelConfig,
    memory: MemoryState,
    new_tokens: Int[np.ndarray, " B"],
    ratios: Int[np.ndarray, "*B P"],
) -> None:
    """Raises CapacityError unless `new_tokens` more fit."""
    needed = needed_slots(config, memory, new_tokens, ratios)
    if needed > memory.capacity:
        raise CapacityError(memory.capacity, needed)


def static_ratios(
    memory: MemoryState, ratios: Int[np.ndarray, "*B P"]
) -> tuple[int, ...]:
    """Lists the ratios that feeding may meet: planned ones and open windows'."""
    plans, windows = row_plans(ratios, memory.rows), np.asarray(memory.windows)
    opened = np.asarray(memory.ratio)[np.asarray(memory.raw) > 0]
    coming = [p[min(w, len(p) - 1) :] for p, w in zip(plans, windows, strict=True)]
    return tuple(sorted({int(r) for r in np.concatenate([*coming, opened])}))


def _check_shared_plan(memory: MemoryState, lengths, ratios) -> None:
    """A window step has one ratio for all its rows (`lax.switch` on a scalar)."""
    w = memory.window
    raw, opened, windows = (
        np.asarray(x) for x in (memory.raw, memory.ratio, memory.windows)
    )
    total, plans = raw + np.asarray(lengths), row_plans(ratios, memory.rows)
    for step in range(int(-(-total.max(initial=0) // w))):
        rows = [i for i in range(len(total)) if total[i] > step * w]
        used = {
            int(opened[i])
            if step == 0 and raw[i]
            else int(plans[i, min(windows[i] + step, plans.shape[1] - 1)])
            for i in rows
        }
        if len(used) > 1:
            raise ValueError(
                f"ratios={np.asarray(ratios).tolist()} give the rows of this batch "
                f"different ratios {sorted(used)} in one step: feed rows with equal "
                f"plans together."
            )


def feed(
    config: ModelConfig,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    *,
    outputs: str = "last",
    labels: Int[Array, "B T"] | None = None,
    dtype: Any = jnp.float32,
    close: bool = True,
    donate: bool = False,
) -> tuple[FeedOutput, MemoryState]:
    """Feeds a piece of any length to every row (docs/specification.md section 2).

    The whole text in one call, in pieces or token by token gives the same result. One
    compile serves every length up to T; pad to a few values of T.

    Args:
      tokens: right-padded new ids.
      lengths: new tokens per row, 0 allowed.
      ratios: ratio of each window of the sequence by its absolute number, one plan for
        all rows or one per row; the last one goes on. An open window keeps its own.
      outputs: "last", "logits" (all new tokens), "loss" (needs labels, shifted) or
        "score", loss and greedy at few labels behind a long text.
      close: False leaves a last window that is exactly full open, uncompressed.
      donate: the memory passed in is not needed again: its buffer is written in place.

    Raises:
      CapacityError: the memory's buffer is too small; states what is needed.
      ValueError: rows that need different ratios in one step.
    """
    if outputs in ("loss", "score") and labels is None:
        raise ValueError(
            f"labels=None: outputs={outputs!r} needs shifted labels [B, T]."
        )
    plan = row_plans(ratios, memory.rows)
    check_capacity(config, memory, np.asarray(lengths), plan)
    _check_shared_plan(memory, lengths, plan)
    out, memory = feed_jit(
        config,
        variables,
        memory if donate else memory.copy(),
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray(plan),
        jnp.asarray(labels) if labels is not None else None,
        static=static_ratios(memory, plan),
        outputs=outputs,
        dtype=dtype,
        close=close,
        partition=active(),
    )
    launched(out.last_logits)
    return out, memory


@functools.partial(
    jax.jit,
    static_argnames=("config", "static", "outputs", "dtype", "close", "partition"),
    donate_argnames="memory",
)
def feed_jit(
    config,
    variables,
    memory,
    tokens,
    lengths,
    ratios,
    labels,
    *,
    static,
    outputs,
    dtype,
    close=True,
    partition=None,
):
    """`feed` without the host's checks, of a memory that it takes over.

    static: the ratios to compile; partition: that of the caller, an argument because a
    traced program is found again by its arguments alone.
    """
    with partitioned(partition or active()):
        return _feed(
            config,
            variables,
            memory,
            tokens,
            lengths,
            ratios,
            labels,
            static=static,
            outputs=outputs,
            dtype=dtype,
            close=close,
        )


def _feed(
    config,
    variables,
    memory,
    tokens,
    lengths,
    ratios,
    labels,
    *,
    static,
    outputs,
    dtype,
    close,
):
    b, t = tokens.shape
    ratios = jnp.broadcast_to(ratios, (b, ratios.shape[-1]))
    w = memory.window
    n = -(-(t + w) // w)  # an open window may hold w tokens
    raw = memory.raw
    # The open window's tokens go in front: it is run again from its start.
    at = jnp.arange(n * w) - raw[:, None]
    pieces = jnp.concatenate([memory.tokens, tokens], axis=1)
    source = jnp.where(at < 0, jnp.arange(n * w), jnp.minimum(at, t - 1) + w)
    all_tokens = jnp.take_along_axis(pieces, source, axis=1)
    total = raw + lengths
    valid = jnp.clip(total[:, None] - jnp.arange(n) * w, 0, w)  # [B, N]
    at_plan = jnp.minimum(memory.windows[:, None] + jnp.arange(n), ratios.shape[1] - 1)
    planned = jnp.take_along_axis(ratios, at_plan, axis=1)
    goes_on = (jnp.arange(n) == 0) & (raw[:, None] > 0)
    per_row = jnp.where(goes_on, memory.ratio[:, None], planned)  # [B, N]
    index = jnp.max(jnp.where(valid > 0, lookup(per_row, static), NOOP), axis=0)
    shared = jnp.asarray((0, *static))[index]
    final = jnp.where(total > 0, (total - 1) // w, -1)
    begun = total // w if close else jnp.maximum(final, 0)  # windows that close
    all_labels = jnp.full((b, n * w), IGNORE)
    if outputs in ("loss", "score"):
        shifted = jnp.take_along_axis(labels, jnp.clip(at, 0, t - 1), axis=1)
        new = (at >= 0) & (jnp.arange(n * w) < total[:, None])
        all_labels = jnp.where(new, shifted, IGNORE)
    by_step = lambda x: x.reshape(b, n, w).swapaxes(0, 1)
    branches = window_branches(config, static, w, dtype=dtype)
    head = Decoder(config, Layout(1, 1, 0), dtype=dtype)
    logits = lambda h: apply(head, variables, h, method="logits")

    sink = config.beacon.sink if config.beacon else 0
    turns = inverse_frequencies(config)

    def step(carry, x):
        k, v, slots, sinks, last = carry
        # A row that has ended (valid: 0) keeps its open window while others go on.
        hidden, kept, k, v = lax.switch(
            x["index"], branches, variables, x["tokens"], k, v, slots, x["valid"]
        )
        closes = x["step"] < begun
        new = new_entries(config, kept, slots, x["ratio"], k.dtype)
        k = put_all_layers(k, new.k, slots, closes, turns)
        v = put_all_layers(v, new.v, slots, closes, turns)
        sinks = jnp.where(closes & (slots == 0), sink, sinks)
        added = slots_added(config, slots, x["ratio"], w)
        slots = slots + jnp.where(closes, added, 0)
        end = jnp.maximum(x["valid"] - 1, 0)[:, None, None]
        here = jnp.take_along_axis(hidden, end, axis=1)[:, 0]
        last = jnp.where((x["step"] == final)[:, None], here, last)
        out = None
        if outputs == "logits":
            out = logits(hidden)
        elif outputs == "loss":
            out = token_losses(logits, hidden, x["labels"])
        elif outputs == "score":
            out = token_scores(logits, hidden, x["labels"])
        return (k, v, slots, sinks, last), out

    last = jnp.zeros((b, config.hidden_size), dtype)
    carry = (memory.k, memory.v, memory.slots, memory.sinks, last)
    xs = dict(
        tokens=by_step(all_tokens),
        labels=by_step(all_labels),
        valid=valid.T,
        index=index,
        ratio=shared,
        step=jnp.arange(n),
    )
    (k, v, slots, sinks, last), out = lax.scan(step, carry, xs)

    def of_new_tokens(x):
        """[N, B, W, ...] -> [B, T, ...]"""
        x = x.swapaxes(0, 1).reshape(b, n * w, *x.shape[3:])
        new = jnp.minimum(jnp.arange(t) + raw[:, None], n * w - 1)
        new = new.reshape(b, t, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, new, axis=1)

    out = jax.tree.map(of_new_tokens, out)
    last_one = jnp.minimum(begun, n - 1)[:, None]
    opened = jnp.take_along_axis(all_tokens.reshape(b, n, w), last_one[..., None], 1)
    after = MemoryState(
        k=k,
        v=v,
        slots=slots,
        sinks=sinks,
        raw=total - begun * w,
        ratio=jnp.take_along_axis(per_row, last_one, axis=1)[:, 0],
        windows=memory.windows + begun,
        tokens=opened[:, 0],
    )
    given: dict[str, Any] = {"logits": None, "token_loss": None}
    if outputs == "score":
        given["token_loss"], given["greedy"] = out
    elif outputs != "last":
        given["logits" if outputs == "logits" else "token_loss"] = out
    return FeedOutput(logits(last), **given), after


@functools.partial(jax.jit, static_argnames=("config", "static", "dtype"))
def decode_step(
    config: ModelConfig,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    active: Array | None = None,
    *,
    static: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "B V"], MemoryState]:
    """Feeds one token to every active row; inserts beacons and compresses as it goes.

    The ratio is data here (`count % r`), never a switch, so rows may be anywhere in
    their windows. Call `check_capacity` for all tokens to come beforehand.

    Args:
      tokens: next raw token of each row.
      ratios: as in `feed`.
      active: rows that take their token; the others stay as they are.
      static: the ratios that may occur (`static_ratios`); they bound the beacons.

    Returns:
      (float32 logits of each row's token, memory).
    """
    w, b = memory.window, tokens.shape[0]
    active = jnp.ones((b,), bool) if active is None else active
    beacon = config.beacon
    placement = beacon.placement if beacon else "interleave"
    plans = jnp.broadcast_to(ratios, (b, ratios.shape[-1]))
    at = jnp.minimum(memory.windows, ratios.shape[-1] - 1)[:, None]
    planned = jnp.take_along_axis(plans, at, axis=1)[:, 0]
    ratio = jnp.where(memory.raw == 0, planned, memory.ratio)
    memory = memory.replace(ratio=jnp.where(active, ratio, memory.ratio))
    prefix = memory.slots + memory.open_entries(placement)
    raw = memory.raw + 1
    positive = jnp.maximum(memory.ratio, 1)
    compressing = [r for r in static if r > 0]

    def run(beacons):
        model = Decoder(config, Layout(1, 1, beacons), dtype=dtype)

        def forward(k, v):
            hidden, _, k, v = apply(model, variables, tokens[:, None], k, v, prefix)
            return apply(model, variables, hidden[:, 0], method="logits"), k, v

        return forward

    if compressing:
        append = placement == "append"
        due = (raw == w) if append else (raw % positive == 0)
        due = due & (memory.ratio > 0) & active
        most = w // min(compressing) if append else 1
        logits, k, v = _either(
            jnp.any(due),
            lambda x: run(most)(*x[1:]),
            lambda x: run(0)(*x[1:]),
            (jnp.zeros((b, config.vocab_size)), memory.k, memory.v),
        )
    else:
        logits, k, v = run(0)(memory.k, memory.v)

    row = jnp.arange(b)
    column = jnp.minimum(memory.raw, w - 1)
    token = jnp.where(active, tokens, memory.tokens[row, column])
    full = active & (raw == w)
    sink = beacon.sink if beacon else 0
    first = memory.slots == 0
    grown = slots_added(config, memory.slots, memory.ratio, w)
    if compressing:
        moved = functools.partial(
            _compress_open, config, memory.slots, memory.ratio, full, compressing, w
        )
        k, v = _either(jnp.any(full), lambda x: moved(*x), lambda x: x, (k, v))
    return logits, memory.replace(
        k=k,
        v=v,
        slots=memory.slots + jnp.where(full, grown, 0),
        sinks=jnp.where(full & first, sink, memory.sinks),
        raw=jnp.where(active, jnp.where(full, 0, raw), memory.raw),
        windows=memory.windows + full,
        tokens=memory.tokens.at[row, column].set(token),
    )


def _either(
    wanted: Array, body: Callable[[Any], Any], other: Callable[[Any], Any], state: Any
) -> Any:
    """body(state) if `wanted`, else other(state); the state is written in place.

    `lax.cond`, but XLA for CPUs copies the buffers that a branch writes: at x8 behind
    16K tokens of Qwen2-0.5B, 8 rows, twice 0.48 GiB for each token. Loops that run once
    or not at all it does not copy. For H200 and TPU v5e it copies neither way, and
    every loop costs a GPU one more question to the host.
    """
    if target().platform != "cpu":
        return lax.cond(wanted, body, other, state)
    for needed, run in ((wanted, body), (~wanted, other)):
        _, state = lax.while_loop(
            lambda x: x[0],
            lambda x, run=run: (jnp.zeros_like(x[0]), run(x[1])),
            (needed, state),
        )
    return state


def _compress_open(config, slots, ratio, full, ratios, window, k, v):
    """Moves the kept entries of full open windows to the front of them."""
    sink = jnp.where(slots == 0, config.beacon.sink, 0)[:, None]  # [B, 1]
    j = jnp.arange(config.beacon.sink + max(window // r for r in ratios))
    r = jnp.maximum(ratio, 1)[:, None]
    nth = jnp.clip(j - sink, 0, window // r - 1)
    if config.beacon.placement == "append":
        place = window + nth
    else:
        place = (nth + 1) * (r + 1) - 1
    place = jnp.where(j < sink, j, place)  # [B, n] entry of the window in new slot j
    count = jnp.where(full & (ratio > 0), (sink + window // r)[:, 0], 0)
    return keep_places(config, k, v, slots, place, count)
