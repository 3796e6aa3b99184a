"""`blockwise` as a CPU wants it: the same online softmax, other loops and layouts.

What makes the difference (Qwen2-0.5B's heads, 1152 queries on 2048 slots, CPU seconds
of two AVX-512 cores: 0.95 by `blockwise`, 0.12 here):

  products   batch axes in front and rows of all G heads of a kv head together, as the
             CPU's libraries take them; any other order of axes is transposed as a whole
  tiles      of queries, so that a block of scores stays in the cache, and keys behind a
             tile's last query are not visited
  masks      only for blocks that some query of the tile does not see in full
  decoding   few queries are a matter of bytes: with every query zero-padded to the
             width of all kv heads, the buffer is one matrix [S', K H] per row that is
             read as it lies. It costs K times the products, nothing beside the bytes
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from beacon_jax.attention import blockwise
from beacon_jax.attention.decode import zero_invalid

# Scores of a block: ROWS x BLOCK x 4 bytes = 2 MiB, a core's second-level cache.
ROWS, BLOCK = 4096, 128
LEAST_TILE = 64
# Up to so many rows of queries x heads read the buffer as one matrix, by larger blocks.
FEW, FEW_BLOCK = 32, 512


def blockwise_cpu(
    q, k, v, prefix, *, scale, layer=None, queries=None, rows=ROWS, block=None, few=FEW
):
    """See `api.prefix_attention`.

    Args:
      rows: of all rows and heads, that a tile has about.
      block: keys at once; None: FEW_BLOCK where the buffer is one matrix, else BLOCK.
      few: rows of one text, up to which the buffer is read as one matrix.
    """
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
    del rows, few
    return blockwise.pull(scale, block or blockwise.BLOCK, residuals, d_out)


_attend.defvjp(_attend_fwd, _attend_bwd)


def forward(scale, rows, block, few, q, k, v, prefix, layer):
    """out [B, T, N, H] and the log of the softmax's denominators [B, N, T]."""
    b, t, n, h = q.shape
    heads = k.shape[-2]
    if n * t > few:
        return _tiles(scale, rows, block or BLOCK, heads, q, k, v, prefix, layer)
    wide = jnp.eye(heads, dtype=q.dtype)[:, None, :, None]  # [K, 1, K, 1]
    q = (q.reshape(b, t, heads, -1, 1, h) * wide).reshape(b, t, n, heads * h)
    out, lse = _tiles(scale, rows, block or FEW_BLOCK, 1, q, k, v, prefix, layer)
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
    b, t, n, h = q.shape
    block = min(block, k.shape[-3])
    tile = tile_length(rows, b, t, n)
    count = -(-t // tile)
    if q.dtype == jnp.float32:  # others would round
        q, scale = q * scale, None
    q = jnp.pad(q, ((0, 0), (0, count * tile - t), (0, 0), (0, 0)))
    q = q.reshape(b, count, tile, heads, n // heads, h)
    q = q.transpose(1, 0, 3, 4, 2, 5).reshape(count, b, heads, -1, h)
    attend = functools.partial(_tile, scale, block, tile, t, k, v, prefix, layer)
    if count == 1:
        out, lse = (x[None] for x in attend(q[0], 0))
    else:
        starts = tile * jnp.arange(count)
        out, lse = lax.map(lambda x: attend(*x), (q, starts))
    out = out.reshape(count, b, n, tile, h).transpose(1, 0, 3, 2, 4)
    lse = lse.reshape(count, b, n, tile).transpose(1, 2, 0, 3)
    out = out.reshape(b, count * tile, n, h)[:, :t]
    return out.astype(q.dtype), lse.reshape(b, n, count * tile)[..., :t]


def _tile(scale, block, tile, t, k, v, prefix, layer, q, start):
    """Of the queries from `start`, q [B, K, G * tile, H]: (out [B, K, G * tile, H],
    lse [B, K, G * tile]) in float32."""
    b, heads, rows, h = q.shape
    first = prefix + start
    last = jnp.tile(first[:, None] + jnp.arange(tile), (1, rows // tile))

    def step(masked, i, carry):
        top, total, acc = carry
        at = jnp.minimum(i * block, k.shape[-3] - block)
        keys, values = (_rows(x, layer, at, block, heads) for x in (k, v))
        if masked:
            slot = at + jnp.arange(block)
            mine = slot >= i * block  # the last block ends with the buffer
            # Nothing dead is read: 0 * NaN would be NaN.
            live = (mine & (slot < (prefix + t)[:, None]))[:, None, :, None]
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


def _product(a, b, contracted):
    """a [B, K, R, X] and b [B, K, ...], of which one axis is X."""
    axes = (((3,), (contracted,)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _rows(buffer, layer, at, block, heads):
    """Slots at ... of one layer, [B, heads, block, K * H / heads]. Viewed so only here:
    a buffer that is reshaped in front of a loop is copied (3x the time)."""
    if layer is None:
        part = lax.dynamic_slice_in_dim(buffer, at, block, axis=1)
    else:
        sizes = (1, buffer.shape[1], block, *buffer.shape[3:])
        part = lax.dynamic_slice(buffer, (layer, 0, at, 0, 0), sizes)[0]
    return part.reshape(*part.shape[:2], heads, -1).swapaxes(1, 2)
