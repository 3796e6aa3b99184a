"""The loop over windows: training loss, feeding, decoding one token.

Every function is pure. One window step is shared by all of them: mixed window ->
decoder over [memory | window] -> beacons' keys and values appended to the memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.attention.device import target
from beacon_jax.core import plan
from beacon_jax.core.law import Law
from beacon_jax.core.loss import IGNORE, token_losses, token_scores
from beacon_jax.core.memory import MemoryState
from beacon_jax.core.move import keep_places
from beacon_jax.core.step import (
    NOOP,
    lookup,
    new_entries,
    window_branches,
)
from beacon_jax.model.buffers import Buffer, put_all_layers
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
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


def feed(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    *,
    outputs: str = "last",
    labels: Int[Array, "B T"] | None = None,
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
    planned = plan.of_rows(ratios, memory.rows)
    plan.check_capacity(net.config, memory, lengths, planned)
    plan.check_shared(memory, lengths, planned)
    out, memory = feed_jit(
        net,
        variables,
        memory if donate else memory.copy(),
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        jnp.asarray(planned),
        jnp.asarray(labels) if labels is not None else None,
        static=plan.static_ratios(memory, planned),
        outputs=outputs,
        close=close,
    )
    launched(out.last_logits)
    return out, memory


@functools.partial(
    jax.jit,
    static_argnames=("net", "static", "outputs", "close"),
    donate_argnames="memory",
)
def feed_jit(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    labels: Int[Array, "B T"] | None,
    *,
    static: tuple[int, ...],
    outputs: str,
    close: bool = True,
) -> tuple[FeedOutput, MemoryState]:
    """Feeds as `feed` does, without the host's checks, a memory that it takes over.

    Args:
      static: the ratios to compile.
    """
    config, dtype = net.config, net.dtype
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
    planned = plan.at(ratios, memory.windows[:, None] + jnp.arange(n))
    goes_on = (jnp.arange(n) == 0) & (raw[:, None] > 0)
    per_row = jnp.where(goes_on, memory.ratio[:, None], planned)  # [B, N]
    index = jnp.max(jnp.where(valid > 0, lookup(per_row, static), NOOP), axis=0)
    shared = jnp.asarray((0, *static))[index]
    final = jnp.where(total > 0, (total - 1) // w, -1)
    begun = total // w if close else jnp.maximum(final, 0)  # windows that close
    all_labels = jnp.full((b, n * w), IGNORE)
    if outputs in ("loss", "score"):
        assert labels is not None
        shifted = jnp.take_along_axis(labels, jnp.clip(at, 0, t - 1), axis=1)
        new = (at >= 0) & (jnp.arange(n * w) < total[:, None])
        all_labels = jnp.where(new, shifted, IGNORE)
    by_step = lambda x: x.reshape(b, n, w).swapaxes(0, 1)
    branches = window_branches(net, static, w)
    head = Decoder(net, Layout(1, 1, 0))
    logits = lambda h: apply(head, variables, h, method="logits")

    law, turns = Law.of(config, w), inverse_frequencies(config)

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
        sinks = jnp.where(closes & (slots == 0), law.sink, sinks)
        slots = slots + jnp.where(closes, law.kept(x["ratio"], slots), 0)
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


@functools.partial(jax.jit, static_argnames=("net", "static"))
def decode_step(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    active: Array | None = None,
    *,
    static: tuple[int, ...],
) -> tuple[Float[Array, "B V"], MemoryState]:
    """Feeds one token to every active row; inserts beacons and compresses as it goes.

    The ratio is data here (`count % r`), never a switch, so rows may be anywhere in
    their windows. Call `plan.check_capacity` for all tokens to come beforehand.

    Args:
      tokens: next raw token of each row.
      ratios: as in `feed`.
      active: rows that take their token; the others stay as they are.
      static: the ratios that may occur (`plan.static_ratios`); they bound the beacons.

    Returns:
      (float32 logits of each row's token, memory).
    """
    config, w, b = net.config, memory.window, tokens.shape[0]
    law = Law.of(config, w)
    active = jnp.ones((b,), bool) if active is None else active
    plans = jnp.broadcast_to(ratios, (b, ratios.shape[-1]))
    planned = plan.at(plans, memory.windows[:, None])[:, 0]
    ratio = jnp.where(memory.raw == 0, planned, memory.ratio)
    memory = memory.replace(ratio=jnp.where(active, ratio, memory.ratio))
    raw = memory.raw + 1
    entries = law.entries(memory.ratio, memory.raw)
    prefix = memory.slots + entries
    compressing = [r for r in static if r > 0]

    def run(beacons):
        model = Decoder(net, Layout(1, 1, beacons))

        def forward(k, v):
            hidden, _, k, v = apply(model, variables, tokens[:, None], k, v, prefix)
            return apply(model, variables, hidden[:, 0], method="logits"), k, v

        return forward

    if compressing:
        due = (law.entries(memory.ratio, raw) > entries + 1) & active
        append = law.placement == "append"
        most = int(law.beacons(min(compressing), w)) if append else 1
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
    grown = law.kept(memory.ratio, memory.slots)
    if compressing:
        moved = functools.partial(
            _compress_open, config, memory.slots, memory.ratio, full, compressing, law
        )
        k, v = _either(jnp.any(full), lambda x: moved(*x), lambda x: x, (k, v))
    return logits, memory.replace(
        k=k,
        v=v,
        slots=memory.slots + jnp.where(full, grown, 0),
        sinks=jnp.where(full & (memory.slots == 0), law.sink, memory.sinks),
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


def _compress_open(
    config: ModelConfig,
    slots: Int[Array, " B"],
    ratio: Int[Array, " B"],
    full: Bool[Array, " B"],
    ratios: list[int],
    law: Law,
    k: Buffer,
    v: Buffer,
) -> tuple[Buffer, Buffer]:
    """Moves the kept entries of full open windows to the front of them."""
    slots, ratio = slots[:, None], ratio[:, None]
    most = max(int(law.kept(r, 0)) for r in ratios)
    place = law.place(ratio, slots, jnp.arange(most))  # [B, n]
    count = jnp.where(full[:, None] & (ratio > 0), law.kept(ratio, slots), 0)
    return keep_places(config, k, v, slots[:, 0], place, count[:, 0])
