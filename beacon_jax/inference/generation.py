"""The result of `Model.complete`: the new text, its memory and its times."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from beacon_jax.inference.memory import Memory
from beacon_jax.inference.timing import Timing
from beacon_jax.names import short


@dataclasses.dataclass(frozen=True, repr=False)
class Generation:
    """The continuation of one prompt, and what it took.

    Attributes:
      text: the new text, without the end token and in front of a stop string ("" for a
        model without tokenizer).
      tokens: the token ids of the text, int32 [n].
      finish: "stop" (an end token or a stop string) or "length" (max_new_tokens).
      note: what was decided about ratios, and why there is no text if the model ended
        at once; "" if there is nothing to say.
      prompt_tokens: tokens read, context and prompt.
      prefill_seconds, decode_seconds: wall time of the batch, compilation included.
      batch, row: the memory of the batch and this prompt's row of it.
      timing: time to the first token and speed of those after it, compilation apart.
    """

    text: str
    tokens: Int[np.ndarray, " n"]
    finish: str
    note: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    batch: Memory
    row: int = 0
    timing: Timing = dataclasses.field(default_factory=Timing)

    @functools.cached_property
    def memory(self) -> Memory:
        """The memory of context, prompt and new tokens: pass it on to continue."""
        return self.batch if len(self.batch) == 1 else self.batch[self.row]

    def __repr__(self) -> str:
        return (
            f"Generation({short(self.text)!r}: {len(self.tokens)} tokens behind "
            f"{self.prompt_tokens:,} read, finish={self.finish!r})"
        )
