"""The loop over training windows, with plain reverse mode or with a lean one.

Reverse mode through a scan whose carry is the memory stores one buffer per window, and
through `lax.switch` it stores the residuals of every branch, taken or not. The lean
loop stores the final buffer only: memory is append-only, so what window i saw is a
prefix of it. Its backward pass runs the windows in reverse, each once more inside its
own branch, and takes the cotangent of a window's entries from the accumulated cotangent
of the buffer.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from beacon_jax.core.step import put_all_layers
from beacon_jax.model.decoder import Entries

# (variables, k, v, x) -> (outputs, new entries [L, B, n, K, H])
Branch = Callable[..., tuple[Any, Entries]]


def _switch(index, branches: tuple[Callable[..., Any], ...]) -> Callable[..., Any]:
    if len(branches) == 1:
        return branches[0]
    return lambda *operands: lax.switch(index, branches, *operands)


def _run(branches: tuple[Branch, ...], variables: Any, k: Any, v: Any, x: Any):
    return _switch(x["index"], branches)(variables, k, v, x)


def _forward(branches, variables, buffers, xs, *, checkpoint=False):
    def step(carry, x):
        out, new = _run(branches, variables, carry.k, carry.v, x)
        # A row that appends nothing writes dead entries behind its slots.
        return Entries(
            put_all_layers(carry.k, new.k, x["slots"]),
            put_all_layers(carry.v, new.v, x["slots"]),
        ), out

    step = jax.checkpoint(step, prevent_cse=False) if checkpoint else step
    return lax.scan(step, buffers, xs)


def plain_loop(branches, variables, buffers: Entries, xs, *, checkpoint=False):
    """Outputs of every window; differentiated by jax as it stands.

    Args:
      branches: see `Branch`; the first is the empty step, if there are several.
      buffers: zeros [L, B, S, K, H].
      xs: stacked over windows: "index" of the branch, "slots" [N, B] in front of each
        window, "added" [N, B] slots that it appends, and what the branches read.
    """
    return _forward(branches, variables, buffers, xs, checkpoint=checkpoint)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lean_loop(branches, variables, buffers: Entries, xs):
    """`plain_loop` with the lean backward pass; the same values and gradients."""
    return _forward(branches, variables, buffers, xs)[1]


def _lean_fwd(branches, variables, buffers, xs):
    # Only what is differentiated gets a cotangent: a frozen base must cost nothing.
    leaves, tree = jax.tree.flatten(
        variables, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    trained = [() if p.perturbed else None for p in leaves]
    values = [p.value for p in leaves]
    plain = jax.tree.map(
        lambda p: p.value, (buffers, xs), is_leaf=lambda x: hasattr(x, "perturbed")
    )
    final, out = _forward(branches, tree.unflatten(values), *plain)
    return out, (tree.unflatten(values), trained, final, plain[1])


def _lean_bwd(branches, residuals, cotangents):
    variables, trained, buffers, xs = residuals
    leaves, tree = jax.tree.flatten(variables)
    at = [i for i, mark in enumerate(trained) if mark is not None]
    cotangents = jax.tree.map(
        lambda c: jnp.zeros(c.shape, c.dtype) if _symbolic(c) else c,
        cotangents,
        is_leaf=_symbolic,
    )

    def reverse(branch):
        def run(own, k, v, x, out_ct, new_ct):
            def f(own, k, v):
                merged = list(leaves)
                for i, leaf in zip(at, own, strict=True):
                    merged[i] = leaf
                return branch(tree.unflatten(merged), k, v, x)

            _, vjp = jax.vjp(f, own, k, v)
            return vjp((out_ct, new_ct))

        return run

    backward: tuple[Any, ...] = tuple(reverse(b) for b in branches)
    new_shape = jax.eval_shape(
        lambda x: _run(branches, variables, buffers.k, buffers.v, x)[1], _first(xs)
    )

    def step(carry, x_and_ct):
        (d_k, d_v), grads = carry
        x, out_ct = x_and_ct
        n = new_shape.k.shape[2]
        index = (x["slots"][:, None] + jnp.arange(n))[None, :, :, None, None]
        alive = (jnp.arange(n) < x["added"][:, None])[None, :, :, None, None]
        take = lambda d: jnp.where(alive, jnp.take_along_axis(d, index, axis=2), 0)
        new_ct = Entries(
            take(d_k).astype(new_shape.k.dtype), take(d_v).astype(new_shape.v.dtype)
        )
        own = [leaves[i] for i in at]
        d_own, k_ct, v_ct = _switch(x["index"], backward)(
            own, *buffers, x, out_ct, new_ct
        )
        add = lambda total, part: total + part.astype(total.dtype)
        grads = [add(g, d) for g, d in zip(grads, d_own, strict=True)]
        return (Entries(add(d_k, k_ct), add(d_v, v_ct)), grads), None

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    start = (Entries(*map(zeros, buffers)), [zeros(leaves[i]) for i in at])
    (_, grads), _ = lax.scan(step, start, (xs, cotangents), reverse=True)
    out: list[Any] = [None] * len(leaves)
    for i, grad in zip(at, grads, strict=True):
        out[i] = grad.astype(leaves[i].dtype)
    full = [
        jnp.zeros_like(x) if g is None else g for x, g in zip(leaves, out, strict=True)
    ]
    return tree.unflatten(full), None, None


def _symbolic(x) -> bool:
    return isinstance(x, jax.custom_derivatives.SymbolicZero)


def _first(xs):
    return jax.tree.map(lambda x: x[0], xs)


lean_loop.defvjp(_lean_fwd, _lean_bwd, symbolic_zeros=True)
