"""Compiled kernels against the specification, on the device and at a preset's shapes.

The tests say more, but interpret the kernels. Here two rows, one with an empty memory
and one with 3/4 of 4 windows, meet half a window and 4 queries (and, forward only, one
query, as in decoding), also with a bias per slot. Every dead slot holds NaN. What is
right is the reference in float32 at the highest precision, on the same rounded inputs.
Errors are shares of the largest value, and allowed are

  float32   5e-6, products at the highest precision
  bfloat16  twice the error of the reference itself in bfloat16, and for d_q and d_k
            twice what it costs besides that a backward pass meets the result rounded

The last is there because the sum over p * d_p, which softmax's gradient subtracts, is
taken from the result (FlashAttention, arXiv 2205.14135, section B.2), which is
bfloat16. Where attention is peaked that outweighs the rest: in 240 draws the blocked
passes had up to 6.0 times the reference's error, in 360 up to 1.4 times the sum of
both.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.attention import IMPLEMENTATIONS, blockwise, prefix_attention
from beacon_jax.bench.case import Bench, Case
from beacon_jax.bench.device import check_platform, random_array, whole_tiles
from beacon_jax.bench.records import Row

DTYPES = ("float32", "bfloat16")
FLOAT32_ERROR = 5e-6
NAMES = ("out", "d_q", "d_k", "d_v")


def cases(s: Bench) -> Iterator[Case]:
    """Yields every implementation in every dtype, on a window and in decoding."""
    window = s.beacon.window
    for way, queries in (("window", window // 2 + 4), ("decode", 1)):
        for bias, dtype in itertools.product((False, True), DTYPES):
            for name in IMPLEMENTATIONS:
                key = {"part": "parity", "preset": s.preset, "dtype": dtype}
                key |= {"way": way + " with bias" * bias, "implementation": name}
                key |= {"queries": queries, "memory": 4 * window}
                run = functools.partial(_errors, s, name, dtype, queries, bias)
                yield Case(key, run)


def _errors(s: Bench, name: str, dtype: str, queries: int, bias: bool) -> Row:
    check_platform(name, s.device)
    if dtype == "bfloat16" and name == "reference":
        raise NotImplementedError("it is the measure of the others.")
    given = _inputs(s, queries, dtype, bias)
    backward = queries > 1
    right = _run("reference", [x.astype(jnp.float32) for x in given], backward)
    ours = _distance(_run(name, given, backward), right)
    allowed = [FLOAT32_ERROR] * len(right)
    if dtype == "bfloat16":
        naive = _distance(_run("reference", given, backward), right)
        rounded = _rounded(given, right) if backward else [0.0]
        allowed = [2 * (a + b) for a, b in zip(naive, rounded, strict=True)]
    errors = dict(zip(NAMES, ours, strict=False))
    if not all(e <= a for e, a in zip(ours, allowed, strict=True)):  # NaN is not
        raise ArithmeticError(f"errors {errors}, allowed {allowed}")
    return {"errors": errors, "allowed": dict(zip(NAMES, allowed, strict=False))}


def _inputs(s: Bench, queries: int, dtype: str, bias: bool) -> list[jax.Array]:
    """Draws q, k, v, the cotangent of the result, the prefix of both rows.

    And, last, a bias if there shall be one.
    """
    c, memory = s.config, 4 * s.beacon.window
    prefix = jnp.asarray([0, 3 * memory // 4 + 1], jnp.int32)
    root = jax.random.key(0, impl="rbg")
    make = lambda i, *shape: random_array(jax.random.fold_in(root, i), shape, dtype)
    q = make(0, 2, queries, c.num_heads, c.head_dim)
    shape = (2, whole_tiles(memory + queries), c.num_kv_heads, c.head_dim)
    dead = jnp.arange(shape[1]) >= (prefix + queries)[:, None]
    poison = lambda x: jnp.where(dead[..., None, None], jnp.nan, x).astype(dtype)
    d_out = make(3, *q.shape)
    given = [q, poison(make(1, *shape)), poison(make(2, *shape)), d_out, prefix]
    if bias:
        per_slot = (2, c.num_kv_heads, shape[1])
        drawn = random_array(jax.random.fold_in(root, 4), per_slot, "float32")
        given.append(jnp.where(dead[:, None], jnp.nan, 3 * drawn))
    return given


def _run(name: str, given: list[jax.Array], backward: bool) -> list[np.ndarray]:
    q, k, v, d_out, prefix, *bias = given
    with jax.default_matmul_precision("highest"):
        run = _program(name, backward)
        found = run(q, k, v, d_out, prefix.astype(jnp.int32), *bias)
    return [np.asarray(x, np.float64) for x in found]


def _rounded(given: list[jax.Array], right: list[np.ndarray]) -> list[float]:
    """Returns the errors of float32 gradients of which the result alone is rounded."""
    q, k, v, d_out, prefix, *bias = given
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
    slots = (scale, blockwise.BLOCK, q, k, v, prefix, None, bias[0] if bias else None)
    with jax.default_matmul_precision("highest"):
        out, lse = blockwise.forward(*slots)
        out = out.astype(dtype).astype(jnp.float32)
        d_q, d_k, _ = blockwise.backward(*slots, out, lse, d_out)
    found = [np.asarray(x, np.float64) for x in (d_q, d_k)]
    return [0.0, *_distance(found, right[1:3]), 0.0]


@functools.cache
def _program(name: str, backward: bool) -> Callable[..., Any]:
    def both(q, k, v, d_out, prefix, bias=None):
        attend: Callable[..., Any] = lambda q, k, v: prefix_attention(
            q, k, v, prefix, implementation=name, bias=bias
        )
        if not backward:
            return (attend(q, k, v),)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return jax.jit(both)


def _distance(ours: list[np.ndarray], right: list[np.ndarray]) -> list[float]:
    pairs = zip(ours, right, strict=True)
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
