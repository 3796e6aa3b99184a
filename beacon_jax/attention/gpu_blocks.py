"""Block sizes of the GPU kernels, per chip and head dimension."""

from typing import NamedTuple

import jax.numpy as jnp


class Block(NamedTuple):
    """One kernel: rows of queries and of keys per step, warps per program, and blocks
    that are fetched ahead. Rows are powers of two, at least 16."""

    queries: int
    keys: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    forward: Block
    d_q: Block
    d_kv: Block


TABLE = {
    ("sm_80", 64): Blocks(
        Block(128, 64, 4, 3), Block(128, 64, 8, 2), Block(64, 128, 8, 2)
    ),
    ("sm_80", 128): Blocks(
        Block(128, 64, 8, 2), Block(128, 32, 8, 2), Block(32, 128, 8, 2)
    ),
    ("sm_80", 256): Blocks(
        Block(64, 32, 8, 2), Block(64, 32, 8, 1), Block(32, 64, 8, 1)
    ),
}
FLOAT32 = Blocks(Block(32, 32, 4, 1), Block(32, 32, 4, 1), Block(32, 32, 4, 1))


def chip_blocks(kind: str, head_dim: int, dtype) -> Blocks:
    if dtype == jnp.float32:
        return FLOAT32
    size = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return TABLE["sm_80", size]
