"""Block sizes of the TPU kernels per chip, and which blocks a call visits."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from beacon_jax.attention.device import Target
from beacon_jax.attention.shared import Count, Shaped

LANES = 128
# Rows of queries and of keys are padded to this: the sublanes of a bfloat16 tile.
SUBLANES = 16
MIB = 2**20


class TpuBlocks(NamedTuple):
    """Block sizes for one chip at two bytes per number.

    Attributes:
      queries, keys: rows of all heads of a block together; fewer heads, longer
        blocks.
      vmem: bytes a kernel may use of a core's vector memory. Compiled for 7B shapes
        they take 11 MiB on v4, 18 on v5e, 20 on v5p and 32 on v6e.
      scores: of all heads that one pass of an inner loop computes. It is unrolled:
        twice as many compile for more than twice as long (four heads of 1024 x 1024:
        100 s).
    """

    queries: int
    keys: int
    vmem: int
    scores: int = 2**19


# By device kind; what v4's 16 MiB hold is the default. Each byte of keys that is
# fetched meets queries / heads rows, 2 FLOP with each: 256 rows reach the ratio of a
# v5e's matrix unit and memory (197 TFLOP/s, 819 GB/s), 512 that of a v6e (918, 1640).
DEFAULT = TpuBlocks(2048, 2048, 16 * MIB)
CHIPS = {
    "TPU v4": DEFAULT,
    "TPU v5 lite": TpuBlocks(4096, 4096, 32 * MIB),
    "TPU v5": TpuBlocks(4096, 4096, 32 * MIB),
    "TPU v6 lite": TpuBlocks(8192, 4096, 64 * MIB),
}


def chip_blocks(target: Target) -> TpuBlocks:
    """Returns the blocks of a chip."""
    return CHIPS.get(target.kind, DEFAULT)


class TpuSchedule(NamedTuple):
    """The numbers that one call is compiled for, every tuple of sizes included.

    Attributes:
      scale: of the scores.
      heads: kv heads per block.
      group: query heads per kv head, G.
      rows, queries: rows R of queries per kv head, padded, and per block.
      keys: slots per block.
      chunk: slots computed at once, what the compiler unrolls.
      vmem: bytes of vector memory.
      interpret: simulate the kernels, or how.
      target: what the gradient is for.
    """

    scale: float
    heads: int
    group: int
    rows: int
    queries: int
    keys: int
    chunk: int
    vmem: int
    interpret: Any = False
    target: Target | None = None

    def visited(self, prefix: Count, queries: Count, i: Count) -> Count:
        """Counts the blocks of keys that block i of queries visits in one row."""
        end = jnp.minimum((i + 1) * self.queries, queries * self.group)
        last = lax.div(jnp.maximum(end - 1, 0), self.group) + prefix
        some = i * self.queries < queries * self.group
        return jnp.where(some, lax.div(last, self.keys) + 1, 0)

    def first(self, prefix: Count, j: Count) -> Count:
        """Returns the first block of queries that sees block j of keys."""
        row = (j * self.keys - prefix) * self.group
        return lax.div(jnp.maximum(row, 0), self.queries)


def heads_per_block(k: Shaped) -> int:
    """Counts the heads of a block: all, unless they fill whole tiles of [.., K, H]."""
    kv, tile = k.shape[-2], 32 if k.dtype.itemsize == 1 else 8
    return kv if kv % tile else tile


def make_schedule(
    q: Shaped,
    k: Shaped,
    scale: float,
    blocks: TpuBlocks,
    interpret: Any = False,
    target: Target | None = None,
) -> TpuSchedule:
    """Makes the schedule of `pallas_tpu` for q [B, T, N, H] and k [*L, B, S, K, H]."""
    t, n, h = q.shape[1:]
    s, kv = k.shape[-3:-1]
    heads = heads_per_block(k)
    # Rows of H > 128 or of four bytes count double.
    width = heads * pl.cdiv(h, LANES) * max(q.dtype.itemsize, k.dtype.itemsize) / 2

    def fit(budget: int, longest: int, align: int) -> int:
        most = max(LANES, int(budget / width) // LANES * LANES)
        return min(most, 1024, pl.cdiv(longest, align) * align)

    rows = t * (n // kv)
    queries = fit(blocks.queries, rows, SUBLANES)
    if queries > LANES:
        queries = queries // LANES * LANES
    # Picking a head's keys out of a block costs about as much as 128 rows of queries,
    # out of an int8 block four times that.
    least = LANES * 4 if k.dtype.itemsize == 1 else LANES
    chunk = max(LANES, blocks.scores // (heads * max(queries, least)) // LANES * LANES)
    keys = fit(blocks.keys, s, LANES)
    chunk = min(chunk, keys)
    return TpuSchedule(
        scale=scale,
        heads=heads,
        group=n // kv,
        rows=pl.cdiv(rows, queries) * queries,
        queries=queries,
        keys=keys // chunk * chunk,
        chunk=chunk,
        vmem=blocks.vmem,
        interpret=interpret,
        target=target,
    )


def visited_blocks(schedule: TpuSchedule, prefix: Count, queries: Count) -> Count:
    """Counts the blocks of keys that the forward pass computes per row and kv head.

    int [B]. What the kernels' schedule says, for tests and for analytic costs.
    """
    blocks = range(schedule.rows // schedule.queries)
    return sum(schedule.visited(prefix, queries, i) for i in blocks)
