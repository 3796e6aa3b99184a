"""The lean reverse mode of the loop over training windows (`core.window_loop`).

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
from beacon_jax.model.decoder import (
    LAYERS,
    Entries,
    constrain_entries,
    split_layers,
    variable_axes,
)
from beacon_jax.model.net import Net


class LoopSettings(NamedTuple):
    """Settings that the loop is compiled for (`window_loop`)."""

    net: Net
    windows: tuple[Window, ...]
    remat: str
    offload: bool
    watch: Callable[..., Any] | None = None

    @property
    def length(self) -> int:
        """Entries of the longest window."""
        return max(window.length for window in self.windows)

    @property
    def most(self) -> int:
        """Entries that every branch hands over, the last ones as padding."""
        return max(window.kept for window in self.windows)

    def watched(self, seen: Any, x: dict[str, Any], given: Any) -> Any:
        """Returns what `watch` makes of a layer's attention; None without one."""
        return self.watch(self.net, seen, x, given) if self.watch else None

    def per_layer(self, x: dict[str, Any]) -> Any:
        """Returns what `watch` is given of each layer, [L, ...], or None."""
        return x["compared"].shares if self.watch else None


def run_window(
    settings: LoopSettings, variables: Any, buffers: Entries, x: dict[str, Array]
) -> tuple[Entries, tuple[Float[Array, "B W D"], Any]]:
    """Runs one window forward: (buffers, (hidden, what was watched in each layer))."""
    net, windows, remat, *_ = settings
    b, w = x["tokens"].shape
    most = settings.most
    outer, layers = split_layers(variables)
    dtype = buffers.k.dtype

    def run(window):
        def branch(k, v):
            def layer(h, per_layer):
                one, k, v, given = per_layer
                h, kept, seen = window.layer(one, h, k, v, x["slots"])
                return h, (kept, settings.watched(seen, x, given))

            if remat == "layer":
                layer = jax.checkpoint(layer, prevent_cse=False)
            h = window.begin(outer, x["tokens"])
            per_layer = (layers, k, v, settings.per_layer(x))
            h, (kept, found) = lax.scan(layer, h, per_layer)
            return window.finish(outer, h), pad_entries(kept, most), found

        return branch

    def nothing(k, v):
        none = jnp.zeros((b, w, net.config.hidden_size), dtype)
        kept = Entries(*(jnp.zeros_like(x[:, :, :most]) for x in (k, v)))
        if not settings.watch:
            return none, kept, None
        found = jax.eval_shape(run(windows[0]), k, v)[2]
        return none, kept, jnp.zeros(found.shape, found.dtype)

    hidden, kept, found = switch(x, [nothing, *map(run, windows)])(*buffers)
    after = append(net.config, buffers, kept, x["slots"], x["ratio"])
    return constrain_entries(net, Entries(*after)), (hidden, found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lean(settings: LoopSettings, variables: Any, buffers: Entries, xs: Any) -> Any:
    """Runs all windows, as `window_loop` does with remat="lean" or "lean-layer"."""
    step = functools.partial(run_window, settings, variables)
    return lax.scan(step, buffers, xs)[1]


def _lean_fwd(settings: LoopSettings, variables: Any, buffers: Any, xs: Any) -> Any:
    trained = marked(variables)
    variables, buffers, xs = plain_values((variables, buffers, xs))
    step = functools.partial(run_window, settings, variables)
    final, out = lax.scan(step, buffers, xs)
    if settings.offload:
        final = jax.device_put(final, jax.memory.Space.Host)
    return out, (variables, trained, final, xs)


def _lean_bwd(settings: LoopSettings, residuals: Any, d_out: Any) -> Any:
    net = settings.net
    variables, trained, buffers, xs = residuals
    d_out = tuple(map(without_symbols, d_out))
    axes = split_layers(variable_axes(net.config))
    parts = zip(split_layers(variables), split_layers(trained), axes, strict=True)
    outer, layers = (Trained(net, *part) for part in parts)
    held = Held(settings, outer, layers, buffers)
    nothing = lambda sums, x, d_hidden, d_found: sums
    reverse = lambda window: functools.partial(_reverse, held, window)
    branches = [nothing, *map(reverse, settings.windows)]

    def step(sums, x_and_ct):
        return switch(x_and_ct[0], branches)(sums, *x_and_ct), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    d_buffers = constrain_entries(net, jax.tree.map(zeros, buffers))
    start = (d_buffers, outer.zeros(), layers.zeros())
    (_, d_outer, d_layers), _ = lax.scan(step, start, (xs, *d_out), reverse=True)
    gradients = join(outer.full(d_outer), layers.full(d_layers), variables)
    return gradients, None, None


lean.defvjp(_lean_fwd, _lean_bwd, symbolic_zeros=True)


def marked(variables: Any) -> Any:
    """Returns () for each variable that is differentiated, None for the others.

    Only those get a cotangent: a frozen base must cost nothing.
    """
    mark = lambda p: () if p.perturbed else None
    return jax.tree.map(mark, variables, is_leaf=_is_primal)


def plain_values(tree: Any) -> Any:
    """Returns the arrays of a tree that a rule with `symbolic_zeros` is given."""
    return jax.tree.map(lambda p: p.value, tree, is_leaf=_is_primal)


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")


def without_symbols(d: Any) -> Any:
    """Makes zeros of a cotangent that is symbolically zero; None stays."""
    if isinstance(d, jax.custom_derivatives.SymbolicZero):
        zero: Any = d
        return jnp.zeros(zero.shape, zero.dtype)
    return d


class Held(NamedTuple):
    """Inputs that all windows of the backward pass share; layers that are at hand."""

    settings: LoopSettings
    outer: "Trained"
    layers: "Trained"
    buffers: Entries


def _reverse(
    held: Held,
    window: Window,
    sums: Any,
    x: dict[str, Array],
    d_hidden: Float[Array, "B W D"],
    d_found: Float[Array, " L"] | None,
) -> Any:
    """Runs one window backward: adds to the sums (d_buffers, d_outer, d_layers)."""
    outer = held.outer
    d_buffers, d_outer, d_layers = sums
    f = lambda own: window.begin(outer.merge(own), x["tokens"])
    h, pull_begin = jax.vjp(f, outer.own)
    layers = LayersBackward(held, window, x)
    h, kept = layers.forward(h)
    f = lambda own, h: window.finish(outer.merge(own), h)
    _, pull_finish = jax.vjp(f, outer.own, h)
    at_end, d_h = pull_finish(d_hidden)
    d_h, d_buffers, d_layers = layers.backward(kept, d_h, d_buffers, d_layers, d_found)
    # The barrier keeps the order of the sums: XLA would scatter a window's rows of the
    # embedding straight into the total, where plain reverse mode adds them up first.
    (at_begin,) = lax.optimization_barrier(pull_begin(d_h))
    add = lambda total, a, b: total + (a + b).astype(total.dtype)
    d_outer = list(map(add, d_outer, at_begin, at_end))
    return constrain_entries(held.settings.net, d_buffers), d_outer, d_layers


class LayersBackward:
    """The layers of a window, run once more and then backward, one after the other."""

    def __init__(self, held: Held, window: Window, x: dict[str, Array]):
        """Prepares it.

        Args:
          x: of the window: slots [B] in front of it, added [B] and ratio.
        """
        self.held, self.window, self.x = held, window, x
        self.remat, self.most = held.settings.remat, held.settings.most
        alive = jnp.arange(self.most) < x["added"][:, None]
        self.alive = alive[..., None, None]
        self.saved = _Residuals()
        watched = held.settings.per_layer(x)
        self.stacked = ((held.layers.own, held.layers.frozen, watched), *held.buffers)

    def forward(self, h: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Any]:
        """Returns what leaves the last layer, and what `backward` needs of each."""
        return lax.scan(self._up, h, self.stacked)

    def backward(
        self,
        kept: Any,
        d_h: Float[Array, "B T D"],
        d_buffers: Entries,
        d_layers: list[Array],
        d_found: Float[Array, " L"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Entries, list[Array]]:
        """Returns the cotangent of what enters the first layer, and the sums."""
        numbers = jnp.arange(self.held.buffers.k.shape[0])
        (d_h, d_k, d_v, d_layers), _ = lax.scan(
            self._down,
            (d_h, *d_buffers, d_layers),
            (numbers, kept, d_found, *self.stacked),
            reverse=True,
        )
        return d_h, Entries(d_k, d_v), d_layers

    def _layer(
        self, own: Any, frozen: Any, watched: Any, h: Any, k: Any, v: Any
    ) -> Any:
        """Runs one layer: (h, what enters the memory, what is found by watching)."""
        x, net = self.x, self.held.settings.net
        variables = self.held.layers.merge(own, frozen)
        h, kept, seen = self.window.layer(variables, h, k, v, x["slots"])
        found = self.held.settings.watched(seen, x, watched)
        kept = Entries(*(entry[None] for entry in pad_entries(kept, self.most)))
        new = new_entries(net.config, kept, x["slots"], x["ratio"], k.dtype)
        return h, Entries(new.k[0], new.v[0]), found

    def _taken(self, total: Array, like: Any) -> Array:
        """Takes the cotangent of the entries that this window appended."""
        cut = lambda row, at: lax.dynamic_slice_in_dim(row, at, self.most)
        found = jax.vmap(cut)(total, self.x["slots"])
        return jnp.where(self.alive, found, 0).astype(like)

    def _fetch(self, *kv: Array) -> Any:
        """Fetches a layer's buffers; no copy where they are on the device anyway."""
        if not self.held.settings.offload:
            return kv
        return jax.device_put(kv, jax.memory.Space.Device)

    def _up(self, h: Any, per_layer: Any) -> Any:
        (own, frozen, watched), k, v = per_layer
        k, v = self._fetch(k, v)
        if self.remat == "lean-layer":
            return self._layer(own, frozen, watched, h, k, v)[0], h
        pull: Any
        f = lambda *a: self._layer(a[0], frozen, watched, *a[1:])
        (after, *_), pull = jax.vjp(f, own, h, k, v)
        return after, self.saved.store(pull, (own, (frozen, watched), h, k, v))

    def _down(self, carry: Any, per_layer: Any) -> Any:
        d_h, d_k, d_v, d_own = carry
        i, kept, d_found, (own, frozen, watched), k, v = per_layer
        k, v = self._fetch(k, v)
        if self.remat == "lean-layer":
            f = lambda *a: self._layer(a[0], frozen, watched, *a[1:])
            _, pull = jax.vjp(f, own, kept, k, v)
        else:
            pull = self.saved.restore(kept, (own, (frozen, watched), k, v))
        of_layer = lambda total: lax.dynamic_index_in_dim(total, i, keepdims=False)
        taken = lambda total, x: self._taken(of_layer(total), x.dtype)
        d_new = Entries(taken(d_k, k), taken(d_v, v))
        # Read before they are written: else XLA copies the whole sums, twice a layer.
        d_k, d_v, d_new = lax.optimization_barrier((d_k, d_v, d_new))
        part, d_h, k_ct, v_ct = pull((d_h, d_new, d_found))
        add = lambda total, new: total.at[i].add(new.astype(total.dtype))
        return (d_h, add(d_k, k_ct), add(d_v, v_ct), list(map(add, d_own, part))), None


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


class Trained:
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


def join(outer: dict, layers: dict, like: dict) -> dict[str, Any]:
    both = {
        name: {**tree, **({LAYERS: layers[name]} if name in layers else {})}
        for name, tree in outer.items()
    }
    return {name: both[name] for name in like}


def switch(
    x: dict[str, Array], branches: list[Callable[..., Any]]
) -> Callable[..., Any]:
    """Returns the branch of a step; a plain model in one window needs no switch."""
    if "index" not in x:
        return branches[1]
    return lambda *operands: lax.switch(x["index"], branches, *operands)
