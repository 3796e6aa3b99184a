"""The options of `compress`, `complete` and `generate`: names, types, defaults, once.

A caller gives them as keywords. `ReadOptions` and `CompleteOptions` type the keywords,
so that an editor and a type checker know every name. `collect` makes one frozen
`Reading` or `Completion` of them at the door, and nothing behind it takes them as
keywords. `documented` gives `help()` and a notebook the same names with their defaults.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from beacon_jax.inference.compressors.base import Compressor
from beacon_jax.inference.spans import Spans
from beacon_jax.names import hinted, unknown

PIECE_WINDOWS = 16  # fed at a time where progress is to be shown

type Ratio = int | Sequence[int] | Callable[[int, int, int], int] | str | None
type Text = str | Sequence[int] | np.ndarray  # a text, or the token ids [n] of one
# Lists, not sequences, of which a str is one: a type checker tells one text from many.
type Batch = (
    list[Text]
    | list[str]
    | list[list[int]]
    | list[Sequence[int]]
    | list[np.ndarray]
    | tuple[Text, ...]
)
type Texts = Text | Sequence[Text]
type Stream = os.PathLike[str] | Iterator[str] | Iterator[Text]  # as it comes
type OnProgress = Callable[[int, int], None]  # (tokens fed so far, of how many)
type Numbers = float | Sequence[float] | np.ndarray  # one for all rows, or one per row
type Integers = int | Sequence[int] | np.ndarray


class ReadOptions(TypedDict, total=False):
    """The keywords of `Model.compress`, which documents them."""

    method: str | Compressor | None
    max_slots: int | None
    max_bytes: int | str | None
    slot_cap: int | None
    spans: Spans | None
    lossless: Literal["windows", "slots"]
    capacity: int | None
    memory_dtype: str | None
    recent: bool | None
    seed: Integers
    on_progress: OnProgress | None
    progress_windows: int


class CompleteOptions(ReadOptions, total=False):
    """The keywords of `Model.complete`, which documents them."""

    ratio: Ratio
    max_new_tokens: Integers
    temperature: Numbers
    top_k: Integers
    top_p: Numbers
    min_p: Numbers
    repetition_penalty: Numbers
    stop: str | Sequence[str]
    instruct: bool
    on_text: Callable[..., None] | None
    on_tokens: Callable[[int], None] | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """The options of reading a text into a memory; `Model.compress` documents them."""

    ratio: Ratio = None
    method: str | Compressor | None = None
    max_slots: int | None = None
    max_bytes: int | str | None = None
    slot_cap: int | None = None
    spans: Spans | None = None
    lossless: Literal["windows", "slots"] = "windows"
    capacity: int | None = None
    memory_dtype: str | None = None
    recent: bool | None = None
    seed: Integers = 0
    on_progress: OnProgress | None = None
    progress_windows: int = PIECE_WINDOWS


@dataclasses.dataclass(frozen=True)
class Completion(Reading):
    """The options of continuing a prompt; `Model.complete` documents them."""

    max_new_tokens: Integers = 64
    temperature: Numbers = 0.0
    top_k: Integers = 0
    top_p: Numbers = 1.0
    min_p: Numbers = 0.0
    repetition_penalty: Numbers = 1.0
    stop: str | Sequence[str] = ()
    instruct: bool = False
    on_text: Callable[..., None] | None = None
    on_tokens: Callable[[int], None] | None = None

    def read(self) -> "Completion":
        """Returns the options of what follows a context that has been read."""
        done = {"ratio", "method", "max_slots", "max_bytes", "slot_cap", "spans"}
        done.add("lossless")
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(Completion)
            if field.name in done
        }
        return dataclasses.replace(self, **defaults)


# What other libraries call an option, and its name here.
ELSEWHERE = {
    "do_sample": "temperature",
    "eos": "stop",
    "max_length": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_tokens": "max_new_tokens",
    "press": "method",
    "compressor": "method",
    "max_tokens": "max_new_tokens",
    "text": "prompt",
    "question": "prompt",
    "document": "context",
    "callback": "on_text",
    "stream": "on_text",
    "until": "stop",
}


def collect[Options: Reading](
    kind: type[Options],
    function: str,
    given: Mapping[str, Any],
    own: Sequence[str] = (),
) -> Options:
    """Collects the options of a call into one value.

    Args:
      kind: `Reading` or `Completion`.
      function: name of the function that was called, for the message.
      given: the keywords.
      own: names of the function's arguments that are no options.

    Raises:
      TypeError: a keyword that does not exist; names the nearest one.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            raise unknown(function, name, given[name], [*own, *names], ELSEWHERE)
    return kind(**given)


def documented[F: Callable[..., Any]](kind: type[Reading]) -> Callable[[F], F]:
    """Makes a decorator that shows the fields of `kind` in a function's signature.

    The function takes them as **options; they are shown as keywords, with their
    defaults. One that does not exist is an error that names the nearest.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
        taken = {p.name for p in own}
        more = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in dataclasses.fields(kind)
            if field.name not in taken
        ]
        shown = signature.replace(parameters=[*own, *more])
        function.__signature__ = shown
        return hinted(function.__name__, ELSEWHERE)(function)

    return decorate
