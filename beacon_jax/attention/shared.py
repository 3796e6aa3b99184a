"""What the implementations of `prefix_attention` have in common.

Their arguments in one form, the gradient around a forward and a backward pass, and the
sums of an online softmax.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Num

# Names of the residuals, for checkpoint policies that keep them.
OUT, LSE = "attention_out", "attention_lse"

# The layer of a stacked buffer; None: the buffer is one layer's.
Layer = Int[Array, ""] | int | None
# What a schedule is computed from: arrays, or their shapes alone.
Shaped = Array | jax.ShapeDtypeStruct
# A count of rows, slots or blocks: what a schedule says of numbers says of arrays.
Count = int | np.integer | np.ndarray | Array
# Of R rows of scores: the largest, the sum of their exponentials, the weighted values.
Sums = tuple[Float[Array, "*R"], Float[Array, "*R"], Float[Array, "*R H"]]


def zero_invalid(
    x: Float[Array, "B T N H"], queries: Int[Array, " B"] | None
) -> Float[Array, "B T N H"]:
    """Puts 0 behind each row's valid queries."""
    if queries is None:
        return x
    valid = jnp.arange(x.shape[1]) < queries[:, None]
    return jnp.where(valid[..., None, None], x, 0)


def live_layer(
    k: Num[Array, "*L B S K H"],
    v: Num[Array, "*L B S K H"],
    ends: Int[Array, " B"],
    layer: Layer,
) -> tuple[Num[Array, "B S K H"], Num[Array, "B S K H"]]:
    """Copies a layer with 0 from slot ends[row] on: 0 * NaN would be NaN."""
    if layer is not None:
        k, v = k[layer], v[layer]
    live = (jnp.arange(k.shape[1]) < ends[:, None])[..., None, None]
    return jnp.where(live, k, 0), jnp.where(live, v, 0)


def live_bias(
    bias: Float[Array, "*_L _B _K _S"] | None,
    prefix: Int[Array, " B"],
    t: int,
    layer: Layer,
) -> Float[Array, "_B _K _S"] | None:
    """Copies a layer's bias with 0 from slot prefix[row] + t on; None stays None.

    A copy of 4 bytes per slot where keys and values have 4 H in bfloat16. With 0 the
    scores of dead slots stay what they are, -inf.
    """
    if bias is None:
        return None
    if layer is not None:
        bias = bias[layer]
    live = jnp.arange(bias.shape[-1]) < (prefix + t)[:, None, None]
    return jnp.where(live, bias, 0)


def stacked(layer: Layer, *buffers: Array | None) -> tuple[Any, ...]:
    """Returns the layer as an int32 and the buffers [L, ...]; None stays None."""
    if layer is None:
        buffers = jax.tree.map(lambda x: x[None], buffers)
    return jnp.asarray(0 if layer is None else layer, jnp.int32), *buffers


def row_lengths(
    prefix: Int[Array, " B"], queries: Int[Array, " B"] | None, t: int, axis: int
) -> Int[Array, "_ _"]:
    """Stacks prefix and valid queries along an axis: int32 [2, B] or [B, 2]."""
    valid = jnp.full_like(prefix, t) if queries is None else jnp.minimum(queries, t)
    return jnp.stack([prefix, valid], axis).astype(jnp.int32)


def check_per_slot(name: str, x: Array, of: str, buffer: Array) -> None:
    """Raises ValueError unless x has a number per slot and kv head of the buffer `of`.

    Slots come last: [*L, B, K, S] for [*L, B, S, K, H].
    """
    *front, s, heads, _ = buffer.shape
    if x.shape != (*front, heads, s):
        raise ValueError(
            f"{name} has shape {x.shape}: {of} {buffer.shape} needs "
            f"{(*front, heads, s)}."
        )


def check_bias(k: Array, bias: Array | None) -> None:
    """Raises ValueError if the bias does not belong to the keys."""
    if bias is None:
        return
    if bias.dtype != jnp.float32:
        raise ValueError(f"bias has dtype {bias.dtype}: it must be float32.")
    check_per_slot("bias", bias, "k", k)


def check_dtypes(
    q: Array,
    k: Array,
    v: Array,
    int8: bool,
    dtypes: tuple[Any, ...],
    taken: str,
) -> None:
    """Raises NotImplementedError unless all have one of these dtypes, or q has (int8).

    taken: what the error says is taken.
    """
    found = {q.dtype} if int8 else {q.dtype, k.dtype, v.dtype}
    if len(found) > 1 or q.dtype not in dtypes:
        raise NotImplementedError(
            f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}: {taken}."
        )


def lowered(
    platform: str,
    interpret: Any,
    kernel: Callable,
    elsewhere: Callable,
    *args: Any,
) -> Any:
    """Computes kernel(*args) where the program is lowered for the platform.

    "cuda" or "tpu"; also where the kernel is interpreted. Otherwise elsewhere(*args).
    """
    if interpret:
        # A residual that is a constant comes back as an array of numpy.
        return kernel(*jax.tree.map(jnp.asarray, args))
    return lax.platform_dependent(*args, default=elsewhere, **{platform: kernel})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    forward: Callable,
    backward: Callable,
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    lengths: Int[Array, "..."],
    layer: Layer,
    bias: Float[Array, "*_L _B _K _S"] | None,
) -> Float[Array, "B T N H"]:
    """Computes attention whose gradient is a pass of its own, from named residuals.

    Args:
      forward: of (q, k, v, lengths, layer, bias), gives out [B, T, N, H] and the log of
        the softmax's denominators, lse.
      backward: of those, out, lse and d_out, gives d_q [B, T, N, H] and, of the layer,
        d_k and d_v [B, S, K, H].
      lengths: of the rows, as the two passes want them.
      bias: of the scores, per slot; it has no gradient.
    """
    del backward
    return forward(q, k, v, lengths, layer, bias)[0]


def _attend_fwd(forward: Callable, backward: Callable, *args: Any) -> tuple[Array, Any]:
    del backward
    out, lse = forward(*args)
    out, lse = checkpoint_name(out, OUT), checkpoint_name(lse, LSE)
    return out, (*args, out, lse)


def _attend_bwd(
    forward: Callable,
    backward: Callable,
    residuals: tuple[Any, ...],
    d_out: Float[Array, "B T N H"],
) -> tuple[Array | None, ...]:
    del forward
    _, k, _, _, layer, *_ = residuals
    d_q, d_k, d_v = backward(*residuals, d_out)

    def put(d: Array) -> Array:
        if layer is None:
            return d
        if k.shape[0] == 1:
            return d[None]
        return jnp.zeros(k.shape, d.dtype).at[layer].set(d)

    return d_q, put(d_k), put(d_v), None, None, None


attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_by(value: Callable, gradient: Callable, *args: Any) -> Array:
    """Computes value(*args), which has no gradient, with that of gradient(*args).

    args: q [B, T, N, H], k and v [L, B, S, K, H], which have one, and others.
    """
    del gradient
    return value(*args)


def _attend_by_fwd(
    value: Callable, gradient: Callable, *args: Any
) -> tuple[Array, Any]:
    del value
    qkv, others = args[:3], args[3:]
    out, pull = jax.vjp(lambda *x: gradient(*x, *others), *qkv)
    return out, (pull, (None,) * len(others))


def _attend_by_bwd(
    value: Callable, gradient: Callable, residuals: Any, d_out: Array
) -> tuple[Array | None, ...]:
    del value, gradient
    pull, others = residuals
    return (*pull(d_out), *others)


attend_by.defvjp(_attend_by_fwd, _attend_by_bwd)


def no_sums(*shape: int) -> Sums:
    """Returns the sums of rows [*R] without a key, for shape (*R, H)."""
    *rows, _ = shape
    low = jnp.full(rows, -jnp.inf, jnp.float32)
    return low, jnp.zeros(rows, jnp.float32), jnp.zeros(shape, jnp.float32)


def add_block(
    sums: Sums, scores: Float[Array, "*R S"], weigh: Callable[[Array], Array]
) -> Sums:
    """Adds a block of keys to an online softmax.

    scores: at least one per row, here or before, is not -inf. weigh: sums the block's
    values [*R, H], given their weights [*R, S].
    """
    top, total, acc = sums
    new = jnp.maximum(top, scores.max(-1))
    p, fade = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
    return new, total * fade + p.sum(-1), acc * fade[..., None] + weigh(p)


def masked_loops(
    step: Callable, carry: Any, bounds: Sequence[Any], masked: Sequence[bool]
) -> Any:
    """Loops over the ranges between bounds, with step(i, carry, masked=...) in each."""
    for (start, stop), mask in zip(itertools.pairwise(bounds), masked, strict=True):
        one = functools.partial(step, masked=mask)
        carry = lax.fori_loop(start, stop, one, carry)
    return carry


def first_slot(block: int, i: Int[Array, ""] | int, slots: int) -> Int[Array, ""]:
    """Returns the first slot that block i reads: the last ends with the buffer."""
    return jnp.minimum(i * block, slots - block)


def read_block(
    buffer: Num[Array, "*L B S K H"], layer: Layer, at: Int[Array, ""], block: int
) -> Num[Array, "B block K H"]:
    """Reads the `block` slots of a layer from slot `at` on."""
    if layer is None:
        return lax.dynamic_slice_in_dim(buffer, at, block, axis=1)
    sizes = (1, buffer.shape[1], block, *buffer.shape[3:])
    return lax.dynamic_slice(buffer, (layer, 0, at, 0, 0), sizes)[0]
