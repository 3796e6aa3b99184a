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
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from beacon_jax.attention import blockwise
from beacon_jax.attention.decode import cpu_block, zero_invalid
from beacon_jax.attention.device import Target

# Scores of a block: ROWS x BLOCK x 4 bytes = 2 MiB, a core's second-level cache.
ROWS, BLOCK = 4096, 128
# Backward, larger blocks: each reads and writes the gradients of all queries.
BACKWARD_BLOCK = 256
LEAST_TILE = 64
# Up to so many rows of queries x heads are few; they read slots of up to NARROW numbers
# as one matrix.
FEW, NARROW = 32, 256


def blockwise_cpu(
    q,
    k,
    v,
    prefix,
    *,
    scale,
    layer=None,
    queries=None,
    target: Target | None = None,
    rows=ROWS,
    block=None,
    few=FEW,
):
    """See `api.prefix_attention`.

    Args:
      rows: of all rows and heads, that a tile has about.
      block: keys at once; None: `cpu_block` for few rows, else BLOCK, and
        BACKWARD_BLOCK backward.
      few: rows of one text, up to which they are few.
    """
    del target  # blocks are a CPU's
    out: Any = _attend(scale, rows, block, few, q, k, v, prefix, layer)
    return zero_invalid(out, queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(scale, rows, block, few, q, k, v, prefix, layer):
    return forward(scale, rows, block, few, q, k, v, prefix, layer)[0]


def _attend_fwd(scale, rows, block, few, q, k, v, prefix, layer):
    out, lse = forward(scale, rows, block, few, q, k, v, prefix, layer)
    out = checkpoint_name(out, blockwise.OUT)
    lse = checkpoint_name(lse, blockwise.LSE)
    return out, (q, k, v, prefix, layer, out, lse)


def _attend_bwd(scale, rows, block, few, residuals, d_out):
    del few
    gradients = functools.partial(backward, rows)
    return blockwise.pull(scale, block or BACKWARD_BLOCK, residuals, d_out, gradients)


_attend.defvjp(_attend_fwd, _attend_bwd)


def forward(scale, rows, block, few, q, k, v, prefix, layer):
    """Returns out [B, T, N, H] and the log of softmax's denominators [B, N, T]."""
    b, t, n, h = q.shape
    heads = k.shape[-2]
    attend = functools.partial(_tiles, scale, rows)
    if n * t > few:
        return attend(block or BLOCK, heads, q, k, v, prefix, layer)
    block = block or cpu_block(k, k.dtype)
    if heads * h > NARROW:
        return attend(block, heads, q, k, v, prefix, layer)
    wide = jnp.eye(heads, dtype=q.dtype)[:, None, :, None]  # [K, 1, K, 1]
    q = (q.reshape(b, t, heads, -1, 1, h) * wide).reshape(b, t, n, heads * h)
    out, lse = attend(block, 1, q, k, v, prefix, layer)
    own = jnp.diagonal(out.reshape(b, t, heads, -1, heads, h), axis1=2, axis2=4)
    return jnp.moveaxis(own, -1, 2).reshape(b, t, n, h), lse


def tile_length(rows: int, b: int, t: int, n: int) -> int:
    """Queries of a tile: equal tiles of about `rows` rows of all B texts and N heads,
    in whole vectors."""
    most = max(rows // (b * n), min(LEAST_TILE, rows))
    count = -(-t // most)
    return t if count == 1 else min(-(-t // (count * 16)) * 16, t)


def _tiles(scale, rows, block, heads, q, k, v, prefix, layer):
    """`forward`; heads: kv heads as the products are to see them, of q's width."""
    b, t, n, _ = q.shape
    block = min(block, k.shape[-3])
    tile = tile_length(rows, b, t, n)
    count = -(-t // tile)
    if q.dtype == jnp.float32:  # others would round
        q, scale = q * scale, None
    q = _split(q, count, tile, heads)
    attend = functools.partial(_tile, scale, block, tile, t, k, v, prefix, layer)
    if count == 1:
        out, lse = (x[None] for x in attend(q[0], 0))
    else:
        starts = tile * jnp.arange(count)
        out, lse = lax.map(lambda x: attend(*x), (q, starts))
    lse = lse.reshape(count, b, n, tile).transpose(1, 2, 0, 3)
    lse = lse.reshape(b, n, count * tile)[..., :t]
    return _join(out, t, n).astype(q.dtype), lse


def _split(x, count, tile, heads):
    """[B, T, N, H] -> tiles [count, B, K, G * tile, H]; 0 behind T."""
    b, t, n, h = x.shape
    x = jnp.pad(x, ((0, 0), (0, count * tile - t), (0, 0), (0, 0)))
    x = x.reshape(b, count, tile, heads, n // heads, h)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(count, b, heads, -1, h)


def _join(x, t, n):
    """[count, B, K, G * tile, H] -> [B, T, N, H]"""
    count, b, _, _, h = x.shape
    x = x.reshape(count, b, n, -1, h).transpose(1, 0, 3, 2, 4)
    return x.reshape(b, -1, n, h)[:, :t]


def _tile(scale, block, tile, t, k, v, prefix, layer, q, start):
    """Of the queries from `start`, q [B, K, G * tile, H]: (out [B, K, G * tile, H],
    lse [B, K, G * tile]) in float32."""
    b, heads, rows, h = q.shape
    first = prefix + start
    last = jnp.tile(first[:, None] + jnp.arange(tile), (1, rows // tile))

    def step(masked, i, carry):
        top, total, acc = carry
        at = blockwise.first_slot(block, i, k)
        keys, values = (_rows(x, layer, at, block, heads) for x in (k, v))
        if masked:
            slot, mine, live = _slots(i, at, block, prefix + t)
            keys, values = jnp.where(live, keys, 0), jnp.where(live, values, 0)
        scores = _product(q, keys, 3)
        if scale is not None:
            scores = scores * scale
        if masked:
            visible = mine & (slot <= last[:, :, None])
            scores = jnp.where(visible[:, None], scores, -jnp.inf)
        new = jnp.maximum(top, scores.max(-1))
        p, fade = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        part = _product(p.astype(values.dtype), values, 2)
        return new, total * fade + p.sum(-1), acc * fade[..., None] + part

    shape = (b, heads, rows)
    carry = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, h), jnp.float32),
    )
    # Key 0 is visible to every query, so that after block 0 no maximum is -inf.
    whole = (jnp.min(first) + 1) // block
    end = jnp.minimum(jnp.max(first) + tile, jnp.max(prefix) + t)
    carry = lax.fori_loop(0, whole, functools.partial(step, False), carry)
    blocks = (end + block - 1) // block
    carry = lax.fori_loop(whole, blocks, functools.partial(step, True), carry)
    top, total, acc = carry
    return acc / total[..., None], top + jnp.log(total)


def backward(rows, scale, block, q, k, v, prefix, layer, out, lse, d_out):
    """Returns d_q [B, T, N, H] and, of the layer, d_k and d_v [B, S, K, H]."""
    b, t, n, _ = q.shape
    heads, block = k.shape[-2], min(block, k.shape[-3])
    tile = tile_length(rows, b, t, n)
    count = -(-t // tile)
    delta = jnp.einsum("BTNH,BTNH->BTN", d_out, out, preferred_element_type=jnp.float32)
    # Queries behind T have d_out = 0 and delta = 0, and so no part in any sum.
    split = functools.partial(_split, count=count, tile=tile, heads=heads)
    tiles = split(q), split(d_out)
    by_query = [x[..., None] for x in (lse.swapaxes(1, 2), delta)]
    tiles += tuple(split(x)[..., 0] for x in by_query)
    of_block = functools.partial(_block_gradients, scale, block, tile, t, tiles)

    def step(i, carry):
        d_q, *d_kv = carry
        at, d_q, *parts = of_block(i, k, v, prefix, layer, d_q)
        return d_q, *(_add(x, at, part) for x, part in zip(d_kv, parts, strict=True))

    shape = k.shape if layer is None else k.shape[1:]
    carry = (
        jnp.zeros(tiles[0].shape, jnp.float32),
        jnp.zeros(shape, k.dtype),
        jnp.zeros(shape, v.dtype),
    )
    blocks = (jnp.max(prefix) + t + block - 1) // block
    d_q, d_k, d_v = lax.fori_loop(0, blocks, step, carry)
    return _join(d_q, t, n).astype(q.dtype), d_k, d_v


def _block_gradients(scale, block, tile, t, tiles, i, k, v, prefix, layer, d_q):
    """Of block i: its first slot, d_q of all tiles with its part, and its own d_k and
    d_v [B, K, S', H] in float32."""
    heads, count = k.shape[-2], len(tiles[0])
    at = blockwise.first_slot(block, i, k)
    keys, values = (_rows(x, layer, at, block, heads) for x in (k, v))
    slot, mine, live = _slots(i, at, block, prefix + t)
    keys, values = jnp.where(live, keys, 0), jnp.where(live, values, 0)
    offset = jnp.tile(jnp.arange(tile), tiles[0].shape[3] // tile)

    def meet(masked, j, carry):
        d_q, d_k, d_v = carry
        q, d_out, lse, delta = (x[j] for x in tiles)
        scores = scale * _product(keys, q, 3)  # [B, K, S', G * tile]
        if masked:
            last = prefix[:, None] + j * tile + offset
            visible = mine[:, None] & (slot[:, None] <= last[:, None])
            scores = jnp.where(visible[:, None], scores, -jnp.inf)
        p = jnp.exp(scores - lse[:, :, None])
        d_s = p * (_product(values, d_out, 3) - delta[:, :, None]) * scale
        d_s = d_s.astype(q.dtype)
        d_v += _product(p.astype(d_out.dtype), d_out, 2)
        d_k += _product(d_s, q, 2)
        part = _product(d_s, keys, 2, of_a=2)
        return d_q.at[j].add(part), d_k, d_v

    # The first tile that sees a key of the block, and the first that sees all of it.
    begin = jnp.clip((i * block - jnp.max(prefix)) // tile, 0, count)
    whole = -((jnp.min(prefix) + 1 - (i + 1) * block) // tile)
    whole = jnp.clip(whole, begin, count)
    none = jnp.zeros(keys.shape, jnp.float32)
    carry = d_q, none, none
    carry = lax.fori_loop(begin, whole, functools.partial(meet, True), carry)
    return at, *lax.fori_loop(whole, count, functools.partial(meet, False), carry)


def _add(buffer, at, part):
    """part [B, K, S', H] to the slots at ...; where the last two blocks overlap, that
    of the second is 0."""
    part = part.swapaxes(1, 2).astype(buffer.dtype)
    old = lax.dynamic_slice_in_dim(buffer, at, part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(buffer, old + part, at, axis=1)


def _product(a, b, contracted, of_a=3):
    """a [B, K, R, X], or the transposed, and b [B, K, ...], of which one axis is X."""
    axes = (((of_a,), (contracted,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _slots(i, at, block, ends):
    """Slots [S'] of block i, which of them the block before did not have, and which of
    those are live [B, 1, S', 1]: nothing dead is read, for 0 * NaN would be NaN."""
    slot = at + jnp.arange(block)
    mine = slot >= i * block
    return slot, mine, (mine & (slot < ends[:, None]))[:, None, :, None]


def _rows(buffer, layer, at, block, heads):
    """Slots at ... of one layer, [B, heads, block, K * H / heads]. Viewed so only here:
    a buffer that is reshaped in front of a loop is copied (3x the time)."""
    if layer is None:
        part = lax.dynamic_slice_in_dim(buffer, at, block, axis=1)
    else:
        sizes = (1, buffer.shape[1], block, *buffer.shape[3:])
        part = lax.dynamic_slice(buffer, (layer, 0, at, 0, 0), sizes)[0]
    return part.reshape(*part.shape[:2], heads, -1).swapaxes(1, 2)
