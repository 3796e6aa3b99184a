"""`blockwise` as a CPU wants it: the same online softmax, other loops and layouts.

What makes the difference (Qwen2-0.5B's heads, 1152 queries on 2048 slots, CPU seconds
of two AVX-512 cores: 0.95 by `blockwise`, 0.12 here; backward, on 4096 live slots,
Llama-2-7B's heads 2.51 and 1.25, Qwen2-7B's 2.75 and 0.95):

  products   batch axes in front and rows of all G heads of a kv head together, as the
             CPU's libraries take them; any other order of axes is transposed as a whole
  tiles      of queries, so that a block of scores stays in the cache, and keys behind a
             tile's last query are not visited
  masks      only for blocks that some query of the tile does not see in full
  backward   a block of keys meets all tiles of queries: its own gradients are summed
             where they are small, and written once
  decoding   few queries are a matter of bytes: blocks are as large as a cache takes.
             Where slots are narrow, with every query zero-padded to the width of all kv
             heads, the buffer is one matrix [S', K H] per row that is read as it lies.
             That costs K times the products: 0.8 of the time at Qwen2-0.5B's K H = 128,
             1.1 of it at Qwen2-7B's 512, 1.6 at Llama-2-7B's 4096
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.attention.decode import cpu_block
from beacon_jax.attention.device import Target
from beacon_jax.attention.shared import (
    Layer,
    Sums,
    add_block,
    attend,
    first_slot,
    live_bias,
    masked_loops,
    no_sums,
    read_block,
    zero_invalid,
)

# Scores of a block: rows x block x 4 bytes = 2 MiB, a core's second-level cache.
ROWS, BLOCK = 4096, 128
# Backward, larger blocks: each reads and writes the gradients of all queries. With as
# many rows as forward a window of SmolLM2 (320 queries on 832 slots) takes 1.6 times as
# long.
BACKWARD_ROWS, BACKWARD_BLOCK = 2048, 256
LEAST_TILE = 64
# Up to so many rows of queries x heads are few; they read slots of up to NARROW numbers
# as one matrix.
FEW, NARROW = 32, 256


def blockwise_cpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float,
    layer: Layer = None,
    queries: Int[Array, " B"] | None = None,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
    target: Target | None = None,
    rows: int | None = None,
    block: int | None = None,
    few: int = FEW,
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` by tiles of queries.

    Args:
      rows: of all rows and heads, that a tile has about; None: ROWS, and
        BACKWARD_ROWS backward.
      block: keys at once; None: `cpu_block` for few rows, else BLOCK, and
        BACKWARD_BLOCK backward.
      few: rows of one text, up to which they are few.
    """
    del target  # blocks are a CPU's
    there = functools.partial(forward, scale, rows or ROWS, block, few)
    back = functools.partial(
        backward, scale, rows or BACKWARD_ROWS, block or BACKWARD_BLOCK
    )
    out: Any = attend(there, back, q, k, v, prefix, layer, bias)
    return zero_invalid(out, queries)


def forward(
    scale: float,
    rows: int,
    block: int | None,
    few: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "*_L _B _K _S"] | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the result and the log of softmax's denominators."""
    b, t, n, h = q.shape
    heads = k.shape[-2]
    tiles = functools.partial(_tiles, scale, rows)
    if n * t > few:
        return tiles(block or BLOCK, heads, q, k, v, prefix, layer, bias)
    block = block or cpu_block(k, k.dtype, t)
    if heads * h > NARROW:
        return tiles(block, heads, q, k, v, prefix, layer, bias)
    wide = jnp.eye(heads, dtype=q.dtype)[:, None, :, None]  # [K, 1, K, 1]
    q = (q.reshape(b, t, heads, -1, 1, h) * wide).reshape(b, t, n, heads * h)
    out, lse = tiles(block, 1, q, k, v, prefix, layer, bias)
    own = jnp.diagonal(out.reshape(b, t, heads, -1, heads, h), axis1=2, axis2=4)
    return jnp.moveaxis(own, -1, 2).reshape(b, t, n, h), lse


def tile_length(rows: int, b: int, t: int, n: int) -> int:
    """Counts the queries of a tile, in whole vectors.

    Tiles are equal, and have about `rows` rows of all B texts and N heads.
    """
    most = max(rows // (b * n), min(LEAST_TILE, rows))
    count = -(-t // most)
    return t if count == 1 else min(-(-t // (count * 16)) * 16, t)


def _tiles(
    scale: float,
    rows: int,
    block: int,
    heads: int,
    q: Float[Array, "B T N W"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "*_L _B _K _S"] | None,
) -> tuple[Float[Array, "B T N W"], Float[Array, "B N T"]]:
    """Computes `forward`; heads: kv heads as the products see them, of q's width W."""
    b, t, n, _ = q.shape
    block = min(block, k.shape[-3])
    tile = tile_length(rows, b, t, n)
    count = -(-t // tile)
    # Where that does not round: the scale of heads of 16, 64 or 256 is a power of two.
    exact = q.dtype == jnp.float32 or math.frexp(scale)[0] == 0.5
    q = _split(q * scale if exact else q, count, tile, heads)
    one = functools.partial(_tile, None if exact else scale, block, tile, t)
    bias = live_bias(bias, prefix, t, layer)
    attend_tile = functools.partial(one, k, v, prefix, layer, bias)
    if count == 1:
        out, lse = (x[None] for x in attend_tile(q[0], 0))
    else:
        starts = tile * jnp.arange(count)
        out, lse = lax.map(lambda x: attend_tile(*x), (q, starts))
    lse = lse.reshape(count, b, n, tile).transpose(1, 2, 0, 3)
    lse = lse.reshape(b, n, count * tile)[..., :t]
    return _join(out, t, n).astype(q.dtype), lse


def _split(
    x: Float[Array, "B T N H"], count: int, tile: int, heads: int, fill: int | float = 0
) -> Float[Array, "count B K R H"]:
    """Splits queries into tiles of R = G * tile rows, with `fill` behind T."""
    b, t, n, h = x.shape
    widths = (0, 0), (0, count * tile - t), (0, 0), (0, 0)
    x = jnp.pad(x, widths, constant_values=fill)
    x = x.reshape(b, count, tile, heads, n // heads, h)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(count, b, heads, -1, h)


def _join(x: Float[Array, "count B K R H"], t: int, n: int) -> Float[Array, "B T N H"]:
    """Puts together what `_split` split."""
    count, b, _, _, h = x.shape
    x = x.reshape(count, b, n, -1, h).transpose(1, 0, 3, 2, 4)
    return x.reshape(b, -1, n, h)[:, :t]


def _tile(
    scale: float | None,
    block: int,
    tile: int,
    t: int,
    k: Float[Array, "*L B S _ _"],
    v: Float[Array, "*L B S _ _"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "B _K S"] | None,
    q: Float[Array, "B K R H"],
    start: Int[Array, ""] | int,
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R"]]:
    """Returns the result and lse, in float32, of the R = G * tile rows from `start`."""
    b, heads, rows, h = q.shape
    first = prefix + start
    last = jnp.tile(first[:, None] + jnp.arange(tile), (1, rows // tile))

    def step(i: Array, sums: Sums, *, masked: bool) -> Sums:
        at = first_slot(block, i, k.shape[-3])
        keys, values = (_rows(x, layer, at, block, heads) for x in (k, v))
        slot, mine, live = _slots(i, at, block, prefix + t)
        # bfloat16 also where all are live: XLA would fold the transposed slices into
        # the products, which it then makes in float32, 2.7 times as slow.
        if masked or q.dtype != jnp.float32:
            keys, values = jnp.where(live, keys, 0), jnp.where(live, values, 0)
        scores = _product(q, keys, 3)
        if scale is not None:
            scores = scores * scale
        if bias is not None:
            # A kv head's rows lie together, in one matrix of all heads, too.
            part = lax.dynamic_slice_in_dim(bias, at, block, axis=2)
            by_head = scores.reshape(*bias.shape[:2], -1, block)
            scores = (by_head + part[:, :, None]).reshape(scores.shape)
        if masked:
            visible = mine & (slot <= last[:, :, None])
            scores = jnp.where(visible[:, None], scores, -jnp.inf)
        weigh = lambda p: _product(p.astype(values.dtype), values, 2)
        return add_block(sums, scores, weigh)

    # Key 0 is visible to every query, so that after block 0 no maximum is -inf.
    whole = (jnp.min(first) + 1) // block
    end = jnp.minimum(jnp.max(first) + tile, jnp.max(prefix) + t)
    bounds = (0, whole, (end + block - 1) // block)
    sums = masked_loops(step, no_sums(b, heads, rows, h), bounds, (False, True))
    top, total, acc = sums
    return acc / total[..., None], top + jnp.log(total)


def backward(
    scale: float,
    rows: int,
    block: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "*_L _B _K _S"] | None,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns d_q and, of the layer, d_k and d_v."""
    b, t, n, _ = q.shape
    heads, block = k.shape[-2], min(block, k.shape[-3])
    tile = tile_length(rows, b, t, n)
    count = -(-t // tile)
    delta = jnp.einsum("BTNH,BTNH->BTN", d_out, out, preferred_element_type=jnp.float32)
    # Queries behind T have d_out = 0 and delta = 0, and so no part in any sum.
    split = functools.partial(_split, count=count, tile=tile, heads=heads)
    tiles = split(q), split(d_out)
    lse, delta = lse.swapaxes(1, 2)[..., None], delta[..., None]
    # But with a bias e ** score may overflow, and 0 * inf is NaN: lse = inf makes it 0.
    lse = split(lse, fill=0 if bias is None else jnp.inf)
    tiles += lse[..., 0], split(delta)[..., 0]
    bias = live_bias(bias, prefix, t, layer)
    of_block = functools.partial(_block_gradients, scale, block, tile, t, tiles)

    def step(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        d_q, *d_kv = carry
        at, d_q, *parts = of_block(i, k, v, prefix, layer, bias, d_q)
        return d_q, *(_add(x, at, part) for x, part in zip(d_kv, parts, strict=True))

    shape = k.shape if layer is None else k.shape[1:]
    carry = (
        jnp.zeros(tiles[0].swapaxes(3, 4).shape, jnp.float32),
        jnp.zeros(shape, k.dtype),
        jnp.zeros(shape, v.dtype),
    )
    blocks = (jnp.max(prefix) + t + block - 1) // block
    d_q, d_k, d_v = lax.fori_loop(0, blocks, step, carry)
    return _join(d_q.swapaxes(3, 4), t, n).astype(q.dtype), d_k, d_v


def _block_gradients(
    scale: float,
    block: int,
    tile: int,
    t: int,
    tiles: tuple[Array, ...],
    i: Int[Array, ""],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    layer: Layer,
    bias: Float[Array, "B K S"] | None,
    d_q: Float[Array, "count B K H R"],
) -> tuple[
    Int[Array, ""],
    Float[Array, "count B K H R"],
    Float[Array, "B K block H"],
    Float[Array, "B K block H"],
]:
    """Returns block i's first slot, d_q with its part, and its own d_k and d_v.

    tiles: `_split` q, d_out, lse and delta. Gradients are float32.
    """
    heads, count = k.shape[-2], len(tiles[0])
    at = first_slot(block, i, k.shape[-3])
    keys, values = (_rows(x, layer, at, block, heads) for x in (k, v))
    slot, mine, live = _slots(i, at, block, prefix + t)
    keys, values = jnp.where(live, keys, 0), jnp.where(live, values, 0)
    by_width = keys.swapaxes(2, 3)  # [B, K, H, S']: sums over the first axis are slow
    if bias is not None:
        bias = lax.dynamic_slice_in_dim(bias, at, block, axis=2)[..., None]
    offset = jnp.tile(jnp.arange(tile), tiles[0].shape[3] // tile)

    def meet(j: Array, carry: tuple[Array, ...], *, masked: bool) -> tuple[Array, ...]:
        d_q, d_k, d_v = carry
        q, d_out, lse, delta = (x[j] for x in tiles)
        scores = scale * _product(keys, q, 3)  # [B, K, S', G * tile]
        if bias is not None:
            scores = scores + bias
        if masked:
            last = prefix[:, None] + j * tile + offset
            visible = mine[:, None] & (slot[:, None] <= last[:, None])
            scores = jnp.where(visible[:, None], scores, -jnp.inf)
        p = jnp.exp(scores - lse[:, :, None])
        d_s = p * (_product(values, d_out, 3) - delta[:, :, None]) * scale
        d_s = d_s.astype(q.dtype)
        d_v += _product(p.astype(d_out.dtype), d_out, 2)
        d_k += _product(d_s, q, 2)
        part = _product(by_width, d_s, 2)
        return d_q.at[j].add(part), d_k, d_v

    # The first tile that sees a key of the block, and the first that sees all of it.
    begin = jnp.clip((i * block - jnp.max(prefix)) // tile, 0, count)
    whole = -((jnp.min(prefix) + 1 - (i + 1) * block) // tile)
    whole = jnp.clip(whole, begin, count)
    none = jnp.zeros(keys.shape, jnp.float32)
    bounds = (begin, whole, count)
    return at, *masked_loops(meet, (d_q, none, none), bounds, (True, False))


def _add(
    buffer: Float[Array, "B S K H"],
    at: Int[Array, ""],
    part: Float[Array, "B K block H"],
) -> Float[Array, "B S K H"]:
    """Adds a block's part to the slots from `at` on.

    Where the last two blocks overlap, that of the second is 0.
    """
    part = part.swapaxes(1, 2).astype(buffer.dtype)
    old = lax.dynamic_slice_in_dim(buffer, at, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(buffer, old + part, at, axis=1)


def _product(
    a: Float[Array, "B K _ _"],
    b: Float[Array, "B K _ _"],
    contracted: int,
) -> Float[Array, "B K _ _"]:
    """Multiplies, in float32, and sums over a's last axis and `contracted` of b."""
    axes = (((3,), (contracted,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _slots(
    i: Int[Array, ""], at: Int[Array, ""], block: int, ends: Int[Array, " B"]
) -> tuple[Int[Array, " block"], Bool[Array, " block"], Bool[Array, "B 1 block 1"]]:
    """Returns the slots of block i, which are not in the block before, and the live.

    Nothing dead is read, for 0 * NaN would be NaN.
    """
    slot = at + jnp.arange(block)
    mine = slot >= i * block
    return slot, mine, (mine & (slot < ends[:, None]))[:, None, :, None]


def _rows(
    buffer: Float[Array, "*L B S K H"],
    layer: Layer,
    at: Int[Array, ""],
    block: int,
    heads: int,
) -> Float[Array, "B heads block _"]:
    """Reads slots of one layer, with K * H / heads numbers for each of the heads.

    Viewed so only here: a buffer that is reshaped in front of a loop is copied (3x the
    time).
    """
    part = read_block(buffer, layer, at, block)
    return part.reshape(*part.shape[:2], heads, -1).swapaxes(1, 2)
