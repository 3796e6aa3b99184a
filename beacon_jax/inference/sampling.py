"""Picks the next token from logits: greedy, or drawn from what the settings leave.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from beacon_jax.inference.options import Integers, Numbers
from beacon_jax.inference.validate import SEEDS, numbers


@flax.struct.dataclass
class Sampling:
    """The settings by which a token is picked.

    They are arrays, so that changing a number compiles nothing anew.

    Each setting is one number for all rows or one per row.

    Attributes:
      temperature: logits are divided by it; 0 picks the most likely token.
      top_k: only the k most likely tokens; 0 keeps all.
      top_p: only the most likely tokens whose probabilities (at the temperature, after
        top_k) first reach p together, at least one; 1 keeps all.
      min_p: only tokens at least min_p times as likely as the most likely one, at the
        temperature; 0 keeps all. top_k and top_p keep the most likely token and the
        ratios between tokens, so min_p leaves the same whether it comes before or after
        them. They come first, so that top_p counts what min_p would have taken away.
      repetition_penalty: logits of tokens that occurred in the row's prompt or output
        are divided by it where positive and multiplied where negative, before anything
        else and for greedy rows too; 1 changes nothing.
    """

    temperature: Float[Array, "*B"]
    top_k: Int[Array, "*B"]
    top_p: Float[Array, "*B"]
    min_p: Float[Array, "*B"]
    repetition_penalty: Float[Array, "*B"]

    def for_rows(self, rows: int) -> "Sampling":
        """Returns every setting as [rows].

        So one program serves settings that rows share and those of their own.
        """
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (rows,)), self)


def make_sampling(
    temperature: Numbers = 0.0,
    top_k: Integers = 0,
    top_p: Numbers = 1.0,
    min_p: Numbers = 0.0,
    repetition_penalty: Numbers = 1.0,
) -> Sampling:
    """Checks the settings, numbers or one per row, and makes arrays of them.

    Raises:
      TypeError, ValueError: a setting is no number, or out of range; it is named.
    """
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    for name, value in given.items():
        numbers(name, value)
    return Sampling(
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(np.minimum(top_k, 2**31 - 1), jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
        jnp.asarray(repetition_penalty, jnp.float32),
    )


def row_seeds(seed: Integers, rows: int) -> UInt32[Array, " B"]:
    """Makes one seed per row.

    From one number s, row i gets s + i: rows draw independently, and row i can be drawn
    again alone with seed=s+i.

    Raises:
      ValueError: not one per row, or not a 32-bit word.
    """
    numbers("seed", seed)
    given = np.asarray(seed)
    if given.ndim and given.shape != (rows,):
        raise ValueError(f"seed has shape {given.shape} for {rows} rows: one per row.")
    words = [int(x) for x in np.atleast_1d(given)]
    if not given.ndim:
        words = [(words[0] + i) % SEEDS for i in range(rows)]
    return jnp.asarray(np.asarray(words, np.uint32))


def row_keys(
    seeds: UInt32[Array, " B"] | UInt32[np.ndarray, " B"],
    number: int | Int[Array, ""] | Int[Array, " B"],
) -> PRNGKeyArray:
    """Makes keys [B] of each row's output token `number`, from its own seed alone.

    Rows are at one number, or each at its own.

    The generator is named: `rbg`, which may be a process's default, would make a row's
    numbers depend on the batch around it.
    """

    def key(seed: jax.Array, number: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)

    numbers = jnp.broadcast_to(jnp.asarray(number), seeds.shape)
    return jax.vmap(key)(jnp.asarray(seeds), numbers)


def seen_tokens(
    rows: Sequence[Sequence[int] | np.ndarray], vocab: int
) -> Bool[np.ndarray, "B V"]:
    """Marks the tokens of each row, from which `repetition_penalty` starts."""
    seen = np.zeros((len(rows), vocab), bool)
    for i, tokens in enumerate(rows):
        seen[i, np.asarray(tokens, np.int64)] = True
    return seen


def penalize(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Bool[Array, "B V"]
) -> Float[Array, "B V"]:
    """Returns the logits after the repetition penalty, float32."""
    logits = logits.astype(jnp.float32)
    by = _column(sampling.repetition_penalty)
    return jnp.where(seen, jnp.where(logits > 0, logits / by, logits * by), logits)


def sample(
    keys: PRNGKeyArray,
    logits: Float[Array, "B V"],
    sampling: Sampling,
    seen: Bool[Array, "B V"] | None = None,
) -> Int[Array, " B"]:
    """Picks one token per row, by the row's own key, logits and settings alone.

    Args:
      keys: [B] (`row_keys`); rows at temperature 0 ignore theirs.
      seen: tokens of each row so far; None: no repetition penalty is compiled.
    """
    if seen is not None:
        logits = penalize(logits, sampling, seen)
    best = jnp.argmax(logits, axis=-1)

    def draw(logits: jax.Array) -> jax.Array:
        warm = jnp.where(sampling.temperature > 0, sampling.temperature, 1)
        logits = logits.astype(jnp.float32) / _column(warm)
        # Noise belongs to the token, not to its rank, so that a row draws the same
        # whether or not another row of the batch needs the ranks.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        cut = (sampling.top_k > 0) | (sampling.top_p < 1)
        keep = jax.lax.cond(
            jnp.any(cut),
            lambda x: _most_likely(x, sampling),
            lambda x: jnp.ones(x.shape, bool),
            logits,
        )
        best = jnp.max(logits, axis=-1, keepdims=True)
        keep &= logits - best >= jnp.log(_column(sampling.min_p))
        return jnp.argmax(jnp.where(keep, logits + noise, -jnp.inf), axis=-1)

    drawn = jax.lax.cond(
        jnp.any(sampling.temperature > 0), draw, lambda _: best, logits
    )
    return jnp.where(sampling.temperature > 0, drawn, best).astype(jnp.int32)


def _column(x: Float[Array, "*B"]) -> Float[Array, "*B 1"]:
    """Adds an axis, so that a number per row, or one for all, fits [B, V]."""
    return x[..., None]


def _most_likely(logits: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """Marks what top_k, then top_p leave of logits at the temperature."""
    order = jnp.argsort(-logits, axis=-1)  # stable: ties keep the lower id
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    top_k, top_p = _column(sampling.top_k), _column(sampling.top_p)
    keep = (jnp.arange(logits.shape[-1]) < top_k) | (top_k == 0)
    p = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    # A token stays if those before it have not reached p, so the first always does.
    keep &= (jnp.cumsum(p, axis=-1) - p < top_p) | (top_p == 1)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, order].set(keep)
