"""Runs one window: a branch for each static ratio, and what enters the memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.model.buffers import Buffer, put_all_layers
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import (
    QUERIES,
    Decoder,
    Entries,
    Layer,
    apply,
    constrain_entries,
    place_of,
)
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, inverse_frequencies, rotate

# Branches of a window step are NOOP, then the static ratios (those that are compiled)
# in order.
NOOP = 0

# A branch: (variables, tokens, k, v, slots, valid) -> (hidden, entries kept, k, v).
type Branch = Callable[..., tuple[Array, Entries, Buffer, Buffer]]


def layout_of(config: ModelConfig, ratio: int, window: int) -> Layout:
    """Returns where raw tokens and beacons stand in a window at a ratio."""
    return Layout.of_window(window, ratio, Law.of(config).placement)


class Seen(NamedTuple):
    """What a layer's attention has seen, rotated: T queries, keys of S entries."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]


class Window(NamedTuple):
    """A full window at one static ratio, in parts for a backward pass layer by layer.

    `outer` are the variables without "layers", `layer` those of one layer.

    Attributes:
      length: T, raw tokens and beacons.
      kept: number of entries that may enter the memory, n.
      begin: (outer, tokens [B, W]) -> x [B, T, D].
      layer: (layer, x, k [B, S, K, H], v, prefix [B]) -> (x, Entries [B, n, K, H],
        Seen or None).
      finish: (outer, x) -> hidden [B, W, D] of the raw rows.
      on: net -> the window on another net, that of a stage.
    """

    length: int
    kept: int
    begin: Callable[..., Any]
    layer: Callable[..., Any]
    finish: Callable[..., Any]
    on: Callable[[Net], "Window"]


def training_window(
    net: Net,
    ratio: int,
    window: int,
    keep: tuple[int, ...],
    *,
    remat: bool = False,
    watched: bool = False,
) -> Window:
    """Makes the parts of a window.

    Args:
      window: W, its raw tokens.
      keep: entries that may enter the memory.
      remat: keep of the attention what its backward pass needs, but not the buffer with
        the window written into it.
      watched: its layers tell what their attention has `Seen`.
    """
    layout = layout_of(net.config, ratio, window)
    model, one = Decoder(net, layout, keep), Layer(net, layout, keep, remat)

    def layer(variables, x, k, v, prefix):
        place = place_of(net.config, layout, prefix)
        if not watched:
            x, kept, *_ = apply(one, variables, x, k, v, place)
            return x, kept, None
        found, told = one.apply(variables, x, k, v, place, mutable=[QUERIES])
        queries: Any = told[QUERIES]
        x, kept, k, _ = found
        return x, kept, Seen(queries["attention"]["rotated"][0], k)

    return Window(
        length=layout.length,
        kept=len(keep),
        begin=lambda outer, tokens: apply(model, outer, tokens, method="begin"),
        layer=layer,
        finish=lambda outer, x: apply(model, outer, x, method="finish"),
        on=lambda net: training_window(
            net, ratio, window, keep, remat=remat, watched=watched
        ),
    )


class Carry(NamedTuple):
    """What feeding hands from window to window; layers as many as are at hand.

    Attributes:
      k, v: the buffers.
      slots, sinks: as `MemoryState` has them.
      last: hidden state of each row's last token.
    """

    k: Buffer
    v: Buffer
    slots: Int[Array, " B"]
    sinks: Int[Array, " B"]
    last: Float[Array, "B D"]

    def after(
        self,
        config: ModelConfig,
        law: Law,
        hidden: Float[Array, "B W D"],
        kept: Entries,
        x: dict[str, Array],
    ) -> "Carry":
        """Returns it behind a window in the buffers, compressed if it closes.

        Args:
          x: of the window: ratio; valid, closes and ends [B].
        """
        closes, slots = x["closes"], self.slots
        k, v = append(config, (self.k, self.v), kept, slots, x["ratio"], closes)
        sinks = jnp.where(closes & (slots == 0), law.sink, self.sinks)
        grown = slots + jnp.where(closes, law.kept(x["ratio"], slots), 0)
        end = jnp.maximum(x["valid"] - 1, 0)[:, None, None]
        here = jnp.take_along_axis(hidden, end, axis=1)[:, 0]
        last = jnp.where(x["ends"][:, None], here, self.last)
        return Carry(k, v, grown, sinks, last)


def window_branches(net: Net, ratios: tuple[int, ...], window: int) -> list[Branch]:
    """Makes the branches of feeding: NOOP, and one per static ratio in order.

    All return as many entries, the most that any of them keeps; the rest is padding.
    """
    law = Law.of(net.config, window)
    most = max(len(law.kept_entries(r)) for r in ratios)

    def branch(ratio):
        keep = tuple(law.kept_entries(ratio).tolist())
        model = Decoder(net, layout_of(net.config, ratio, window), keep)

        def run(variables, tokens, k, v, slots, valid):
            hidden, kept, k, v = apply(model, variables, tokens, k, v, slots, valid)
            return hidden, pad_entries(kept, most), k, v

        return run

    def noop(variables, tokens, k, v, slots, valid):
        c, b = net.config, tokens.shape[0]
        hidden = jnp.zeros((b, window, c.hidden_size), net.dtype)
        shape = (c.num_layers, b, most, c.num_kv_heads, c.head_dim)
        empty = jnp.zeros(shape, net.dtype)
        return hidden, Entries(empty, empty), k, v

    return [noop, *(branch(r) for r in ratios)]


def pad_entries(entries: Entries, size: int) -> Entries:
    """Pads [..., n, K, H] with zeros to [..., size, K, H]."""
    axes = [(0, 0)] * (entries.k.ndim - 3)
    pad = [*axes, (0, size - entries.k.shape[-3]), (0, 0), (0, 0)]
    return Entries(*(jnp.pad(x, pad) for x in entries))


def new_entries(
    config: ModelConfig,
    kept: Entries,
    slots: Int[Array, " B"],
    ratio: Int[Array, ""],
    dtype: Any,
) -> Entries:
    """Turns kept entries [sink | beacons] into slots that enter the memory.

    Sinks stay in front of the first compressed window only; elsewhere they are moved
    behind the beacons, where the caller counts them as dead. Keys get the rotation of
    their slot.

    Args:
      kept: [L, B, n, K, H], keys not rotated.
      slots: of each row in front of them.
      ratio: of the window, traced.
      dtype: of the buffers.
    """
    if sink := Law.of(config).sink:
        away = jnp.where(ratio > 0, -sink, 0)
        first = (slots == 0)[None, :, None, None, None]
        kept = Entries(*(jnp.where(first, x, jnp.roll(x, away, axis=2)) for x in kept))
    cos, sin = cos_sin(config, slots[:, None] + jnp.arange(kept.k.shape[2]))
    return Entries(rotate(kept.k, cos, sin).astype(dtype), kept.v.astype(dtype))


def empty_buffers(net: Net, rows: int, slots: int) -> Entries:
    """Makes buffers [L, B, S, K, H] of a training loop, split over the mesh."""
    c = net.config
    shape = (c.num_layers, rows, slots, c.num_kv_heads, c.head_dim)
    return constrain_entries(
        net, Entries(jnp.zeros(shape, net.dtype), jnp.zeros(shape, net.dtype))
    )


def count_slots(
    law: Law, plan: Int[Array, " N"], closes: Bool[Array, "N B"]
) -> tuple[Int[Array, "N B"], Int[Array, "N B"]]:
    """Counts the slots in front of each window and those that it adds."""

    def count(slots: Int[Array, " B"], x: tuple) -> tuple:
        ratio, closes = x
        added = jnp.where(closes, law.kept(ratio, slots), 0)
        return slots + added, (slots, added)

    start = jnp.zeros(closes.shape[1:], jnp.int32)
    return lax.scan(count, start, (plan, closes))[1]


def append(
    config: ModelConfig,
    buffers: tuple[Any, Any],
    kept: Entries,
    slots: Int[Array, " B"],
    ratio: Int[Array, ""],
    live: Bool[Array, " B"] | None = None,
) -> tuple[Any, Any]:
    """Writes a window's kept entries behind the slots of each row that is live.

    Args:
      buffers: keys and values [L, B, S, K, H].
      live: rows that are written; the others stay as they are. None: all, and a row
        that appends nothing gets dead entries behind its slots.
    """
    new = new_entries(config, kept, slots, ratio, buffers[0].dtype)
    put = functools.partial(
        put_all_layers, start=slots, live=live, frequencies=inverse_frequencies(config)
    )
    return put(buffers[0], new.k), put(buffers[1], new.v)


def lookup(ratio: Int[Array, "..."], ratios: tuple[int, ...]) -> Int[Array, "..."]:
    """Returns the branch of traced ratios among the static ones."""
    found = sum(jnp.where(ratio == r, i + 1, 0) for i, r in enumerate(ratios))
    return jnp.asarray(found, jnp.int32)
