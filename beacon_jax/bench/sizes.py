"""Bytes by formula: what a run must hold and must move, from the configuration alone.

Weights and KV cache are exact. Activations are those of one window (or piece) in one
layer: residual stream, projections, both halves of the MLP; compilers add to that.
"""

from typing import Any

import jax.numpy as jnp

from beacon_jax.core.law import Law
from beacon_jax.core.memory import slot_nbytes
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.presets import count_params

GIB = 2**30


def weight_bytes(
    config: ModelConfig, dtype: Any = "bfloat16", *, beacon: bool = True
) -> int:
    """Counts the bytes of all parameters."""
    base, own = count_params(config)
    return jnp.dtype(dtype).itemsize * (base + (own if beacon else 0))


def slots_after(config: ModelConfig, length: int, ratio: int) -> int:
    """Counts the slots of a text's full windows (docs/specification.md section 2).

    Args:
      ratio: 0 for full attention, which keeps every token, whole window or not.
    """
    law = Law.of(config)
    return law.closed(ratio, length // law.window) if ratio else length


def entries_after(config: ModelConfig, length: int, ratio: int) -> int:
    """Counts what the next token sees: slots and the open window with its beacons."""
    slots, law = slots_after(config, length, ratio), Law.of(config)
    return slots + int(law.entries(ratio, length % law.window)) if ratio else slots


def activation_bytes(config: ModelConfig, rows: int, dtype: Any = "bfloat16") -> int:
    """Counts the bytes of a layer's activations for `rows` entries."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    wide = 4 * config.hidden_size + 2 * config.intermediate_size + heads
    return rows * wide * jnp.dtype(dtype).itemsize


def decode_bytes(
    config: ModelConfig, batch: int, entries: int, ratio: int, dtype: Any = "bfloat16"
) -> float:
    """Counts the bytes that one decoding step must read: weights and live entries.

    The embedding table is read at `batch` rows, which is nothing, unless it is lm_head
    too. At ratio r every r-th step reads the beacons' projections as well.
    """
    base, own = count_params(config)
    if not config.tie_embeddings:
        base -= config.vocab_size * config.hidden_size
    weights = base + (own / ratio if ratio else 0)
    held = batch * entries * slot_nbytes(config, dtype)
    return jnp.dtype(dtype).itemsize * weights + held
