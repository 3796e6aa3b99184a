"""Training windows in a pipeline over stages of layers, forward and backward.

Forward as in `core.pipeline`. What enters a stage is kept, [N, B, T, D]; so the lean
backward pass needs nothing of other stages but a cotangent: stage g runs its layers of
window i once more and backward, while stage g - 1 does so with window i + 1. Sums of
gradients belong to a layer, and stay where it is. What has no layer (embeddings, head)
is added up over the stages, once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from beacon_jax.core.lean_vjp import (
    Held,
    LayersBackward,
    LoopSettings,
    Trained,
    join,
    marked,
    plain_values,
    without_symbols,
)
from beacon_jax.core.pipeline import at_tick, padded
from beacon_jax.core.step import Window, append, pad_entries
from beacon_jax.model import stages
from beacon_jax.model.decoder import (
    Entries,
    residual_dtype,
    split_layers,
    variable_axes,
)
from beacon_jax.model.stages import LAYERS, WHOLE


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def pipelined(
    settings: LoopSettings, variables: Any, buffers: Entries, xs: dict[str, Array]
) -> Float[Array, "N B W D"]:
    """Runs all windows, as `window_loop` does."""
    return _forward(settings, variables, buffers, xs)[0]


def _forward(
    settings: LoopSettings, variables: Any, buffers: Entries, xs: dict[str, Array]
) -> tuple[Float[Array, "N B W D"], Entries, Float[Array, "ticks B T D"]]:
    """Returns hidden states, filled buffers, and what entered each stage by ticks."""
    local = functools.partial(_forward_local, settings)
    given, returned = (WHOLE, LAYERS, LAYERS, WHOLE), (WHOLE, LAYERS, LAYERS)
    run: Any = stages.on_stages(settings.net, local, given, returned)
    outer, layers = split_layers(variables)
    return run(stages.unsplit(settings.net, outer), layers, buffers, xs)


def _forward_local(
    settings: LoopSettings,
    outer: Any,
    layers: Any,
    buffers: Entries,
    xs: dict[str, Array],
) -> Any:
    settings, size, me = _inside(settings), lax.axis_size(stages.AXIS), stages.index()
    net, (n, rows, w) = settings.net, xs["tokens"].shape
    d, dtype = net.config.hidden_size, buffers.k.dtype

    def nothing(x, h, k, v):
        none = jnp.zeros((rows, w, d), dtype)
        kept = Entries(*(jnp.zeros_like(x[:, :, : settings.most]) for x in (k, v)))
        return h, none, kept, h

    def run(window: Window) -> Any:
        def branch(x, h, k, v):
            def layer(h, per_layer):
                one, k, v = per_layer
                return window.layer(one, h, k, v, x["slots"])[:2]

            begin = lambda h: window.begin(outer, x["tokens"])
            finish = lambda h: window.finish(outer, h)
            none = lambda h: jnp.zeros((rows, w, d), dtype)
            h = lax.cond(me == 0, begin, lambda h: h, h[:, : window.length])
            entered = h
            h, kept = lax.scan(layer, h, (layers, k, v))
            hidden = lax.cond(me == size - 1, finish, none, h)
            kept = pad_entries(kept, settings.most)
            h, entered = (padded(a, settings.length) for a in (h, entered))
            return h, hidden, kept, entered

        return branch

    branches = [nothing, *map(run, settings.windows)]

    def tick(carry, number):
        buffers, h = carry
        x, live = _at(xs, number - me, n)
        h, hidden, kept, entered = lax.switch(x["index"], branches, x, h, *buffers)
        rows_live = jnp.full((rows,), live)
        at = (x["slots"], x["ratio"])
        buffers = append(net.config, buffers, kept, *at, live=rows_live)
        return (Entries(*buffers), stages.passed_on(h)), (hidden, entered)

    h = jnp.zeros((rows, settings.length, d), residual_dtype(net.dtype))
    ticks = jnp.arange(n + size - 1)
    (buffers, _), (hidden, entered) = lax.scan(tick, (buffers, h), ticks)
    return stages.handed_out(hidden[size - 1 :], size - 1), buffers, entered


def _pipelined_fwd(
    settings: LoopSettings, variables: Any, buffers: Any, xs: Any
) -> tuple[Any, Any]:
    trained = marked(variables)
    variables, buffers, xs = plain_values((variables, buffers, xs))
    hidden, final, entered = _forward(settings, variables, buffers, xs)
    return hidden, (variables, trained, final, xs, entered)


def _pipelined_bwd(settings: LoopSettings, residuals: Any, d_hidden: Any) -> Any:
    variables, trained, buffers, xs, entered = residuals
    local = functools.partial(_backward_local, settings, trained)
    given = (WHOLE, LAYERS, LAYERS, WHOLE, LAYERS, WHOLE)
    run = stages.on_stages(settings.net, local, given, (WHOLE, LAYERS))
    rest: Any = (buffers, xs, entered, without_symbols(d_hidden))
    outer, layers = split_layers(variables)
    outer = stages.unsplit(settings.net, outer)
    d_outer, d_layers = run(outer, layers, *rest)
    return join(d_outer, d_layers, variables), None, None


pipelined.defvjp(_pipelined_fwd, _pipelined_bwd, symbolic_zeros=True)


class _Sums(NamedTuple):
    """What the backward pass adds up on a stage."""

    buffers: Entries
    outer: list[Array]
    layers: list[Array]


def _backward_local(
    settings: LoopSettings,
    trained: Any,
    outer: Any,
    layers: Any,
    buffers: Entries,
    xs: dict[str, Array],
    entered: Float[Array, "ticks B T D"],
    d_hidden: Float[Array, "N B W D"],
) -> tuple[Any, Any]:
    """Returns the gradients of the outer variables and of this stage's layers."""
    settings, size, me = _inside(settings), lax.axis_size(stages.AXIS), stages.index()
    net, n = settings.net, len(d_hidden)
    axes = split_layers(variable_axes(net.config))
    of_outer, of_layers = zip((outer, layers), split_layers(trained), axes, strict=True)
    whole = dataclasses.replace(net, partition=None)  # `stages.unsplit`
    held = Held(settings, Trained(whole, *of_outer), Trained(net, *of_layers), buffers)
    nothing = lambda sums, x, d_h: (sums, d_h)
    one = lambda window: functools.partial(_reverse, held, window)
    branches = [nothing, *map(one, settings.windows)]
    xs = {**xs, "d_hidden": d_hidden}

    def tick(carry, number):
        sums, d_h = carry
        at = n - 1 - (number - (size - 1 - me))  # of the window
        x, _ = _at(xs, at, n)
        x["entered"] = entered[jnp.clip(at, 0, n - 1) + me]
        sums, d_h = lax.switch(x["index"], branches, sums, x, d_h)
        return (sums, stages.passed_on(d_h, -1)), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    d_buffers = jax.tree.map(zeros, buffers)
    sums = _Sums(d_buffers, held.outer.zeros(), held.layers.zeros())
    d_h = jnp.zeros(entered.shape[1:], entered.dtype)
    (sums, _), _ = lax.scan(tick, (sums, d_h), jnp.arange(n + size - 1))
    d_outer = [lax.psum(x, stages.AXIS) for x in sums.outer]
    return held.outer.full(d_outer), held.layers.full(sums.layers)


def _reverse(
    held: Held, window: Window, sums: _Sums, x: dict[str, Array], d_h: Any
) -> tuple[_Sums, Float[Array, "B T D"]]:
    """Runs one window backward through the layers of this stage.

    Args:
      d_h: cotangent of what it has handed on; undefined in the last stage.

    Returns:
      The sums, and the cotangent of what entered it.
    """
    outer, size, me = held.outer, lax.axis_size(stages.AXIS), stages.index()
    layers = LayersBackward(held, window, x)
    h, kept = layers.forward(x["entered"][:, : window.length])

    def finish(h, d_h, d_outer):
        f = lambda own, h: window.finish(outer.merge(own), h)
        own, d_h = jax.vjp(f, outer.own, h)[1](x["d_hidden"])
        return d_h, _added(d_outer, own)

    def begin(d_h, d_outer):
        f = lambda own: window.begin(outer.merge(own), x["tokens"])
        # The barrier keeps the order of the sums (`lean_vjp`).
        (own,) = lax.optimization_barrier(jax.vjp(f, outer.own)[1](d_h))
        return _added(d_outer, own)

    d_h = d_h[:, : window.length]
    other = lambda h, d_h, d_outer: (d_h, d_outer)
    d_h, d_outer = lax.cond(me == size - 1, finish, other, h, d_h, sums.outer)
    d_h, d_buffers, d_layers = layers.backward(kept, d_h, sums.buffers, sums.layers)
    d_outer = lax.cond(me == 0, begin, lambda d_h, d_outer: d_outer, d_h, d_outer)
    return _Sums(d_buffers, d_outer, d_layers), padded(d_h, held.settings.length)


def _added(total: list[Array], new: list[Array]) -> list[Array]:
    return [a + b.astype(a.dtype) for a, b in zip(total, new, strict=True)]


def _at(xs: dict[str, Array], number: Any, count: int) -> tuple[dict[str, Array], Any]:
    """Takes what belongs to a window, and whether there is one (`pipeline.at_tick`)."""
    n = len(xs["tokens"])
    xs = xs if "index" in xs else {**xs, "index": jnp.ones((n,), jnp.int32)}
    return at_tick(xs, number, count), (number >= 0) & (number < count)


def _inside(settings: LoopSettings) -> LoopSettings:
    """Returns the settings of one stage."""
    net = stages.inside(settings.net)
    windows = tuple(window.on(net) for window in settings.windows)
    return settings._replace(net=net, windows=windows)
