"""The specification of `prefix_attention` in plain XLA, softmax in float32."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from beacon_jax.attention.device import Target

WEIGHTS = "attention_weights"


def reference(
    q,
    k,
    v,
    prefix,
    *,
    scale,
    layer=None,
    queries=None,
    target: Target | None = None,
):
    """See `api.prefix_attention`. Visits the whole capacity S, live or not."""
    del target  # the same for all
    if layer is not None:
        k, v = k[layer], v[layer]
    b, t, n, h = q.shape
    s, heads = k.shape[1:3]
    q = q.reshape(b, t, heads, n // heads, h)
    # Nothing dead is read: 0 * NaN would be NaN.
    live = (jnp.arange(s) < (prefix + t)[:, None])[..., None, None]
    k, v = jnp.where(live, k, 0), jnp.where(live, v, 0)
    scores = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32
    )
    last = prefix[:, None] + jnp.arange(t)  # [B, T] last key each query sees
    visible = jnp.arange(s) <= last[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = checkpoint_name(jax.nn.softmax(scores, axis=-1), WEIGHTS)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)
    out = out.reshape(b, t, n, h)
    if queries is not None:
        out = jnp.where((jnp.arange(t) < queries[:, None])[..., None, None], out, 0)
    return out.astype(q.dtype)
