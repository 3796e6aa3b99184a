"""Requests as JSON: OpenAI's fields, and those that memories add.

A field that would change the answer and is not understood is refused. One that changes
nothing here (`user`, `metadata`) is taken.
"""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, FailFast, Field

from beacon_jax.names import meant, short

# Fields of clients that change nothing here.
IGNORED = frozenset(
    [
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "verbosity",
        "reasoning_effort",
    ]
)
# What a client may send as long as it asks for nothing: field -> such values.
NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
# A list that is wrong is wrong once: millions of errors would take gigabytes.
type Items[Item] = Annotated[list[Item], FailFast()]
# An item of a few bytes takes hundreds in Python.
MANY = 100_000
type Few[Item] = Annotated[list[Item], FailFast(), Field(max_length=10_000)]
Words = Annotated[str, Field(max_length=1000)]
RatioField = (
    int | Literal["auto", "full"] | Annotated[str, Field(pattern="^auto-[0-9]{1,4}$")]
)


class BadRequest(ValueError):
    """A request that cannot be answered; `param` is the field to blame."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Strict(BaseModel):
    """A JSON object without fields of other names, and without values to be guessed."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Part(BaseModel):
    """A part of a message; only text is read."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[str, Field(min_length=1, max_length=40)]
    content: str | Few[Part] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, str]:
        """Returns role and text."""
        content = self.content or ""
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content}


class Sampled(Strict):
    """The fields that both kinds of answers have."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Words | Annotated[Items[Words], Field(max_length=16)] | None = None
    seed: Seed | None = None
    memory: str | None = None
    ratio: RatioField | None = None
    store: bool | None = None

    def sampling(self) -> dict[str, float]:
        """Returns the settings of sampling; OpenAI's default is temperature 1."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        found = {name: x for name, x in given.items() if x is not None}
        warm = 1.0 if self.temperature is None else self.temperature
        return found | {"temperature": warm}

    def fitting(self) -> dict[str, float]:
        """Returns `sampling` with numbers that arrays of 32 bits can have."""
        most = {"top_k": 2**31 - 1}
        return {x: min(n, most.get(x, 1e38)) for x, n in self.sampling().items()}

    def stops(self) -> tuple[str, ...]:
        """Returns the strings that end an answer."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(x for x in stop if x)


class CompletionRequest(Sampled):
    prompt: str | Few[str] | Items[int] | Few[Items[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None


class ChatRequest(Sampled):
    messages: Annotated[Few[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Span = Annotated[Items[int], Field(min_length=2, max_length=2)]


class MemoryRequest(Strict):
    """A text to be read into a memory; `append` has the same fields."""

    text: str | None = None
    messages: Annotated[Few[Message], Field(min_length=1)] | None = None
    model: str | None = None
    name: Annotated[str, Field(max_length=200)] | None = None
    ratio: (
        RatioField | Annotated[Items[int], Field(min_length=1, max_length=MANY)] | None
    ) = None
    max_slots: Annotated[int, Field(ge=1)] | None = None
    max_bytes: int | str | None = None
    method: str | None = None
    spans: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[Items[Span], Field(max_length=MANY)]
        | None
    ) = None
    lossless: Literal["windows", "slots"] = "windows"
    stream: bool = False
    background: bool = False


class ForkRequest(Strict):
    name: Annotated[str, Field(max_length=200)] | None = None


def parsed[Request: BaseModel](kind: type[Request], body: Any) -> Request:
    """Reads a request.

    Raises:
      BadRequest: names the field, its value and what to do.
    """
    if not isinstance(body, dict):
        raise BadRequest(
            f"the body is {type(body).__name__}, not an object: send JSON such as "
            '{"prompt": "..."}.'
        )
    kept = {}
    for name, value in body.items():
        if name in kind.model_fields:
            kept[name] = value
        elif name in NOTHING:
            if not any(value == nothing for nothing in NOTHING[name]):
                raise BadRequest(
                    f"{name}={_shown(value)} is not possible here: leave it out.", name
                )
        elif name not in IGNORED:
            hint = meant(name, kind.model_fields)
            raise BadRequest(
                f"{name}={_shown(value)}: there is no such field, {hint}the fields are "
                f"{', '.join(kind.model_fields)}.",
                name,
            )
    try:
        return kind.model_validate(kept)
    except pydantic.ValidationError as error:
        raise _named(error.errors(include_url=False), kept) from None


def _named(errors: list[Any], given: dict[str, Any]) -> BadRequest:
    """Makes the error of a value: one of its kind first, of those that it may be."""
    kinds = ("_type", "literal_error", "string_pattern_mismatch")
    first = next((e for e in errors if not e["type"].endswith(kinds)), errors[0])
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return BadRequest(f"{name} is missing: give it.", name)
    said = first["msg"][:1].lower() + first["msg"][1:]
    several = {e["loc"][0] for e in errors if e["loc"]} == {name} and len(errors) > 1
    if several and first is errors[0]:
        said = "; or ".join(dict.fromkeys(e["msg"].lower() for e in errors))
    value = given.get(name, first["input"]) if name else first["input"]
    return BadRequest(f"{name or 'the body'}={_shown(value)}: {said}.", name)


def _shown(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > 60:  # not all of a long one
        value = value[:60] if isinstance(value, list) else {"...": len(value)}
    try:
        return short(repr(value))
    except RecursionError:
        return "[[[..."
