"""Where a program of the Mosaic kernels stands in the arrays of its call."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Program:
    """One program's place in the arrays: row `b`, head `n`, split `z`.

    Attributes:
      start: first of the rows or keys that it owns.
      prefix, valid: of the row.
      at: index of the layer's row in [L * B, ...].
    """

    b: Any
    n: Any
    z: Any
    start: Any
    prefix: Any
    valid: Any
    at: Any


class Shape(NamedTuple):
    """Sizes of the arrays of a call: T rows of queries and S slots of width H."""

    rows: int
    t: int
    s: int
    h: int


def find_program(
    shape: Shape, own: int, last_first: bool, length_ref: Any, layer_ref: Any
) -> Program:
    """Finds the place of this program, which owns `own` of the rows or keys."""
    b, n, z = (lax.axis_index(name) for name in ("row", "head", "split"))
    i = lax.axis_index("block")
    if last_first:
        # The last block of queries comes first: it has the most keys.
        start = (shape.t // own - 1 - i) * own
    else:
        # Where two blocks of keys overlap, both programs write the same numbers.
        start = jnp.minimum(i * own, shape.s - own)
    at = layer_ref[0] * shape.rows + b
    return Program(b, n, z, start, length_ref[b, 0], length_ref[b, 1], at)
