"""Windows of a text in a pipeline over stages of layers (mesh axis "stage").

The memory belongs to a layer: layer l of window i reads what layer l of earlier windows
has left, nothing else. So stage g runs window i while stage g + 1 runs window i - 1,
N windows take N + S - 1 ticks, and between two ticks each stage hands the hidden states
of one window to the next one. No layer is split: there is no sum over devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.core.step import NOOP, Carry, layout_of, pad_entries
from beacon_jax.model import stages
from beacon_jax.model.buffers import Buffer
from beacon_jax.model.decoder import (
    Decoder,
    Entries,
    apply,
    layer_of,
    place_of,
    residual_dtype,
    split_layers,
)
from beacon_jax.model.net import Net

# What is told of the tokens of a window: (net, variables, hidden, x) -> arrays.
type Told = Callable[..., dict[str, Any]]


def scan(
    net: Net,
    law: Law,
    static: tuple[int, ...],
    told: Told,
    variables: dict[str, Any],
    carry: Carry,
    xs: dict[str, Array],
) -> tuple[Carry, dict[str, Any]]:
    """Feeds all windows, as `lax.scan` over them would.

    Args:
      static: the ratios to compile.
      told: what the last stage tells of each window.
      carry: buffers of all layers, split over the stages.
      xs: of each of the N windows: tokens, index of the branch, ratio, and what `Carry`
        takes.

    Returns:
      The last carry, and what was told [N, ...].
    """
    outer, layers = split_layers(variables)
    local = functools.partial(_local, net, law, static, told)
    whole, split = stages.WHOLE, stages.LAYERS
    carried: Any = Carry(*(split, split, whole, whole, whole))  # pyright: ignore
    given = (whole, split, carried, whole)
    return stages.on_stages(net, local, given, (carried, whole))(
        stages.unsplit(net, outer), layers, carry, xs
    )


def _local(
    net: Net,
    law: Law,
    static: tuple[int, ...],
    told: Told,
    outer: Any,
    layers: Any,
    carry: Carry,
    xs: dict[str, Array],
) -> tuple[Carry, dict[str, Any]]:
    """Runs one stage."""
    net, size, me = stages.inside(net), lax.axis_size(stages.AXIS), stages.index()
    stage = _Stage(net, law, static, outer, layers)
    c, (rows, n) = net.config, (len(carry.slots), len(xs["index"]))

    def nothing(x, h, k, v, slots):
        hidden = jnp.zeros((rows, law.window, c.hidden_size), net.dtype)
        shape = (k.shape[0], rows, stage.most, c.num_kv_heads, c.head_dim)
        empty = jnp.zeros(shape, net.dtype)
        return h, hidden, Entries(empty, empty), k, v

    branches = [nothing, *(functools.partial(stage.window, r) for r in static)]

    def tick(carry, number):
        carry, h = carry
        x = at_tick(xs, number - me, n)
        h, hidden, kept, k, v = lax.switch(
            x["index"], branches, x, h, carry.k, carry.v, carry.slots
        )
        carry = carry._replace(k=k, v=v).after(c, law, hidden, kept, x)
        tell = lambda: told(net, outer, hidden, x)
        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(tell))
        out = lax.cond(me == size - 1, tell, lambda: none)
        return (carry, stages.passed_on(h)), out

    h = jnp.zeros((rows, stage.length, c.hidden_size), residual_dtype(net.dtype))
    numbers = jnp.arange(n + size - 1)
    (carry, _), out = lax.scan(tick, (carry, h), numbers)
    out = jax.tree.map(lambda a: a[size - 1 :], out)  # those of the last stage
    last, out = stages.handed_out((carry.last, out), size - 1)
    return carry._replace(last=last), out


def at_tick(
    xs: dict[str, Array], number: Int[Array, ""], count: int
) -> dict[str, Array]:
    """Takes what belongs to a window; one that there is not has no tokens.

    Args:
      number: of the window, below 0 or from `count` on if there is none.
    """
    live = (number >= 0) & (number < count)
    x = jax.tree.map(lambda a: a[jnp.clip(number, 0, count - 1)], xs)
    x["index"] = jnp.where(live, x["index"], NOOP)
    for name in ("closes", "ends"):
        if name in x:
            x[name] &= live
    return x


class _Stage(NamedTuple):
    """What all windows run with on one stage.

    Attributes:
      static: the ratios that are compiled.
      outer, layers: all variables but those of layers, and those of its own layers.
    """

    net: Net
    law: Law
    static: tuple[int, ...]
    outer: Any
    layers: Any

    @property
    def length(self) -> int:
        """Entries of the longest window: what stages hand on has one shape."""
        config, w = self.net.config, self.law.window
        return max(layout_of(config, r, w).length for r in self.static)

    @property
    def most(self) -> int:
        """Entries that every window keeps, the last ones as padding."""
        return max(len(self.law.kept_entries(r)) for r in self.static)

    def window(
        self,
        ratio: int,
        x: dict[str, Array],
        h: Float[Array, "B T D"],
        k: Buffer,
        v: Buffer,
        slots: Int[Array, " B"],
    ) -> tuple[Any, ...]:
        """Runs a window at one ratio through the layers of this stage.

        Args:
          h: what the stage before has handed over; undefined in the first one.

        Returns:
          (h for the next stage, hidden [B, W, D] in the last one, Entries kept, k, v).
        """
        net, outer, w = self.net, self.outer, self.law.window
        layout = layout_of(net.config, ratio, w)
        keep = tuple(self.law.kept_entries(ratio).tolist())
        model = Decoder(net, layout, keep)
        begin = lambda h: apply(model, outer, x["tokens"], method="begin")
        finish = lambda h: apply(model, outer, h, method="finish")
        nothing = lambda h: jnp.zeros((len(h), w, h.shape[-1]), net.dtype)
        me, end = stages.index(), lax.axis_size(stages.AXIS) - 1
        h = lax.cond(me == 0, begin, lambda h: h, h[:, : layout.length])
        place = place_of(net.config, layout, slots, x["valid"])
        one = layer_of(net, layout, keep)
        h, kept, k, v = stages.over_layers(one, self.layers, h, k, v, place)
        hidden = lax.cond(me == end, finish, nothing, h)
        return padded(h, self.length), hidden, pad_entries(kept, self.most), k, v


def padded(h: Float[Array, "B t D"], length: int) -> Float[Array, "B T D"]:
    """Pads the entries of a window to those of the longest one."""
    return jnp.pad(h, ((0, 0), (0, length - h.shape[1]), (0, 0)))
