"""Block sizes of the GPU kernels, per chip and head dimension: the one table.

Where they come from: of the sizes compiled ahead of time for each chip (bfloat16,
T=1536, S=17920, 32 heads), the largest blocks whose registers do not spill, as ptxas
counts them; larger blocks read each key less often. Not timed: no GPU was at hand.
"""

import re
from typing import Any, NamedTuple

import jax.numpy as jnp


class Block(NamedTuple):
    """The sizes of one kernel.

    Attributes:
      queries, keys: rows per step, powers of two, at least 16.
      warps: per program.
      stages: of the pipeline that fetches ahead.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class GpuBlocks(NamedTuple):
    """The sizes of the forward kernel and of the two backward.

    Attributes:
      decode: of the forward kernel for a few queries; None: those of `forward`.
    """

    forward: Block
    d_q: Block
    d_kv: Block
    decode: Block | None = None


# By head dimension, padded to a power of two. Registers per thread of the three
# kernels: 253, 186, 245 | 228, 255, 255 (and 8 to 16 spilled) | 253, 250, 255. 163 KiB
# of shared memory per program: 136 at most. The spills of d_kv cost next to nothing: in
# its inner loop they are 1 store and 1 load per 256 matrix products of a warp. Without
# any, 128 queries x 64 keys have 32 stores to shared memory, 160 instead of 144 loads
# and 5 barriers instead of 2 there, and read each query twice as often.
SM_80 = {
    64: GpuBlocks(Block(128, 64, 4, 3), Block(64, 64, 4, 3), Block(64, 128, 8, 2)),
    128: GpuBlocks(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 128, 8, 2)),
    256: GpuBlocks(Block(64, 64, 8, 2), Block(64, 64, 8, 2), Block(32, 64, 8, 2)),
}
# Registers: 217, 126, 190 | 244, 171, 245 | 238, 220, 254. 227 KiB of shared memory
# per program: 192 at most.
SM_90 = {
    64: GpuBlocks(Block(128, 64, 4, 3), Block(128, 64, 8, 2), Block(64, 128, 8, 2)),
    128: GpuBlocks(Block(128, 128, 8, 2), Block(128, 64, 8, 3), Block(64, 128, 8, 2)),
    256: GpuBlocks(Block(128, 64, 8, 2), Block(64, 64, 8, 2), Block(32, 64, 8, 2)),
}
# Any other chip: within the 99 KiB of shared memory per program of sm_86 and sm_89.
SMALL = {
    64: GpuBlocks(Block(64, 64, 4, 3), Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
    128: GpuBlocks(Block(64, 64, 4, 2), Block(64, 32, 4, 2), Block(32, 64, 4, 2)),
    256: GpuBlocks(Block(64, 32, 4, 2), Block(32, 32, 4, 2), Block(32, 32, 4, 2)),
}
# Four bytes per number, and products without tensor cores.
FLOAT32 = {
    64: GpuBlocks(*[Block(32, 32, 4, 1)] * 3),
    128: GpuBlocks(*[Block(32, 32, 4, 1)] * 3),
    256: GpuBlocks(Block(16, 32, 4, 1), Block(16, 32, 4, 1), Block(16, 16, 4, 1)),
}
# By a word of the device's kind; A800, H800 and H20 are export versions.
GENERATIONS = dict.fromkeys(("A100", "A800"), "sm_80")
GENERATIONS |= dict.fromkeys(("H100", "H200", "H800", "H20"), "sm_90")
TRITON = {"sm_80": SM_80, "sm_90": SM_90}
# Others without spills at H = 128 on sm_90 (sm_80: at most 16 registers), for whoever
# has a chip to time them on, as queries x keys, warps, stages:
#   forward  64 x 64, 4, 2 or 3; 128 x 32, 4, 3; 128 x 64, 8, 2 or 3; 128 x 128, 8, 2
#   d_q      64 x 32, 4, 2 or 3; 64 x 64, 4, 2; 128 x 32, 8, 2; 128 x 64, 8, 2 or 3
#   d_kv     32 x 64, 4, 2 or 3; 64 x 64, 4, 2 and 8, 2; 32 x 128, 8, 2; 64 x 128, 8, 2


# Mosaic kernels, whose programs are a warpgroup of 4 warps; `bench.block_search` chose
# them. Registers of forward, d_q, d_kv: 255, 213, 224 | 255, 234, 255 (and 60 bytes
# spilled). 80 KiB of shared memory at most, so that a processor has two programs.
MOSAIC_80 = {
    64: GpuBlocks(
        *(Block(128, 64, 4, 3), Block(64, 64, 4, 3), Block(32, 64, 4, 3)),
        decode=Block(64, 64, 4, 3),
    ),
    128: GpuBlocks(
        *(Block(128, 32, 4, 3), Block(64, 32, 4, 3), Block(32, 64, 4, 3)),
        decode=Block(64, 64, 4, 2),
    ),
}
# 162, 231, 223 | 155, 192, 255, none spilled; 112 KiB at most.
MOSAIC_90 = {
    64: GpuBlocks(
        *(Block(64, 128, 4, 3), Block(64, 128, 4, 3), Block(64, 64, 4, 3)),
        decode=Block(64, 128, 4, 3),
    ),
    128: GpuBlocks(
        *(Block(64, 64, 4, 3), Block(64, 64, 4, 2), Block(64, 64, 4, 2)),
        decode=Block(64, 64, 4, 3),
    ),
}
MOSAIC = {"sm_80": MOSAIC_80, "sm_90": MOSAIC_90}


def generation_of(kind: str) -> str | None:
    """Returns "sm_80" or "sm_90", which a kind of device is of; None: neither.

    An A1000 is no A100.
    """
    for name, generation in GENERATIONS.items():
        if re.search(rf"{name}(?!\d)", kind):
            return generation
    return None


def mosaic_blocks(kind: str, head_dim: int) -> tuple[str, GpuBlocks]:
    """Returns the generation of a device of this kind, and the blocks.

    Raises:
      NotImplementedError: neither "sm_80" nor "sm_90"; a head_dim without sizes.
    """
    generation = generation_of(kind)
    if generation is None:
        raise NotImplementedError(f"device {kind}: one of {', '.join(GENERATIONS)}.")
    sizes = MOSAIC[generation]
    if head_dim not in sizes:
        known = " or ".join(map(str, sizes))
        raise NotImplementedError(f"head_dim={head_dim} of q: {known}.")
    return generation, sizes[head_dim]


def chip_blocks(kind: str, head_dim: int, dtype: Any) -> GpuBlocks:
    """Returns the blocks for a device of this kind, "NVIDIA A100-SXM4-80GB" say.

    Raises:
      NotImplementedError: head_dim > 256.
    """
    if head_dim > 256:
        raise NotImplementedError(f"head_dim={head_dim} of q: at most 256.")
    generation = generation_of(kind)
    table = SMALL if generation is None else TRITON[generation]
    if jnp.dtype(dtype).itemsize > 2:
        table = FLOAT32
    return table[next(size for size in sorted(table) if head_dim <= size)]
