"""Feeds text of any length into memories: a scan over windows, whole or in pieces."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core import pipeline, plan
from beacon_jax.core.law import Law
from beacon_jax.core.loss import (
    IGNORE,
    Likely,
    token_likely,
    token_losses,
    token_scores,
)
from beacon_jax.core.memory import MemoryState
from beacon_jax.core.step import NOOP, Carry, lookup, window_branches
from beacon_jax.model import stages
from beacon_jax.model.decoder import Decoder, apply
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.runtime import launched

_OF_LABELS = ("loss", "score", "likely")  # outputs that need labels


class FeedOutput(NamedTuple):
    """Outputs of `feed`; those of each token are undefined beyond a row's length.

    Attributes:
      last_logits: after each row's last new token.
      logits, token_loss: of each new token; None unless asked for.
      greedy: whether the label is the most likely token; None unless asked for.
      likely: how likely labels and other tokens are; None unless asked for.
    """

    last_logits: Float[Array, "B V"]
    logits: Float[Array, "B T V"] | None
    token_loss: Float[Array, "B T"] | None
    greedy: Bool[Array, "B T"] | None = None
    likely: Likely | None = None


class Pieces(NamedTuple):
    """How a long text is fed in several scans of one program.

    Attributes:
      size: tokens per scan, a multiple of the window.
      fed: called with the number of tokens fed so far after each scan, so that a long
        text can show its progress.
    """

    size: int
    fed: Callable[[int], None]


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
    """Feeds a piece of any length to every row (docs/specification.md section 2).

    The whole text in one call, in pieces or token by token gives the same result. The
    scan's length is the number of windows; for outputs="last" rounded up to a power of
    two, so that one compiled program serves a doubling of lengths. Windows behind a
    row's end cost nothing.

    Args:
      tokens: right-padded new ids.
      lengths: new tokens per row, 0 allowed; None: T for all.
      ratios: ratio of each window of the sequence by its absolute number, one plan for
        all rows or one per row (equal in every step of this call); the last one goes
        on. An open window keeps its own.
      outputs: "last", "logits" (all new tokens), "loss" (needs labels, shifted),
        "score", loss and greedy at few labels behind a long text, or "likely".
      close: False leaves a last window that is exactly full open, uncompressed.
      donate: the memory passed in is not needed again: its buffer is written in place.
      pieces: several scans in place of one.

    Raises:
      CapacityError: the memory's buffer is too small; states what is needed.
      ValueError: rows that need different ratios in one step, no labels where outputs
        needs them, pieces that are no multiple of the window, or rows that keep their
        last full windows raw.
    """
    w, (rows, total) = memory.window, tokens.shape
    if outputs in _OF_LABELS and labels is None:
        raise ValueError(
            f"labels=None: outputs={outputs!r} needs shifted labels [B, T]."
        )
    if pieces and (pieces.size < 1 or pieces.size % w):
        raise ValueError(f"piece={pieces.size} must be a multiple of the window, {w}.")
    tokens = np.asarray(tokens)  # once: pieces of it go to the device
    labels = None if labels is None else np.asarray(labels)
    planned = plan.of_rows(ratios, rows)
    lengths = np.full(rows, total) if lengths is None else np.asarray(lengths)
    lengths = lengths.astype(np.int32)
    if memory.recent is not None:
        raise ValueError("memory.recent is not None: use core.recent.feed for it.")
    plan.check_capacity(net.config, memory, lengths, planned)
    plan.check_shared(memory, lengths, planned)
    given = (memory if donate else memory.copy(), tokens, lengths, planned)
    return scan_windows(
        net,
        variables,
        *given,
        outputs=outputs,
        labels=labels,
        close=close,
        pieces=pieces,
    )


def scan_windows(
    net: Net,
    variables: dict[str, Any],
    memory: MemoryState,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    ratios: Int[np.ndarray, "B P"],
    *,
    outputs: str = "last",
    labels: Int[np.ndarray, "B T"] | None = None,
    close: bool = True,
    pieces: Pieces | None = None,
) -> tuple[FeedOutput, MemoryState]:
    """Feeds as `feed` does, without its checks; takes the memory over."""
    w, total = memory.window, tokens.shape[1]
    static = plan.static_ratios(memory, ratios)
    windows = max(-(-total // w), 1)
    # All tokens' outputs would run the head over the windows of the rounding, too.
    size = w * (power_of_two(windows) if outputs == "last" else windows)
    size = min(pieces.size, size) if pieces else size
    found: list[FeedOutput] = []
    for start in range(0, max(total, 1), size):
        here = slice(start, start + size)
        count = np.clip(lengths - start, 0, size)
        wanted = None if labels is None else padded(labels[:, here], size, IGNORE)
        out, memory = feed_jit(
            net,
            variables,
            memory,
            padded(tokens[:, here], size),
            count,
            ratios,
            wanted,
            static=static,
            outputs=outputs,
            close=close or start + size < total,
        )
        if found:  # a row that ended in an earlier piece keeps the logits it had there
            goes_on = count[:, None] > 0
            last = jnp.where(goes_on, out.last_logits, found[-1].last_logits)
            out = out._replace(last_logits=last)
        found.append(out)
        launched(out.last_logits)
        if pieces:
            jax.block_until_ready(out.last_logits)
            pieces.fed(min(start + size, total))
    per_token = zip(*(out[1:] for out in found), strict=True)
    joined = (None if x[0] is None else _joined(x, total) for x in per_token)
    return FeedOutput(found[-1].last_logits, *joined), memory


def padded(rows: Iterable[Any], size: int, fill: int = 0) -> Int[np.ndarray, "B size"]:
    """Pads rows of ids, of any lengths up to `size`, at the right; on the host."""
    rows = list(rows)
    out = np.full((len(rows), size), fill, np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out


def _joined(parts: tuple[Any, ...], total: int) -> Any:
    """Joins [B, size, ...] of all pieces to [B, T, ...]."""

    def join(*parts: Array) -> Array:
        whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        return whole if whole.shape[1] == total else whole[:, :total]

    return jax.tree.map(join, *parts)


def power_of_two(n: int) -> int:
    """Returns the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


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
    """Feeds as `feed` does, without its checks on the host; takes the memory over.

    Args:
      static: the ratios to compile.
    """
    config, t = net.config, tokens.shape[1]
    law = Law.of(config, memory.window)
    laid = _lay_out(memory, tokens, lengths, ratios, static, close)
    xs = laid.steps
    if labels is not None and outputs in _OF_LABELS:
        shifted = jnp.take_along_axis(labels, jnp.clip(laid.at, 0, t - 1), axis=1)
        shifted = jnp.where(laid.new, shifted, IGNORE)
        xs = xs | {"labels": _by_window(shifted, law.window)}

    last = jnp.zeros((memory.rows, config.hidden_size), net.dtype)
    carry = Carry(memory.k, memory.v, memory.slots, memory.sinks, last)
    if stages.count(net) > 1:
        scan = functools.partial(pipeline.scan, net, law, static)
        carry, out = scan(functools.partial(_told, outputs), variables, carry, xs)
    else:
        branches = window_branches(net, static, law.window)

        def step(carry, x):
            # A row that has ended (valid: 0) keeps its open window while others go on.
            hidden, kept, k, v = lax.switch(
                x["index"],
                *(branches, variables, x["tokens"]),
                *(carry.k, carry.v, carry.slots, x["valid"]),
            )
            carry = carry._replace(k=k, v=v).after(config, law, hidden, kept, x)
            return carry, _told(outputs, net, variables, hidden, x)

        carry, out = lax.scan(step, carry, xs)
    k, v, slots, sinks, last = carry
    place = jnp.minimum(jnp.arange(t) + memory.raw[:, None], laid.at.shape[1] - 1)

    def of_new_tokens(x):
        """Takes the new tokens' places: [N, B, W, ...] -> [B, T, ...]."""
        x = x.swapaxes(0, 1).reshape(len(place), -1, *x.shape[3:])
        at = place.reshape(*place.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, at, axis=1)

    given = {"logits": None, "token_loss": None} | jax.tree.map(of_new_tokens, out)
    after = laid.opened.replace(k=k, v=v, slots=slots, sinks=sinks)
    return FeedOutput(_logits(net, variables, last), **given), after


def _logits(net: Net, variables: Any, hidden: Float[Array, "*B D"]) -> Any:
    return apply(Decoder(net, Layout(1, 1, 0)), variables, hidden, method="logits")


def _told(
    outputs: str,
    net: Net,
    variables: Any,
    hidden: Float[Array, "B W D"],
    x: dict[str, Array],
) -> dict[str, Any]:
    """Returns what is asked for of each token of a window."""
    logits, out = functools.partial(_logits, net, variables), {}
    if outputs == "logits":
        out["logits"] = logits(hidden)
    elif outputs == "loss":
        out["token_loss"] = token_losses(logits, hidden, x["labels"])
    elif outputs == "score":
        scores = token_scores(logits, hidden, x["labels"])
        out["token_loss"], out["greedy"] = scores
    elif outputs == "likely":
        out["likely"] = token_likely(logits, hidden, x["labels"])
    return out


class _Laid(NamedTuple):
    """Old and new tokens of every row, laid out in N windows.

    Attributes:
      steps: of each window: tokens [N, B, W]; valid [N, B], how many are real; index
        [N] of the branch and ratio [N], which rows share; closes [N, B], rows whose
        window is compressed; ends [N, B], rows whose last token is in it.
      at: number of the new token at each place [B, N W]; negative in the open window.
      new: places [B, N W] of new tokens that are real.
      opened: the memory afterwards, but for its slots and buffers.
    """

    steps: dict[str, Array]
    at: Int[Array, "B NW"]
    new: Bool[Array, "B NW"]
    opened: MemoryState


def _lay_out(
    memory: MemoryState,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    ratios: Int[Array, "*B P"],
    static: tuple[int, ...],
    close: bool,
) -> _Laid:
    """Lays tokens out behind those of the open window, which runs again from its start.

    So a program knows where beacons stand when it is compiled.
    """
    (b, t), w, raw = tokens.shape, memory.window, memory.raw
    n = -(-(t + w) // w)  # an open window may hold w tokens
    window, place = jnp.arange(n), jnp.arange(n * w)
    at = place - raw[:, None]
    pieces = jnp.concatenate([memory.tokens, tokens], axis=1)
    source = jnp.where(at < 0, place, jnp.minimum(at, t - 1) + w)
    all_tokens = jnp.take_along_axis(pieces, source, axis=1)
    total = raw + lengths
    valid = jnp.clip(total[:, None] - window * w, 0, w)  # [B, N]
    plans = jnp.broadcast_to(ratios, (b, ratios.shape[-1]))
    planned = plan.at(plans, memory.windows[:, None] + window)
    goes_on = (window == 0) & (raw[:, None] > 0)
    used = jnp.where(goes_on, memory.ratio[:, None], planned)  # [B, N]
    index = jnp.max(jnp.where(valid > 0, lookup(used, static), NOOP), axis=0)
    final = jnp.where(total > 0, (total - 1) // w, -1)
    begun = total // w if close else jnp.maximum(final, 0)  # windows that close
    steps = {
        "tokens": _by_window(all_tokens, w),
        "valid": valid.T,
        "index": index,
        "ratio": jnp.asarray((0, *static))[index],
        "closes": window[:, None] < begun,
        "ends": window[:, None] == final,
    }
    here = jnp.minimum(begun, n - 1)[:, None]
    opened = memory.replace(
        raw=total - begun * w,
        ratio=jnp.take_along_axis(used, here, axis=1)[:, 0],
        windows=memory.windows + begun,
        tokens=jnp.take_along_axis(all_tokens, here * w + jnp.arange(w), axis=1),
    )
    return _Laid(steps, at, (at >= 0) & (place < total[:, None]), opened)


def _by_window(x: Array, window: int) -> Int[Array, "N B W"]:
    """Cuts rows into windows: [B, N W] -> [N, B, W]."""
    return x.reshape(len(x), -1, window).swapaxes(0, 1)
