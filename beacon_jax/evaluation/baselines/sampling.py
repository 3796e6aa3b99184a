"""Tokens chosen without looking at them: at random, evenly, or the first and the last.

What any choice of tokens must beat.
"""

import hashlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.evaluation.baselines.select import (
    Budgeted,
    as_index,
    keep,
    of_slots,
    read,
)
from beacon_jax.evaluation.reading import Rows, empty, feed_state
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model

SINKS = 4


class TokenSampling(Budgeted):
    """Keeps the tokens `choose(row, k)`, the same ones in all layers and heads.

    They are computed with full attention: later tokens have read the dropped ones, so
    what is kept knows of them.
    """

    def choose(self, row: Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
        """Returns the rising places of the k tokens of a row that are kept."""
        raise NotImplementedError

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        count = self.budget(model, past)
        chosen = list(map(self.choose, past, count.tolist()))
        index = as_index(chosen, self.most(model, past))
        memory = read(model, past, self.longest, self.prefill)
        # Compact positions: on tiny-beacon at x4 they cost 0.01 to 0.02 nats/token
        # against original ones over 256 tokens, gain up to 0.06 over 512, and 0.8 to
        # 0.9 over 1024, where original ones lie beyond the trained 512.
        count = jnp.asarray(count)
        return of_slots(
            memory, keep(model.config, memory.state, index, count, compact=True)
        )


class Random(TokenSampling):
    """Keeps k tokens at random; what x8 keeps, x4 keeps too.

    The draw is seeded by the row's own tokens: it does not depend on the batch, and a
    run that is continued draws the same.
    """

    family, takes_recent = "random", True

    def choose(self, row: Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
        digest = hashlib.blake2b(np.asarray(row, "<i4").tobytes(), digest_size=8)
        rng = np.random.default_rng(int.from_bytes(digest.digest(), "little"))
        return np.sort(rng.permutation(len(row))[:k])


class Strided(TokenSampling):
    """Keeps every ratio-th token, the last of its group, where a beacon would stand.

    A model whose beacons have sinks keeps that many more: its first tokens, and the
    stride is over the others.
    """

    family = "strided"

    def choose(self, row: Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
        first = max(k - len(row) // self.number, 0)
        rest = k - first
        ends = (np.arange(rest) + 1) * (len(row) - first) // max(rest, 1) - 1
        return np.concatenate([np.arange(first), first + ends])


def kept_slots(slots: int, budget: int) -> Int[np.ndarray, " n"]:
    """Picks the first 4 of a cache's `slots` and the last, `budget` in all.

    Of a budget below 8 the sinks take half (rounded down).
    """
    if slots <= budget:
        return np.arange(slots)
    sinks = min(SINKS, budget // 2)
    return np.concatenate([np.arange(sinks), np.arange(slots - budget + sinks, slots)])


class Streaming(Budgeted):
    """StreamingLLM (Xiao et al. 2024): 4 sinks and the last k - 4 tokens.

    k is what beacons keep of the whole past. The cache has this size from the first
    window on, as published.

    The real thing, not its last state: windows are read one after the other, and what
    was evicted after one is not there for the next. Positions are those in the cache.
    """

    family, takes_recent = "streaming", True

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        w, budget = model.window, self.budget(model, past)
        memory, most = empty(model, len(past), 0, self.longest), self.most(model, past)
        state = memory.state
        for start in range(0, max(map(len, past)), w):
            pieces = [row[start : start + w] for row in past]
            _, state = feed_state(model, state, pieces, 0, "last", donate=True)
            kept = list(map(kept_slots, np.asarray(state.slots).tolist(), budget))
            count = jnp.asarray([len(x) for x in kept], jnp.int32)
            state = keep(model.config, state, as_index(kept, most), count, compact=True)
        law = Law.of(model.config)
        rows = [memory.rows[0].feed(law, np.zeros(1, np.int32), row) for row in past]
        return of_slots(Memory(model.config, state, tuple(rows), model.identity), state)
