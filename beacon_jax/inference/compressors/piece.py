"""What a compressor sees of a text: slots of a memory that hold its tokens as they are.

A piece is some whole windows of each row. They were read at ratio 0, behind slots that
stay. The functions here ask the model about a piece (`queries`), score its slots by
attention and keep chosen ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.model import buffers, stages
from beacon_jax.model.buffers import Biased, Buffer, entries_of
from beacon_jax.model.decoder import (
    Decoder,
    Layer,
    apply,
    place_of,
    split_layers,
)
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.quantize import Quantized, dequantize, quantize, residual
from beacon_jax.model.rotary import cos_sin, inverse_frequencies, rotate


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """The slots of each row that a compressor replaces, and how to ask the model.

    Attributes:
      net, variables: the model.
      state: the memory with the piece in it: slots[b] is `stop[b]`, and behind it there
        is room for W entries more. Only rows without tokens in the piece have a window
        open.
      start, stop: first slot of the piece in each row, and the one behind it.
      tokens: ids of the piece, one per slot; beyond a row's length undefined.
      wanted: slots that each window is to leave, sinks among them; 0 beyond a row's
        last.
      tokenizer: of the model; None: it has none.
    """

    net: Net
    variables: Any
    state: MemoryState
    start: Int[np.ndarray, " B"]
    stop: Int[np.ndarray, " B"]
    tokens: Int[np.ndarray, "B T"]
    wanted: Int[np.ndarray, "B n"]
    tokenizer: Any = None

    @property
    def lengths(self) -> Int[np.ndarray, " B"]:
        """Tokens of the piece in each row."""
        return self.stop - self.start

    @property
    def inside(self) -> Bool[np.ndarray, "B S"]:
        """Tells which slots are the piece's."""
        slot = np.arange(self.state.capacity)
        return (slot >= self.start[:, None]) & (slot < self.stop[:, None])

    def per_layer(
        self,
        function: Callable[
            [Float[Array, "B S K H"], Float[Array, "B S K H"]], Float[Array, "B K S"]
        ],
    ) -> Float[Array, "L B K S"]:
        """Computes scores from each layer's keys (rotated) and values, in float32."""
        read = lambda layer: [
            floats(self.net, x, layer) for x in (self.state.k, self.state.v)
        ]
        layers = jnp.arange(self.net.config.num_layers)
        return jax.lax.map(lambda layer: function(*read(layer)), layers)

    def queries(
        self, first: Int[np.ndarray, " B"], size: int
    ) -> tuple[Float[Array, "L B size N H"], Int[np.ndarray, "B size"]]:
        """Computes the queries of tokens first ... first + size - 1 of the piece.

        The tokens are run again over the memory; size is W at most.

        Returns:
          The queries, not rotated, and the slots that the tokens stand at.
        """
        place = first[:, None] + np.arange(size)
        ids = np.take_along_axis(
            self.tokens, np.minimum(place, self.tokens.shape[1] - 1), axis=1
        )
        at = jnp.asarray(self.start + first, jnp.int32)
        found, _ = run(self.net, self.variables, self.state, jnp.asarray(ids), at)
        return found, self.start[:, None] + place

    def windows(
        self,
    ) -> Iterator[
        tuple[
            Float[Array, "L B W N H"],
            Int[np.ndarray, "B W"],
            Bool[np.ndarray, "B W"],
        ]
    ]:
        """Yields queries and slots of each window in turn, and which are real."""
        size = self.state.window
        for begin in range(0, int(self.lengths.max(initial=0)), size):
            found, at = self.queries(np.full(len(self.start), begin), size)
            yield found, at, at < self.stop[:, None]


@functools.partial(jax.jit, static_argnames="net")
def run(
    net: Net,
    variables: Any,
    state: MemoryState,
    tokens: Int[Array, "B T"],
    prefix: Int[Array, " B"],
) -> tuple[Float[Array, "L B T N H"], MemoryState]:
    """Runs tokens at slots prefix[row] ... as they are.

    Returns:
      Their queries, not rotated, and the memory with their entries in its buffers; it
      counts them nowhere.
    """
    layout = Layout(1, tokens.shape[1], 0)
    outer, layers = split_layers(variables)
    x = apply(Decoder(net, layout), outer, tokens, method="begin")
    place = place_of(net.config, layout, prefix)
    asked = functools.partial(_asked, layout)
    _, queries, k, v = stages.through(net, asked, layers, x, state.k, state.v, place)
    return queries, state.replace(k=k, v=v)


def _asked(layout: Layout, net: Net) -> stages.LayerCall:
    """Makes a layer that keeps its queries in place of keys and values."""
    one, last = Layer(net, layout, ()), "q_norm" if net.config.qk_norm else "q_proj"

    def run(variables: Any, *given: Any) -> Any:
        (x, _, k, v), found = one.apply(
            variables,
            *given,
            capture_intermediates=lambda module, _: module.name == last,
            mutable=["intermediates"],
        )
        attention: Any = found["intermediates"]["attention"]
        (queries,) = attention[last]["__call__"]
        return x, queries, k, v

    return run


def rotated(
    net: Net, queries: Float[Array, "L B T N H"], at: Int[Any, "B T"]
) -> Float[Array, "L B T N H"]:
    """Rotates queries to the slots that they stand at."""
    return rotate(queries, *cos_sin(net.config, jnp.asarray(at)))


def floats(net: Net, buffer: Buffer, layer: Any) -> Float[Array, "B S K H"]:
    """Returns the entries of one layer of a buffer in float32, rotated as they lie."""
    buffer = entries_of(buffer)
    if isinstance(buffer, Quantized):
        frequencies = inverse_frequencies(net.config)
        return dequantize(buffer, layer, frequencies=frequencies)
    one = jax.lax.dynamic_index_in_dim(buffer, layer, keepdims=False)
    return one.astype(jnp.float32)


def attention(
    net: Net,
    state: MemoryState,
    layer: Any,
    queries: Float[Array, "B T N H"],
    visible: Bool[Array, "B T S"],
) -> Float[Array, "B K G T S"]:
    """Computes the softmax attention of one layer, float32; a query may see nothing."""
    keys = floats(net, state.k, layer)
    b, t, _, h = queries.shape
    grouped = queries.reshape(b, t, keys.shape[2], -1, h)
    scores = jnp.einsum(
        "BTKGH,BSKH->BKGTS", grouped, keys, preferred_element_type=jnp.float32
    )
    scores = scores * h**-0.5
    if isinstance(state.k, Biased):
        scores = scores + state.k.bias[layer][:, :, None, None]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    some = visible.any(-1)[:, None, None, :, None]
    return jnp.where(some, jax.nn.softmax(jnp.where(some, scores, 0.0), -1), 0.0)


@jax.jit
def highest(
    scores: Float[Array, "L B K S"], count: Int[Array, " B"]
) -> Int[Array, "L B S K"]:
    """Lists the `count` slots of each row with the highest scores, rising.

    Of equal ones the first come first. What stands beyond `count` means nothing.
    """
    size = scores.shape[-1]
    order = jnp.argsort(-scores, axis=-1, stable=True)
    chosen = jnp.arange(size) < count[:, None, None]
    return jnp.moveaxis(jnp.sort(jnp.where(chosen, order, size - 1), axis=-1), -1, 2)


@functools.partial(jax.jit, static_argnames="net", donate_argnames="state")
def keep(
    net: Net,
    state: MemoryState,
    index: Int[Array, "#L B n #K"],
    count: Int[Array, " B"],
) -> MemoryState:
    """Keeps chosen slots of each row as its first ones; what lies behind has no use.

    Keys are turned to their new slots, so that positions are those of a text without
    gaps and stay within those trained. Slots that do not move keep their bits.

    Args:
      state: no window of a row that loses slots is open; it is taken over.
      index: the slots that go to 0, 1, ... of each layer and kv head, n at most S;
        those beyond `count` are ignored.
      count: slots kept.
    """
    size = index.shape[2]
    to = jnp.arange(size)[:, None]
    # Behind the kept ones a row may have an open window: it stays where it is.
    index = jnp.where(to < count[:, None, None], index, to)
    distance = to - index
    cos, sin = cos_sin(net.config, distance, scaled=False)
    turn = lambda x: rotate(x, cos[..., 0, :], sin[..., 0, :])
    return state.replace(
        k=_kept(state.k, index, turn, distance == 0),
        v=_kept(state.v, index, None, None),
        slots=count,
        sinks=jnp.minimum(state.sinks, count),
    )


def _kept(buffer: Buffer, index: Any, turn: Any, still: Any) -> Buffer:
    """Gathers slots of a buffer to its front; `turn` is for those not `still`."""
    take = lambda x: jnp.take_along_axis(x, index[..., None], axis=2)
    if isinstance(buffer, Biased):
        bias = take(jnp.swapaxes(buffer.bias, -1, -2)[..., None])[..., 0]
        return Biased(
            _kept(buffer.entries, index, turn, still),
            buffer.bias.at[..., : index.shape[2]].set(jnp.swapaxes(bias, -1, -2)),
        )
    if not isinstance(buffer, Quantized):
        taken = take(buffer)
        if turn is not None:
            taken = jnp.where(still[..., None], taken, turn(taken).astype(buffer.dtype))
        return buffer.at[:, :, : index.shape[2]].set(taken)
    by_slot = jnp.swapaxes(buffer.scale, -1, -2)[..., None]
    taken = Quantized(take(buffer.values), jnp.swapaxes(take(by_slot)[..., 0], -1, -2))
    if turn is not None:
        values, scale = quantize(turn(residual(taken)))
        taken = Quantized(
            jnp.where(still[..., None], taken.values, values),
            jnp.where(jnp.swapaxes(still, -1, -2), taken.scale, scale),
        )
    size = index.shape[2]
    return buffer.replace(
        values=buffer.values.at[:, :, :size].set(taken.values),
        scale=buffer.scale.at[..., :size].set(taken.scale),
    )


class Made(NamedTuple):
    """Entries that a compressor made.

    Attributes:
      k: not rotated, but with the magnitude of rotated keys; None: those that lie there
        stay.
      v: values.
      bias: of the slots; None: they have none.
    """

    k: Float[Array, "L B n K H"] | None
    v: Float[Array, "L B n K H"]
    bias: Float[Array, "L B K n"] | None = None


def write(
    net: Net,
    state: MemoryState,
    made: Made,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    live: Bool[Array, " B"],
) -> MemoryState:
    """Writes made entries to slots start[row] ..., of which `count` are in use after.

    Args:
      made: n entries of each row.
      live: rows that are written; the others stay as they are.
    """
    size = state.capacity
    # XLA drops what does not fit as a whole: a row far behind, beside one that reads
    # much, needs room for as many entries.
    last = int(np.max(np.where(live, start, 0), initial=0))
    state = state.resized(last + made.v.shape[2])
    return _write(net, state, made, start, count, live).trimmed(size)


@functools.partial(jax.jit, static_argnames="net", donate_argnames="state")
def _write(
    net: Net,
    state: MemoryState,
    made: Made,
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    live: Bool[Array, " B"],
) -> MemoryState:
    total = jnp.where(live, start + count, state.slots)
    put = functools.partial(
        buffers.put_all_layers,
        start=start,
        live=live,
        frequencies=inverse_frequencies(net.config),
    )
    k, v = state.k, put(state.v, made.v.astype(state.v.dtype))
    if made.k is not None:
        at = start[:, None] + jnp.arange(made.k.shape[2])
        turned = rotate(made.k, *cos_sin(net.config, at, scaled=False))
        k = put(k, turned.astype(k.dtype))
    if made.bias is not None:
        k = buffers.put_bias(k, made.bias, start, live)
    return state.replace(k=k, v=v, slots=total, sinks=jnp.minimum(state.sinks, total))
