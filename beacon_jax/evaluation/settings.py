"""What decides every example and every prediction, besides model and method."""

import dataclasses

from beacon_jax.names import meant

CHATS = ("auto", "none")
STOPS = ("paper", "official")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of a run that its predictions depend on.

    Attributes:
      lengths: tokens of an example, answer included.
      depths: places of the needle, evenly over [0, 1].
      samples: examples per task and length.
      text: source of held-out text (`data.text`), which is also the haystack unless
      haystack: names a source whose files are all used.
      data: folder of the user's data sets; "" if there is none.
      max_length: tokens that a text of a data set is cut to, from its middle.
      newline_stop: where LongBench's answers end at a line's end: "paper" (as in the
        release: all QA tasks and samsum) or "official" (samsum only).
      chat: "auto" wraps questions in the tokenizer's chat template if it has one.
      limit: only so many examples per task and length.
    """

    lengths: tuple[int, ...] = (256, 512, 1024)
    depths: int = 5
    samples: int = 128
    text: str = "stdlib"
    haystack: str = ""
    data: str = ""
    max_length: int = 31_500
    newline_stop: str = "paper"
    chat: str = "auto"
    seed: int = 0
    limit: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("depths", "samples", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be >= 1.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit={self.limit} must be >= 1; leave it out.")
        if not self.lengths:
            raise ValueError("--lengths is empty: give for example 256,512,1024.")
        for name, known in (("chat", CHATS), ("newline_stop", STOPS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name}={getattr(self, name)} is unknown: "
                    f"{meant(getattr(self, name), known)}use one of "
                    f"{', '.join(known)}."
                )
