"""Rotary position embedding, halves convention, angles in float32.

The kinds of scaling are those of docs/specification.md section 5.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.model.config import ModelConfig, RopeConfig


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, " H2"]:
    """Returns theta^(-2i/H), rescaled as config.rope.kind says; float32."""
    rope, h = config.rope, config.head_dim
    base = 1.0 / rope.theta ** (np.arange(0, h, 2, dtype=np.float64) / h)
    original = rope.original_max_position or config.max_position
    if rope.kind == "linear":
        base = base / rope.factor
    elif rope.kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        t = np.clip((original * base / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
        base = (1 - t) * base / rope.factor + t * base
    elif rope.kind == "yarn":
        keep = 1.0 - _yarn_ramp(rope, h, original)
        base = base * keep + base / rope.factor * (1.0 - keep)
    return base.astype(np.float32)


def _yarn_ramp(rope: RopeConfig, h: int, original: int) -> np.ndarray:
    """Returns 0 where a frequency stays, 1 where it is divided by the factor [H/2]."""

    def dimension(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return h * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, h - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(h // 2) - low) / (high - low), 0.0, 1.0)


def cos_sin(
    config: ModelConfig, positions: Int[Array, "*B T"], *, scaled: bool = True
) -> tuple[Float[Array, "*B T 1 H2"], Float[Array, "*B T 1 H2"]]:
    """Returns cos and sin in float32 (bfloat16 rounds position 257 to 256).

    scaled=False leaves out yarn's magnitude: for keys that already carry it.
    """
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    scale = config.rope.attention_scale if scaled else 1.0
    return jnp.cos(angles)[..., None, :] * scale, jnp.sin(angles)[..., None, :] * scale


def rotate(
    x: Float[Array, "*B #T N H"], cos: Float[Array, "..."], sin: Float[Array, "..."]
) -> Float[Array, "*B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
