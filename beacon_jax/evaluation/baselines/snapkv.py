"""SnapKV (Li et al. 2024): what the last tokens attend to is kept.

Per layer and kv head: softmax attention of the queries of an observation window, summed
over its queries, averaged over the heads of the group, mean-pooled over 5 neighbours
(zeros beyond the ends), and the k highest kept, at their original distances.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from beacon_jax.core.memory import MemoryState
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.baselines.select import (
    Budgeted,
    floats,
    keep,
    of_slots,
    read,
)
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.model.decoder import Decoder
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import cos_sin, rotate

OBSERVED, KERNEL = 64, 5


class Voted(Budgeted):
    """Keeps the last `own` slots and, up to the budget, those with the most votes."""

    takes_recent = True

    def kept(
        self, model: Model, past: Rows, memory: Memory, votes: jax.Array, own: Any
    ) -> Memory:
        """Returns the memory with what is kept of each row."""
        count, most = jnp.asarray(self.budget(model, past)), self.most(model, past)
        index = highest(votes, memory.state.slots, jnp.asarray(own), count, most)
        return of_slots(
            memory, keep(model.config, memory.state, index, count, compact=False)
        )


class SnapKV(Voted):
    """Observes the end of the past, whose own entries are kept, and knows no question.

    The observation window has 64 tokens, or half of the budget where that is less: at
    most half of what is kept is kept unseen.
    """

    family = "snapkv"

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        memory = read(model, past, self.longest, self.prefill)
        own = np.minimum(OBSERVED, self.budget(model, past) // 2)
        votes = observe(model, memory.state, past, own, memory.state.slots - own)
        return self.kept(model, past, memory, votes, own)


class SnapKVAware(Voted):
    """SnapKV that observes the last 64 tokens of what comes after the past.

    The question stands there, which no other method sees. It chooses all that is kept.

    It is no upper bound: the question looks at the start of its answer, and the rest is
    found only as it is told. Passkeys on tiny-beacon, 256 tokens, x2 / x4 / x8: 0.94 /
    0.78 / 0.25; 1.00 at x4 and x8 when it is shown the answer too.
    """

    family = "snapkv_aware"
    question_aware = True

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        memory = read(model, past, self.longest, self.prefill)
        # The memory with the question is for its queries alone.
        asked = reading.read(model, following, 0, memory)[1].state
        both = [np.concatenate(pair) for pair in zip(past, following, strict=True)]
        seen = np.minimum(OBSERVED, [len(row) for row in following])
        votes = observe(model, asked, both, seen, memory.state.slots)
        return self.kept(model, past, memory, votes, np.zeros_like(seen))


def observe(
    model: Model,
    memory: MemoryState,
    rows: Rows,
    observed: Int[np.ndarray, " B"],
    candidates: Int[Array, " B"],
) -> Float[Array, "L B K S"]:
    """Returns what the last `observed` tokens of each row attend to, pooled.

    It is -inf beyond the first `candidates` slots.

    Args:
      memory: of the rows, all of them, with ratio 0. Only the last tokens are run
        again, for their queries: the past may be of any length.
    """
    size = min(OBSERVED, memory.capacity)
    tokens = np.zeros((len(rows), size), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: min(len(row), size)] = row[-size:]
    lengths = np.asarray([len(row) for row in rows])
    start, end = np.maximum(lengths - size, 0), lengths[:, None]
    place = start[:, None] + np.arange(size)
    counts = (place < end) & (place >= end - np.asarray(observed)[:, None])
    queries = window_queries(
        model.net,
        model.variables,
        memory,
        jnp.asarray(tokens),
        jnp.asarray(start, jnp.int32),
    )
    keys, place = floats(memory)[0], jnp.asarray(place)
    return pooled_votes(keys, queries, place, jnp.asarray(counts), candidates)


@functools.partial(jax.jit, static_argnames="net")
def window_queries(
    net: Net,
    variables: Any,
    memory: MemoryState,
    tokens: Int[Array, "B T"],
    prefix: Int[Array, " B"],
) -> Float[Array, "L B T N H"]:
    """Computes rotated queries of tokens that stand at prefix[row] of the memory."""
    size = tokens.shape[1]
    model = Decoder(net, Layout(1, size, 0))
    last = "q_norm" if net.config.qk_norm else "q_proj"
    _, found = model.apply(
        variables,
        tokens,
        memory.k,
        memory.v,
        prefix,
        capture_intermediates=lambda module, method: module.name == last,
        mutable=["intermediates"],
    )
    attention: Any = found["intermediates"]["layers"]["attention"]
    (queries,) = attention[last]["__call__"]
    return rotate(queries, *cos_sin(net.config, prefix[:, None] + jnp.arange(size)))


@jax.jit
def pooled_votes(
    keys: Float[Array, "L B S K H"],
    queries: Float[Array, "L B T N H"],
    place: Int[Array, "B T"],
    counts: Bool[Array, "B T"],
    candidates: Int[Array, " B"],
) -> Float[Array, "L B K S"]:
    """Mean-pools the attention that the slots get from the queries that count.

    place: of the queries, which see the slots up to it. candidates: slots in front that
    are voted for; the others are -inf.
    """
    slots, heads, h = keys.shape[2:]
    slot = jnp.arange(slots)
    visible = (slot <= place[..., None])[:, None, None]  # [B, 1, 1, T, S]
    votes_for = (slot < candidates[:, None])[:, None]  # [B, 1, S]

    def layer(x):
        k, q = x
        q = q.reshape(*q.shape[:2], heads, -1, h)
        scores = jnp.einsum(
            "BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32
        )
        scores = jnp.where(visible, scores * h**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        weights = jnp.where(counts[:, None, None, :, None], weights, 0.0)
        votes = jnp.where(votes_for, weights.sum(3).mean(2), 0.0)  # [B, K, S]
        around = jnp.pad(votes, ((0, 0), (0, 0), (KERNEL // 2, KERNEL // 2)))
        shifted = (around[..., i : i + slots] for i in range(KERNEL))
        return jnp.where(votes_for, sum(shifted) / KERNEL, -jnp.inf)

    return jax.lax.map(layer, (keys, queries))


@functools.partial(jax.jit, static_argnames="size")
def highest(
    votes: Float[Array, "L B K S"],
    slots: Int[Array, " B"],
    own: Int[Array, " B"],
    count: Int[Array, " B"],
    size: int,
) -> Int[Array, "L B n K"]:
    """Returns the slots for `select.keep`, rising, `count` of each row in all.

    These are the last `own` of a row's `slots`, and those with the most votes (of equal
    ones the first).
    """
    total = votes.shape[-1]
    size = min(size, total)
    slot = jnp.arange(total)
    last = (slot >= (slots - own)[:, None]) & (slot < slots[:, None])
    order = jax.lax.top_k(jnp.where(last[:, None], jnp.inf, votes), size)[1]
    chosen = jnp.arange(size) < count[:, None, None]
    index = jnp.sort(jnp.where(chosen, order, total - 1), axis=-1)
    return jnp.moveaxis(index, -1, 2)
