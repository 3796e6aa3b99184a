"""Time to the first token and speed of those after it, compilation apart."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from beacon_jax.compiling import Stopwatch


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall time of a batch, in seconds.

    Attributes:
      compile: of tracing and compiling, or of reading programs from the cache.
      first_token: from the call to the first token of every row, without `compile`.
      later: from there to the last token, without `compile`.
      later_tokens: tokens of all rows behind the first of each.
    """

    compile: float = 0.0
    first_token: float = 0.0
    later: float = 0.0
    later_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of all rows together behind the first token; None: no more came."""
        if not self.later_tokens or self.later <= 0:
            return None
        return self.later_tokens / self.later


class AnswerWatch(Stopwatch):
    """Measures a batch of answers: compilation, the first token, and those after it."""

    def __init__(self, on_tokens: Callable[[int], None] | None = None):
        """Starts the watch; `on_tokens` is told of every block, see `block`."""
        super().__init__()
        self._first: float | None = None
        self._on_tokens = on_tokens

    def block(self, tokens: Int[np.ndarray, "B n"]) -> None:
        """Takes note that new tokens [B, n] are there, -1 where a row has none."""
        if self._first is None:
            self._first = self.read()[0]
        if self._on_tokens:
            self._on_tokens(int((tokens >= 0).sum()))

    def timing(self, lengths: Int[np.ndarray, " B"]) -> Timing:
        """Returns the timing of the call so far; `lengths` are new tokens per row."""
        passed, compiled = self.read()
        first = passed if self._first is None else self._first
        later = int(np.maximum(np.asarray(lengths) - 1, 0).sum())
        return Timing(compiled, first, max(passed - first, 0.0), later)
