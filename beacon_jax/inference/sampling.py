"""Picks the next token from logits: greedy, temperature, top-k, top-p."""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@flax.struct.dataclass
class Sampling:
    """How to pick a token; arrays, so that changing a number compiles nothing anew.

    Attributes:
      temperature: logits are divided by it; 0 picks the most likely token.
      top_k: only the k most likely tokens; 0 keeps all.
      top_p: only the most likely tokens whose probabilities (at the temperature, after
        top_k) first reach p together, at least one; 1 keeps all.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


def make_sampling(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Sampling:
    """Checks the values; ValueError names the one that is out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature={temperature} must be 0 (greedy) or a positive number."
        )
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be positive, or 0 to keep all tokens.")
    if not 0 < top_p <= 1:
        raise ValueError(
            f"top_p={top_p} must be above 0 and at most 1 (1 keeps all tokens)."
        )
    return Sampling(
        jnp.float32(temperature), jnp.int32(min(top_k, 2**31 - 1)), jnp.float32(top_p)
    )


def sample(
    key: PRNGKeyArray, logits: Float[Array, "B V"], sampling: Sampling
) -> Int[Array, " B"]:
    """One token per row. Rows draw independently; temperature 0 ignores `key`."""

    def draw(logits: jax.Array) -> jax.Array:
        logits = logits.astype(jnp.float32) / sampling.temperature
        order = jnp.argsort(-logits, axis=-1)  # stable: ties keep the lower id
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        rank = jnp.arange(logits.shape[-1])
        keep = (rank < sampling.top_k) | (sampling.top_k == 0)
        p = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
        # A token stays if those before it have not reached p, so the first always does.
        keep &= (jnp.cumsum(p, axis=-1) - p < sampling.top_p) | (sampling.top_p == 1)
        pick = jax.random.categorical(key, jnp.where(keep, ranked, -jnp.inf), axis=-1)
        return jnp.take_along_axis(order, pick[:, None], axis=-1)[:, 0]

    def greedy(logits: jax.Array) -> jax.Array:
        return jnp.argmax(logits, axis=-1)

    token = jax.lax.cond(sampling.temperature > 0, draw, greedy, logits)
    return token.astype(jnp.int32)
