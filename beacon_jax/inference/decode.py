"""Generates tokens: one jitted loop over sampling and the model's next step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from beacon_jax.core.loop import check_capacity, decode_step, static_ratios
from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.prefill import compute_dtype
from beacon_jax.inference.sampling import Sampling, sample
from beacon_jax.model.config import ModelConfig

BLOCK = 16  # tokens per call of the loop: text appears that often, one compile for all


class Decoded(NamedTuple):
    """What `decode` returns.

    Attributes:
      tokens: int32 [B, n], padded with -1 behind each row's end.
      lengths: [B] tokens per row; the end token is not among them.
      logits: [B, V] after each row's last token.
      memory: holds exactly the tokens above besides what it held.
    """

    tokens: Int[np.ndarray, "B n"]
    lengths: Int[np.ndarray, " B"]
    logits: Float[Array, "B V"]
    memory: MemoryState


@functools.partial(jax.jit, static_argnames=("config", "eos_ids", "static"))
def decode_block(
    config: ModelConfig,
    variables: dict[str, Any],
    memory: MemoryState,
    logits: Float[Array, "B V"],
    ratios: Int[Array, " P"],
    active: Bool[Array, " B"],
    sampling: Sampling,
    key: PRNGKeyArray,
    limit: Int[Array, ""],
    *,
    eos_ids: tuple[int, ...],
    static: tuple[int, ...],
) -> tuple[Int[Array, "B n"], Float[Array, "B V"], Bool[Array, " B"], MemoryState]:
    """Up to `limit` <= BLOCK tokens per row: (tokens, logits, active, memory)."""
    ends = jnp.asarray(eos_ids, jnp.int32)

    def unfinished(state: tuple) -> jax.Array:
        step, _, _, active, _ = state
        return (step < limit) & active.any()

    def body(state: tuple) -> tuple:
        step, tokens, logits, active, memory = state
        token = sample(jax.random.fold_in(key, step), logits, sampling)
        active &= ~jnp.isin(token, ends)
        tokens = tokens.at[:, step].set(jnp.where(active, token, -1))
        new, memory = decode_step(
            config,
            variables,
            memory,
            jnp.where(active, token, 0),
            ratios,
            active,
            static=static,
            dtype=compute_dtype(variables),
        )
        logits = jnp.where(active[:, None], new, logits)
        return step + 1, tokens, logits, active, memory

    tokens = jnp.full((logits.shape[0], BLOCK), -1, jnp.int32)
    state = (jnp.int32(0), tokens, logits, active, memory)
    _, tokens, logits, active, memory = jax.lax.while_loop(unfinished, body, state)
    return tokens, logits, active, memory


def decode(
    config: ModelConfig,
    variables: dict[str, Any],
    memory: MemoryState,
    logits: Float[Array, "B V"],
    ratios: Int[np.ndarray, " P"],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    eos_ids: tuple[int, ...] | None = None,
    on_tokens: Callable[[np.ndarray], None] | None = None,
) -> Decoded:
    """Continues each row until an end token or `max_new_tokens`.

    Every returned token is also fed, so that the memory can be continued from.

    Args:
      memory: has room for the new tokens; it is not changed.
      logits: after each row's last token, from `prefill` or an earlier `decode`.
      ratios: of the windows of the whole sequence, counted from its first token.
      eos_ids: end tokens; None: those of the config.
      on_tokens: called with each block [B, <= BLOCK] as it is ready.

    Raises:
      ValueError: max_new_tokens below 1.
      CapacityError: the memory is too small; it states the capacity needed.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    ends = config.eos_ids if eos_ids is None else tuple(eos_ids)
    rows = logits.shape[0]
    check_capacity(config, memory, np.full(rows, max_new_tokens), ratios)
    static = static_ratios(memory, ratios)
    active, key, blocks = jnp.ones(rows, bool), jax.random.key(seed), []
    for start in range(0, max_new_tokens, BLOCK):
        limit = min(BLOCK, max_new_tokens - start)
        tokens, logits, active, memory = decode_block(
            config,
            variables,
            memory,
            logits,
            jnp.asarray(ratios),
            active,
            sampling,
            jax.random.fold_in(key, start),
            jnp.int32(limit),
            eos_ids=ends,
            static=static,
        )
        blocks.append(np.asarray(tokens)[:, :limit])
        if on_tokens:
            on_tokens(blocks[-1])
        if not np.asarray(active).any():
            break
    tokens = np.concatenate(blocks, axis=1)
    lengths = (tokens >= 0).sum(axis=1)
    return Decoded(tokens[:, : max(lengths.max(), 1)], lengths, logits, memory)
