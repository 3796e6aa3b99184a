"""The specification of `prefix_attention` in plain XLA, softmax in float32."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from beacon_jax.attention.device import Target
from beacon_jax.attention.shared import Layer, live_bias, live_layer, zero_invalid

WEIGHTS = "attention_weights"


def reference(
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
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` over the whole capacity S, live or not."""
    del target  # the same for all
    b, t, n, h = q.shape
    k, v = live_layer(k, v, prefix + t, layer)
    bias = live_bias(bias, prefix, t, layer)
    s, heads = k.shape[1:3]
    q = q.reshape(b, t, heads, n // heads, h)
    scores = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores += jax.lax.stop_gradient(bias)[:, :, None, None]
    last = prefix[:, None] + jnp.arange(t)  # [B, T] last key each query sees
    visible = jnp.arange(s) <= last[:, :, None]
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = checkpoint_name(jax.nn.softmax(scores, axis=-1), WEIGHTS)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(b, t, n, h)
    return zero_invalid(out, queries).astype(q.dtype)
