"""The loop over training windows, with plain reverse mode or with a lean one.

Reverse mode through a scan whose carry is the memory stores one buffer per window, and
through `lax.switch` it stores the residuals of every branch, taken or not. The lean
loop stores the final buffer only: memory is append-only, so what window i saw is a
prefix of it. Its backward pass runs the windows in reverse, each once more inside its
own branch, layer by layer, and takes the cotangent of a window's entries from the
accumulated cotangent of the buffer. A layer's cotangents are added to the accumulators
where they arise: no second buffer, and no second set of gradients, ever exists.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from beacon_jax.core.step import Window, append, new_entries, pad_entries
from beacon_jax.model.decoder import Entries, constrain_entries, variable_axes
from beacon_jax.model.net import Net

LAYERS = "layers"
REMAT = ("lean", "lean-layer", "none", "layer", "window")


class LoopSettings(NamedTuple):
    """Settings that the loop is compiled for (`window_loop`)."""

    net: Net
    windows: tuple[Window, ...]
    remat: str
    offload: bool

    @property
    def most(self) -> int:
        """Entries that every branch hands over, the last ones as padding."""
        return max(window.kept for window in self.windows)


def window_loop(
    net: Net,
    windows: tuple[Window, ...],
    variables: Any,
    buffers: Entries,
    xs: dict[str, Array],
    *,
    remat: str,
    offload: bool = False,
) -> Float[Array, "N B W D"]:
    """Runs all windows, which fill the buffers; returns hidden states [N, B, W, D].

    Args:
      windows: one per static ratio, in the order of xs["index"] - 1.
      buffers: zeros [L, B, S, K, H].
      xs: stacked over windows: tokens [N, B, W]; index [N] of the branch, 0 for a step
        without tokens; ratio [N]; slots [N, B] in front of each window and added [N, B]
        that it appends.
      remat: "lean" keeps the activations of one window at a time (2 forwards and a
        backward), "lean-layer" only what enters its layers (3 forwards). "none",
        "layer" and "window" are plain reverse mode, which keeps everything, or
        recomputes that much.
      offload: the filled buffers wait for the lean backward pass in host memory, from
        where every window fetches them again, one layer at a time.
    """
    settings = LoopSettings(net, windows, remat, offload)
    if remat.startswith("lean"):
        return _lean(settings, variables, buffers, xs)
    step = functools.partial(_step, settings, variables)
    if remat == "window":
        step = jax.checkpoint(step, prevent_cse=False)
    return lax.scan(step, buffers, xs)[1]


def _step(
    settings: LoopSettings, variables: Any, buffers: Entries, x: dict[str, Array]
) -> tuple[Entries, Float[Array, "B W D"]]:
    """Runs one window forward: (buffers, hidden)."""
    net, windows, remat, _ = settings
    b, w = x["tokens"].shape
    most = settings.most
    outer, layers = _split(variables)
    dtype = buffers.k.dtype

    def run(window):
        def branch(k, v):
            def layer(h, per_layer):
                one, k, v = per_layer
                return window.layer(one, h, k, v, x["slots"])

            if remat == "layer":
                layer = jax.checkpoint(layer, prevent_cse=False)
            h = window.begin(outer, x["tokens"])
            h, kept = lax.scan(layer, h, (layers, k, v))
            return window.finish(outer, h), pad_entries(kept, most)

        return branch

    def nothing(k, v):
        none = jnp.zeros((b, w, net.config.hidden_size), dtype)
        return none, Entries(*(jnp.zeros_like(x[:, :, :most]) for x in (k, v)))

    hidden, kept = _switch(x, [nothing, *map(run, windows)])(*buffers)
    after = append(net.config, buffers, kept, x["slots"], x["ratio"])
    return constrain_entries(net, Entries(*after)), hidden


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lean(settings: LoopSettings, variables: Any, buffers: Entries, xs: Any) -> Any:
    step = functools.partial(_step, settings, variables)
    return lax.scan(step, buffers, xs)[1]


def _lean_fwd(settings: LoopSettings, variables: Any, buffers: Any, xs: Any) -> Any:
    # Only what is differentiated gets a cotangent: a frozen base must cost nothing.
    is_primal = lambda x: hasattr(x, "perturbed")
    value = lambda tree: jax.tree.map(lambda p: p.value, tree, is_leaf=is_primal)
    trained = jax.tree.map(
        lambda p: () if p.perturbed else None, variables, is_leaf=is_primal
    )
    variables, xs = value(variables), value(xs)
    step = functools.partial(_step, settings, variables)
    final, hidden = lax.scan(step, value(buffers), xs)
    if settings.offload:
        final = jax.device_put(final, jax.memory.Space.Host)
    return hidden, (variables, trained, final, xs)


def _lean_bwd(settings: LoopSettings, residuals: Any, d_hidden: Any) -> Any:
    net = settings.net
    variables, trained, buffers, xs = residuals
    if isinstance(d_hidden, jax.custom_derivatives.SymbolicZero):
        zero: Any = d_hidden
        d_hidden = jnp.zeros(zero.shape, zero.dtype)
    axes = _split(variable_axes(net.config))
    parts = zip(_split(variables), _split(trained), axes, strict=True)
    outer, layers = (_Trained(net, *part) for part in parts)
    held = _Held(settings, outer, layers, buffers)
    nothing = lambda sums, x, d_hidden: sums
    reverse = lambda window: functools.partial(_reverse, held, window)
    branches = [nothing, *map(reverse, settings.windows)]

    def step(sums, x_and_ct):
        return _switch(x_and_ct[0], branches)(sums, *x_and_ct), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    d_buffers = constrain_entries(net, jax.tree.map(zeros, buffers))
    start = (d_buffers, outer.zeros(), layers.zeros())
    (_, d_outer, d_layers), _ = lax.scan(step, start, (xs, d_hidden), reverse=True)
    gradients = _join(outer.full(d_outer), layers.full(d_layers), variables)
    return gradients, None, None


_lean.defvjp(_lean_fwd, _lean_bwd, symbolic_zeros=True)


class _Held(NamedTuple):
    """Inputs that all windows of the backward pass share."""

    settings: LoopSettings
    outer: "_Trained"
    layers: "_Trained"
    buffers: Entries


def _reverse(
    held: _Held,
    window: Window,
    sums: Any,
    x: dict[str, Array],
    d_hidden: Float[Array, "B W D"],
) -> Any:
    """Runs one window backward: adds to the sums (d_buffers, d_outer, d_layers)."""
    (net, _, remat, _), outer, layers, buffers = held
    most = held.settings.most
    (d_k, d_v), d_outer, d_layers = sums
    slots, tokens = x["slots"], x["tokens"]
    alive = (jnp.arange(most) < x["added"][:, None])[..., None, None]

    def layer(own, frozen, h, k, v):
        """Runs one layer: (h, what enters the memory)."""
        h, kept = window.layer(layers.merge(own, frozen), h, k, v, slots)
        kept = Entries(*(entry[None] for entry in pad_entries(kept, most)))
        new = new_entries(net.config, kept, slots, x["ratio"], k.dtype)
        return h, Entries(new.k[0], new.v[0])

    def taken(total, like):
        """Takes the cotangent of the entries that this window appended."""
        cut = lambda row, at: lax.dynamic_slice_in_dim(row, at, most)
        return jnp.where(alive, jax.vmap(cut)(total, slots), 0).astype(like)

    # No copy where the buffers are on the device anyway.
    fetch = lambda *kv: jax.device_put(kv, jax.memory.Space.Device)

    def up(h, per_layer):
        (own, frozen), k, v = per_layer
        k, v = fetch(k, v)
        if remat == "lean-layer":
            return layer(own, frozen, h, k, v)[0], h
        pull: Any
        (after, _), pull = jax.vjp(lambda *a: layer(a[0], frozen, *a[1:]), own, h, k, v)
        return after, saved.store(pull, (own, frozen, h, k, v))

    def down(carry, per_layer):
        d_h, d_k, d_v, d_own = carry
        i, kept, (own, frozen), k, v = per_layer
        k, v = fetch(k, v)
        if remat == "lean-layer":
            f = lambda *a: layer(a[0], frozen, *a[1:])
            _, pull = jax.vjp(f, own, kept, k, v)
        else:
            pull = saved.restore(kept, (own, frozen, k, v))
        of_layer = lambda total: lax.dynamic_index_in_dim(total, i, keepdims=False)
        d_new = Entries(taken(of_layer(d_k), k.dtype), taken(of_layer(d_v), v.dtype))
        # Read before they are written: else XLA copies the whole sums, twice a layer.
        d_k, d_v, d_new = lax.optimization_barrier((d_k, d_v, d_new))
        part, d_h, k_ct, v_ct = pull((d_h, d_new))
        add = lambda total, new: total.at[i].add(new.astype(total.dtype))
        return (d_h, add(d_k, k_ct), add(d_v, v_ct), list(map(add, d_own, part))), None

    saved = _Residuals()
    f = lambda own: window.begin(outer.merge(own), tokens)
    h, pull_begin = jax.vjp(f, outer.own)
    stacked = ((layers.own, layers.frozen), *buffers)
    h, kept = lax.scan(up, h, stacked)
    f = lambda own, h: window.finish(outer.merge(own), h)
    _, pull_finish = jax.vjp(f, outer.own, h)
    at_end, d_h = pull_finish(d_hidden)
    numbers = jnp.arange(buffers.k.shape[0])
    (d_h, d_k, d_v, d_layers), _ = lax.scan(
        down, (d_h, d_k, d_v, d_layers), (numbers, kept, *stacked), reverse=True
    )
    # The barrier keeps the order of the sums: XLA would scatter a window's rows of the
    # embedding straight into the total, where plain reverse mode adds them up first.
    (at_begin,) = lax.optimization_barrier(pull_begin(d_h))
    add = lambda total, a, b: total + (a + b).astype(total.dtype)
    d_outer = list(map(add, d_outer, at_begin, at_end))
    return constrain_entries(net, Entries(d_k, d_v)), d_outer, d_layers


class _Residuals:
    """Residuals of `jax.vjp` of a layer, without the layer's own inputs.

    Weights and buffers are there anyway, and are not stacked a second time.
    """

    def store(self, pull: Any, inputs: Any) -> list[Array]:
        """Returns the arrays of `pull` that are neither own, frozen, k nor v.

        Args:
          inputs: (own, frozen, h, k, v) of the layer.
        """
        leaves, self.tree = jax.tree.flatten(pull)
        own, frozen, _, k, v = inputs
        known = {id(x): i for i, x in enumerate(jax.tree.leaves((own, frozen, k, v)))}
        self.known = [known.get(id(leaf)) for leaf in leaves]
        return [x for x, i in zip(leaves, self.known, strict=True) if i is None]

    def restore(self, kept: Any, inputs: Any) -> Any:
        """Makes `pull` again.

        Args:
          kept: what `store` returned.
          inputs: (own, frozen, k, v) of the layer.
        """
        inputs, kept = jax.tree.leaves(inputs), iter(kept)
        leaves = [next(kept) if i is None else inputs[i] for i in self.known]
        return jax.tree.unflatten(self.tree, leaves)


class _Trained:
    """The leaves of a tree in two lists, those that are trained and the others."""

    def __init__(self, net: Net, tree: Any, trained: Any, axes: Any):
        self.net = net
        self.leaves, self.tree = jax.tree.flatten(tree)
        self.axes = self.tree.flatten_up_to(axes)
        marks = self.tree.flatten_up_to(trained)
        self.marks = [mark is not None for mark in marks]
        parts = lambda want: [
            x for x, mark in zip(self.leaves, self.marks, strict=True) if mark == want
        ]
        self.own, self.frozen = parts(True), parts(False)

    def merge(self, own: Any, frozen: Any = None) -> Any:
        """Makes the tree of these leaves; frozen=None: of its own frozen ones."""
        own, frozen = iter(own), iter(self.frozen if frozen is None else frozen)
        leaves = [next(own) if mark else next(frozen) for mark in self.marks]
        return self.tree.unflatten(leaves)

    def zeros(self) -> list[Array]:
        """Makes zeros to sum gradients in: float32, split as what is trained."""
        marked = zip(self.leaves, self.marks, self.axes, strict=True)
        return [
            self.net.constrain(jnp.zeros(x.shape, jnp.float32), *axes)
            for x, mark, axes in marked
            if mark
        ]

    def full(self, sums: Any) -> Any:
        """Makes a tree of gradients in its dtypes, zeros where nothing is trained."""
        sums = iter(sums)
        pairs = zip(self.leaves, self.marks, strict=True)
        leaves = [
            next(sums).astype(x.dtype) if mark else jnp.zeros_like(x)
            for x, mark in pairs
        ]
        return self.tree.unflatten(leaves)


def _split(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (all but the layers, the layers), each {collection: tree}."""
    outer = {
        name: {key: part for key, part in tree.items() if key != LAYERS}
        for name, tree in variables.items()
    }
    layers = {name: t[LAYERS] for name, t in variables.items() if LAYERS in t}
    return outer, layers


def _join(outer: dict, layers: dict, like: dict) -> dict[str, Any]:
    both = {
        name: {**tree, **({LAYERS: layers[name]} if name in layers else {})}
        for name, tree in outer.items()
    }
    return {name: both[name] for name in like}


def _switch(
    x: dict[str, Array], branches: list[Callable[..., Any]]
) -> Callable[..., Any]:
    """Returns the branch of a step; a plain model in one window needs no switch."""
    if "index" not in x:
        return branches[1]
    return lambda *operands: lax.switch(x["index"], branches, *operands)
