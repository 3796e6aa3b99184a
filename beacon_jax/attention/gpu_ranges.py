"""Which blocks of keys and queries see each other, for the kernels on GPUs.

Numbers, numpy's arrays and traced ones alike: a kernel asks inside, a test outside.
"""

import jax.numpy as jnp
from jax import lax

from beacon_jax.attention.shared import Count


def key_range(
    prefix: Count,
    valid: Count,
    start: Count,
    rows: int,
    keys: int,
    *,
    group: int = 1,
    split: tuple[Count, int] = (0, 1),
) -> tuple[Count, Count, Count]:
    """Returns (first, full, end) of the blocks of keys that some rows visit.

    Each of the rows sees all keys of the blocks before `full`; the others need a mask.
    Without a valid query all are 0.

    Args:
      prefix, valid: entries in front of the first query, and valid queries.
      start, rows: rows start ... start + rows - 1; row r belongs to query r // group.
      keys: of a block.
      split: (z, Z), the z-th of Z equal shares of the blocks.
    """
    z, splits = split
    live = valid * group
    last = jnp.maximum(jnp.minimum(start + rows, live) - 1, 0)
    most = lax.div(prefix + lax.div(last, group), keys) + 1
    most = jnp.where(start < live, most, 0)
    share = lax.div(most + splits - 1, splits)
    first, end = (jnp.minimum(x * share, most) for x in (z, z + 1))
    full = lax.div(prefix + lax.div(start, group) + 1, keys)
    return first, jnp.clip(full, first, end), end


def query_range(
    prefix: Count, valid: Count, start: Count, keys: int, queries: int
) -> tuple[Count, Count, Count]:
    """Returns (first, full, end) of the blocks of queries that see some keys.

    Keys start ... start + keys - 1. Blocks from `full` on see all of them; first == end
    where no query sees any.
    """
    start, last = start - prefix, start + keys - 1 - prefix
    end = lax.div(valid + queries - 1, queries)
    first = lax.div(jnp.maximum(start, 0), queries)
    first = jnp.where(start < valid, first, end)
    full = lax.div(jnp.maximum(last, 0) + queries - 1, queries)
    return first, jnp.clip(full, first, end), end
