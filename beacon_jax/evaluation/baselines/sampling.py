"""Tokens chosen without looking at them: at random, or evenly.

What any choice of tokens must beat.
"""

import hashlib

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.evaluation.baselines.select import Budgeted, as_index, of_slots, read
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference.compressors.piece import keep
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model


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
            memory, keep(model.net, memory.state, index[:, :, : memory.capacity], count)
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
