"""The forward and the backward pass of the kernels for GPUs, and what stands for them.

A program that is lowered for another platform than CUDA computes the same in XLA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from beacon_jax.attention import blockwise
from beacon_jax.attention.shared import attend, lowered, zero_invalid

LOG2E = math.log2(math.e)


MOST_QUERIES = 128  # of decoding
# Programs a launch should have: four for each of the 108 to 132 processors of an A100
# or H100, so that ragged rows even out. More splits only lengthen the combining pass.
PROGRAMS = 512


def check_few(queries: int) -> None:
    """Raises NotImplementedError for more queries than decoding is meant for."""
    if queries > MOST_QUERIES:
        raise NotImplementedError(f"q has {queries} queries: at most {MOST_QUERIES}.")


def enough_splits(programs: int, blocks: int) -> int:
    """Counts the splits of each row's slots, at least one block of keys each.

    programs: that a launch has without any.
    """
    return max(1, min(-(-PROGRAMS // max(programs, 1)), blocks))


def check_scale(scale: float) -> None:
    """Raises NotImplementedError unless scale > 0: the largest score stays that."""
    if not scale > 0:
        raise NotImplementedError(f"scale={scale}: must be greater than 0.")


def attend_on_gpu(
    forward: Callable, backward: Callable, schedule: Any, *given: Any
) -> Array:
    """Attends by the kernels of two passes, with a gradient.

    Args:
      forward: of (schedule, q, k, v, lengths, layer, bias), gives out [B, T, N, H] and
        the log of softmax's denominators [B, N, T], inf for invalid queries.
      backward: of those, out, lse and d_out, gives d_q [B, T, N, H] and, of the layer,
        d_k and d_v [B, S, K, H], exactly 0 in dead slots.
      schedule: has `scale` and `interpret`.
      given: q, k, v, lengths [B, 2], layer, bias.
    """
    there = functools.partial(_there, forward, schedule)
    back = functools.partial(_back, backward, schedule)
    return attend(there, back, *given)


def in_xla(
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    layer: Array,
    bias: Array | None,
) -> tuple[Array, Array]:
    """Computes what a forward pass does, blockwise."""
    prefix, valid = lengths[:, 0], lengths[:, 1]
    size = scale, blockwise.BLOCK
    out, lse = blockwise.forward(*size, q, k, v, prefix, layer, bias)
    some = jnp.arange(q.shape[1]) < valid[:, None]
    return zero_invalid(out, valid), jnp.where(some[:, None], lse, jnp.inf)


def _there(forward: Callable, schedule: Any, *given: Any) -> tuple[Array, Array]:
    elsewhere = functools.partial(in_xla, schedule.scale)
    kernels = functools.partial(forward, schedule)
    return lowered("cuda", schedule.interpret, kernels, elsewhere, *given)


def _back(backward: Callable, schedule: Any, *given: Any) -> tuple[Array, Array, Array]:
    def elsewhere(
        q: Array, k: Array, v: Array, lengths: Array, layer: Array, *more: Any
    ) -> tuple[Array, Array, Array]:
        prefix, valid = lengths[:, 0], lengths[:, 1]
        bias, out, lse, d_out = more
        q, d_out = zero_invalid(q, valid), zero_invalid(d_out, valid)
        size = schedule.scale, blockwise.BLOCK
        return blockwise.backward(*size, q, k, v, prefix, layer, bias, out, lse, d_out)

    kernels = functools.partial(backward, schedule)
    return lowered("cuda", schedule.interpret, kernels, elsewhere, *given)
