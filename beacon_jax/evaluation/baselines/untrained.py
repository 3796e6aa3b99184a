"""What `Model.compress(method=...)` leaves without beacons, at the bytes of beacons.

All but streaming start from what full attention made of the text, which a run makes
once. So a text that is longer than a compressor's piece is one piece here.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.core.law import Law
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.baselines.select import Budgeted, of_slots, read
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference import compressors
from beacon_jax.inference.compressors.piece import Piece, highest, keep, rotated
from beacon_jax.inference.compressors.snapkv import OBSERVED, votes
from beacon_jax.inference.feeding import Fit
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.piecewise import close, feed_compressed, make_piece
from beacon_jax.inference.plan import Plan


class Untrained(Budgeted):
    """Compresses the past as one piece.

    Attributes:
      compressor: what does.
    """

    compressor: Callable[[], compressors.Compressor]

    @property
    def biased(self) -> bool:
        """Whether slots have a bias besides."""
        return self.compressor().biased

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        memory = read(model, past, self.longest, self.prefill)
        piece, method = self.piece(model, past, memory), self.compressor()
        name, ask = (method.name, self.weights), method.observe
        observe = lambda x: self.once(model, past, name, lambda: ask(x))
        state = close(method, piece, self.budget(model, past), observe=observe)
        return of_slots(memory, state)

    def piece(self, model: Model, past: Rows, memory: Memory) -> Piece:
        """Makes the piece that a past is."""
        stop = np.asarray(memory.state.slots)
        windows = [self.windows(model, row) for row in past]
        law = Law.of(model.config)
        wanted = [np.diff(law.after(ratios)) for ratios in windows]
        return make_piece(model, memory.state, np.zeros_like(stop), stop, past, wanted)

    def windows(self, model: Model, row: np.ndarray) -> Int[np.ndarray, " n"]:
        """Lists the ratios of a row's windows as beacons would have them."""
        ratios = np.full(len(row) // model.window, self.number, np.int32)
        if self.recent:
            ratios[-1:] = 0
        return ratios


class SnapKV(Untrained):
    family, takes_recent = "snapkv", True
    compressor = compressors.SnapKV


class ExpectedAttention(Untrained):
    family, takes_recent = "expected-attention", True
    compressor = compressors.ExpectedAttention


class KVzip(Untrained):
    family, takes_recent = "kvzip", True
    compressor = compressors.KVzip


class Retention(Untrained):
    """Keeps facts by the score in a folder: --methods=retention:FOLDER."""

    family, takes_recent = "retention", True

    def __init__(self, folder: str, ratio: int | str | None = None):
        super().__init__(ratio)
        found = compressors.Retention.load(folder)
        self.compressor, self.weights = (lambda: found), found.digest


class AttentionMatching(Untrained):
    family, takes_recent = "attention-matching", True
    compressor = compressors.AttentionMatching


class MeanPool(Untrained):
    family = "mean-pool"
    compressor = compressors.MeanPool


class Streaming(Untrained):
    """Reads windows one after the other: what was evicted is not there for the next."""

    family, takes_recent = "streaming", True
    compressor = compressors.Streaming

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        plans = [Plan(self.windows(model, row)) for row in past]
        room = self.most(model, past) + 3 * model.window
        return feed_compressed(
            model,
            self.compressor(),
            list(past),
            plans,
            None,
            Fit(capacity=room),
        )


class SnapKVAware(Budgeted):
    """SnapKV that observes the last 64 tokens of what comes after the past.

    The question stands there, which no other method sees. It chooses all that is kept.

    It is no upper bound: the question looks at the start of its answer, and the rest is
    found only as it is told. Passkeys on tiny-beacon, 256 tokens, x2 / x4 / x8: 0.94 /
    0.78 / 0.25; 1.00 at x4 and x8 when it is shown the answer too.
    """

    family, takes_recent = "snapkv_aware", True
    question_aware = True

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        memory = read(model, past, self.longest, self.prefill)
        name = (SnapKVAware.family, *(row.tobytes() for row in following))
        scores = self.once(
            model, past, name, lambda: self._scores(model, memory, past, following)
        )
        count = jnp.asarray(self.budget(model, past))
        index = highest(scores, count)
        return of_slots(memory, keep(model.net, memory.state, index, count))

    def _scores(
        self, model: Model, memory: Memory, past: Rows, following: Rows
    ) -> Float[Array, "L B K S"]:
        """Scores the slots of the past by the question's attention to them."""
        # The memory with the question is for its queries alone.
        asked = reading.read(model, following, 0, memory)[1].state
        both = [np.concatenate(pair) for pair in zip(past, following, strict=True)]
        stop = np.asarray([len(row) for row in both])
        zero, none = np.zeros_like(stop), [np.zeros(0, int)] * len(both)
        piece = make_piece(model, asked, zero, stop, both, none)
        size = min(OBSERVED, piece.tokens.shape[1])
        queries, at = piece.queries(np.maximum(stop - size, 0), size)
        seen = np.minimum(OBSERVED, [len(row) for row in following])
        counts = (at >= (stop - seen)[:, None]) & (at < stop[:, None])
        slots = memory.state.slots
        found = votes(
            model.net,
            asked,
            rotated(model.net, queries, at),
            jnp.asarray(at),
            jnp.asarray(counts),
            jnp.zeros_like(slots),
            slots,
        )[..., : memory.capacity]
        past_only = jnp.arange(found.shape[-1]) < slots[:, None, None]
        return jnp.where(past_only, found, -jnp.inf)
