"""What a request asks of the engine, what it is told, and its row in the batch."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from beacon_jax.core.law import Law
from beacon_jax.core.loss import Likely
from beacon_jax.inference.history import History
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.text import Streamer


@dataclasses.dataclass(frozen=True, eq=False)
class Ask:
    """A prompt, and how it is to be answered.

    Attributes:
      tokens: of the prompt, behind `memory`.
      memory: of one row, on the host; None: the prompt begins a text.
      ratio: of the windows that prompt and answer begin.
      sampling: numbers of `make_sampling`, by name.
      seeds: of the choices, one each.
      max_new_tokens: of each choice.
      stop: strings that end an answer.
      likely: answers are told how likely their tokens were.
      echo: so are the tokens of the prompt.
      keep: the memory of the answer is returned.
    """

    tokens: Int[np.ndarray, " n"]
    memory: Memory | None
    ratio: int
    sampling: dict[str, float]
    seeds: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    likely: bool = False
    echo: bool = False
    keep: bool = False

    @property
    def before(self) -> History:
        """The history of the memory that the prompt comes behind."""
        return self.memory.rows[0] if self.memory else History.empty()

    @property
    def fed(self) -> Int[np.ndarray, " n"]:
        """All tokens to be fed: what the memory has pending, and the prompt."""
        return np.concatenate([self.before.pending, self.tokens]).astype(np.int32)

    def slots(self, law: Law, static: tuple[int, ...]) -> int:
        """Counts the slots that prompt and answer need, those of the memory too.

        Args:
          static: ratios that the engine's programs are compiled for. With beacons
            appended, a step may write those of another row's ratio behind every row.
        """
        before, new = self.before, len(self.fed) + self.max_new_tokens
        count = (before.raw + new) // law.window + 1
        used = before.ahead(np.asarray([self.ratio]), count)
        slots = int(law.after(used[:-1], before.slots)[-1])
        return slots + law.room({*used.tolist(), *static})


# --- what a request is told ------------------------------------------------------


class Read(NamedTuple):
    """The prompt has been read.

    Attributes:
      likely: of the prompt's tokens but the first, if the request asked (`Ask.echo`).
    """

    likely: Likely | None


class Piece(NamedTuple):
    """New text of a choice.

    Attributes:
      text: what is certain by now; "" while characters or stop strings are incomplete.
      tokens: the new tokens.
      likely: how likely they were, if the request asked.
    """

    choice: int
    text: str
    tokens: Int[np.ndarray, " n"]
    likely: Likely | None


class Ended(NamedTuple):
    """A choice has ended.

    Attributes:
      finish: "stop" or "length".
      memory: what is behind the answer, if the request asked (`Ask.keep`); on the host.
      entries: slots and open window of the row.
    """

    choice: int
    finish: str
    memory: Memory | None
    entries: int


class Failed(NamedTuple):
    """The request has failed."""

    error: Exception


Event = Read | Piece | Ended | Failed


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way. `tell` is called from the thread of the engine.

    Attributes:
      asked, started, first, ended: seconds of the clock; 0: not yet.
    """

    ask: Ask
    tell: Callable[[Event], None]
    cancelled: bool = False
    asked: float = dataclasses.field(default_factory=time.perf_counter)
    started: float = 0.0
    read: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    left: int = 0  # choices that have not ended

    def timings(self) -> dict[str, float]:
        """Returns the seconds spent waiting, reading and answering."""
        end = self.ended or time.perf_counter()
        return {
            "queue_seconds": self.started - self.asked,
            "prefill_seconds": self.read - self.started,
            "first_token_seconds": (self.first or end) - self.asked,
            "decode_seconds": end - self.read,
        }


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt that is being read, window by window.

    Attributes:
      number: of its state on the device.
      done: tokens fed.
      likely: of the tokens fed, part by part.
      left: numbers of the choices that have no row yet.
    """

    ticket: Ticket
    number: int
    tokens: Int[np.ndarray, " n"]
    done: int = 0
    likely: list[Likely] = dataclasses.field(default_factory=list)
    left: list[int] = dataclasses.field(default_factory=list)


class Row:
    """A row of the batch: one choice of a request while its answer grows.

    Attributes:
      fed: tokens of the answer, all of which the row's memory holds.
    """

    def __init__(self, ticket: Ticket, choice: int, tokenizer: Any):
        self.ticket, self.choice = ticket, choice
        self.fed: list[int] = []
        self._texts: list[str] = []
        self._told = 0  # tokens passed on
        stop = ticket.ask.stop
        self._streamer = Streamer(tokenizer, self._texts.append, stop)

    @property
    def kept(self) -> int:
        """Tokens in front of a stop string, or all."""
        keep = self._streamer.keep
        return len(self.fed) if keep is None else keep

    def add(self, tokens: Int[np.ndarray, " n"], likely: Likely | None) -> Piece | None:
        """Takes new tokens; returns what is to be told, None if there is nothing."""
        self._streamer.add(tokens)
        start = len(self.fed)
        self.fed += tokens.tolist()
        new = np.asarray(self.fed[self._told : self.kept], np.int32)
        if likely is not None:
            part = slice(self._told - start, self._told - start + len(new))
            likely = Likely(*(x[part] for x in likely))
        self._told = max(self.kept, self._told)
        return self._piece(new, likely)

    def finish(self) -> Piece | None:
        """Returns the text that was held back, None if there is none."""
        self._streamer.finish()
        return self._piece(np.zeros(0, np.int32), None)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._streamer.keep is not None

    def _piece(self, tokens: np.ndarray, likely: Likely | None) -> Piece | None:
        text = "".join(self._texts)
        self._texts.clear()
        if not text and not len(tokens):
            return None
        return Piece(self.choice, text, tokens, likely)
