"""From a request to what the engine is asked: memory, tokens and ratio."""

import dataclasses
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax.inference.chat import cut_back, known
from beacon_jax.inference.history import History
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.packs import PackError
from beacon_jax.inference.plan import make_plan
from beacon_jax.inference.spans import search, token_spans, tokens_of
from beacon_jax.inference.template import encode_turns, turn_ends
from beacon_jax.inference.validate import SEEDS
from beacon_jax.names import meant, short
from beacon_jax.serving.engine import Busy, checked
from beacon_jax.serving.protocol import (
    BadRequest,
    ChatRequest,
    CompletionRequest,
    MemoryRequest,
    Message,
    Sampled,
)
from beacon_jax.serving.reading import Source, methods
from beacon_jax.serving.rows import Ask
from beacon_jax.serving.service import Service
from beacon_jax.serving.store import About

CHAT_TOKENS = 512  # of an answer in a conversation that names no number
PATIENCE = 2.0  # seconds behind the search of another request, which may take long
CHARACTERS = 8  # of a token, on average: more are not encoded to be counted
COMPLETION_TOKENS = 16  # OpenAI's default


@dataclasses.dataclass(frozen=True, eq=False)
class Prompted:
    """A prompt on its way to the engine.

    Attributes:
      base: tokens of the context in front of the conversation.
      messages: the whole conversation; None: it is none.
      parent: id of the memory.
      echo: the answer's text begins with the prompt's.
    """

    ask: Ask
    base: int = 0
    messages: list[dict[str, str]] | None = None
    parent: str | None = None
    echo: bool = False


def check_model(service: Service, name: str | None) -> None:
    """Raises BadRequest for another model's name."""
    if name not in (None, service.name):
        hint = meant(name, [service.name])
        raise BadRequest(
            f"model={short(repr(name))} is not served here: {hint}use "
            f"{service.name!r}, or leave model out.",
            "model",
        )


def completion_asks(service: Service, request: CompletionRequest) -> list[Prompted]:
    """Makes what the engine is asked, one for each prompt.

    Raises:
      BadRequest, ValueError, TypeError: names the field.
      Unknown: there is no such memory.
    """
    check_model(service, request.model)
    memory, about = _memory(service, request.memory)
    row = memory.rows[0] if memory else History.empty()
    new = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    echo = bool(request.echo)
    if not new and not echo:
        raise BadRequest(
            "max_tokens=0 asks for nothing: give 1 or more, or echo=true.", "max_tokens"
        )
    likely = request.logprobs is not None
    found = []
    prompts = _listed(request.prompt)
    if len(prompts) > max(service.limits.queue, 1):
        raise BadRequest(
            f"prompt has {len(prompts):,} prompts, at most {service.limits.queue} may "
            "wait: send them in several requests.",
            "prompt",
        )
    _check_characters(service, prompts)
    for number, prompt in enumerate(prompts):
        with service.encoding:
            tokens = service.model.encode(
                prompt, "prompt", first=not row.length, after=row.last
            )
        ask = _ask(service, request, memory, tokens, new, number)
        ask = dataclasses.replace(
            ask, stop=request.stops(), likely=likely, echo=echo and likely
        )
        parent = about["id"] if about else None
        found.append(Prompted(ask, row.length, None, parent, echo))
    return found


def chat_ask(service: Service, request: ChatRequest) -> Prompted:
    """Makes what the engine is asked by a conversation.

    A memory that has a conversation is continued: the request brings the new messages,
    or all of them. What the memory holds already is not fed again.

    Raises:
      BadRequest, ValueError, TypeError: names the field.
      Unknown: there is no such memory.
    """
    check_model(service, request.model)
    memory, about = _memory(service, request.memory)
    messages = [message.plain() for message in request.messages]
    _check_characters(service, (x["content"] for x in messages))
    told, base = (about or {}).get("messages") or [], 0
    row = memory.rows[0] if memory else History.empty()
    if about is not None:
        base = about["base"] if row.tokens is not None else row.length
    if messages[: len(told)] != told:
        messages = [*told, *messages]
    after = int(row.tokens[base - 1]) if base and row.tokens is not None else None
    with service.encoding:
        tokens = encode_turns(service.model, messages, first=not base, after=after)
        stop = tuple(turn_ends(service.model, request.stops()))
    held = row.tokens[base:] if row.tokens is not None else np.zeros(0, np.int32)
    same = known(tokens, held)
    memory, same = cut_back(memory, base, same)
    new = request.max_completion_tokens or request.max_tokens or CHAT_TOKENS
    ask = _ask(service, request, memory, tokens[same:], new, 0)
    likely = bool(request.logprobs)
    ask = dataclasses.replace(ask, stop=stop, likely=likely)
    parent = about["id"] if about else None
    return Prompted(ask, base, messages, parent)


def source(
    service: Service, request: MemoryRequest, parent: str | None = None
) -> Source:
    """Makes what is to be read into a memory.

    Raises:
      BadRequest, ValueError, TypeError: names the field.
      Unknown: there is no such parent.
    """
    check_model(service, request.model)
    if (request.text is None) == (request.messages is None):
        raise BadRequest("give either text or messages, and not both.", "text")
    memory, about = _memory(service, parent)
    row = memory.rows[0] if memory else History.empty()
    model, base, messages = service.model, None, None
    if request.text is not None:
        _check_characters(service, [request.text])
        text, spans, behind = request.text, request.spans, {"after": row.last}
        # A search may take seconds, in which others encode.
        found, fast = None, getattr(model.tokenizer, "is_fast", False)
        if isinstance(spans, str) and spans:
            if not service.searching.acquire(timeout=PATIENCE):
                raise Busy(1, 5)
            try:
                found = search(spans, text) if fast else token_spans(spans, text)
            finally:
                service.searching.release()
        with service.encoding:
            tokens = model.encode(text, "text", first=not row.length, **behind)
            if found is not None:
                marked = tokens_of(
                    found, text, model.tokenizer, first=not row.length, **behind
                )
                spans = marked.tolist()
    else:
        if request.spans is not None:
            raise BadRequest("spans mark parts of text, not of messages.", "spans")
        spans = None
        base, tokens, messages = _turns(service, request.messages or [], about, row)
    if len(tokens) > service.limits.tokens:
        raise TooManyTokens(len(tokens), service.limits.tokens)
    settings = _settings(service, request, spans, row)
    return Source(tokens, settings, parent, messages, base, request.name)


class TooManyTokens(ValueError):
    """A text is longer than the server takes."""

    def __init__(self, count: int, most: int, what: str = "tokens"):
        super().__init__(
            f"the text has {count:,} {what}, the server takes {most:,}: send a "
            "shorter one, or start the server with a larger --max_tokens."
        )


def _check_characters(service: Service, texts: Iterable[Any]) -> None:
    """Raises TooManyTokens for texts that are too long to be even encoded.

    60 MB in one word took the tokenizer a minute and 12 GB.
    """
    count = sum(len(x) for x in texts if isinstance(x, str))
    most = CHARACTERS * service.limits.tokens
    if count > most:
        raise TooManyTokens(count, most, "characters")


def _turns(
    service: Service, given: list[Message], about: About | None, row: History
) -> tuple[int, Int[np.ndarray, " n"], list[dict[str, str]]]:
    """Returns base, new tokens and messages of a conversation to be read."""
    messages = [message.plain() for message in given]
    _check_characters(service, (x["content"] for x in messages))
    told = (about or {}).get("messages") or []
    base = about["base"] if about else 0
    held = np.zeros(0, np.int32)
    if told and row.tokens is not None:
        held = row.tokens[base:]
    elif about is not None:
        base = row.length
    messages = [*told, *messages]
    after = row.last if base == row.length else None
    with service.encoding:
        tokens = encode_turns(
            service.model, messages, first=not base, after=after, answers=False
        )
    if known(tokens, held) < len(held):
        raise BadRequest(
            "messages: the chat template writes what the memory holds in another way "
            "now: make a memory of the whole conversation.",
            "messages",
        )
    return base, tokens[len(held) :], messages


def _settings(
    service: Service, request: MemoryRequest, spans: Any, row: History
) -> dict[str, Any]:
    """Returns the options of `Model.compress`, the server's where none is given."""
    limits, able = service.limits, methods(service.model)
    method = request.method or limits.method
    if request.method is not None and request.method not in (*able, limits.method):
        raise BadRequest(
            f"method={short(repr(request.method))} is unknown: "
            f"{meant(request.method, able)}use {', '.join(able)}.",
            "method",
        )
    budget = request.max_slots is not None or request.max_bytes is not None
    ratio = request.ratio
    if method in (None, "beacon"):
        _check_ratio(service, ratio)
    if ratio is None and not budget and not row.length:
        ratio = limits.ratio
    given = {
        "ratio": ratio,
        "max_slots": request.max_slots,
        "max_bytes": request.max_bytes,
        "method": method,
        "spans": spans or None,
        "lossless": request.lossless if spans else None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _ask(
    service: Service,
    request: Sampled,
    memory: Memory | None,
    tokens: Int[np.ndarray, " n"],
    new: int,
    number: int,
) -> Ask:
    """Makes an `Ask` of what all requests have."""
    row = memory.rows[0] if memory else History.empty()
    if len(tokens) > service.limits.tokens:
        raise TooManyTokens(len(tokens), service.limits.tokens)
    if new > service.limits.tokens:  # a plan has a number for each window
        raise BadRequest(
            f"max_tokens={short(str(new))} is too many: give at most "
            f"{service.limits.tokens:,}.",
            "max_tokens",
        )
    checked(request.sampling())
    sampling = request.fitting()
    if sampling.get("repetition_penalty", 1.0) != 1.0 and row.tokens is None:
        raise BadRequest(
            "repetition_penalty needs the tokens of the memory, which were not kept: "
            "leave it out.",
            "repetition_penalty",
        )
    count = request.n or 1
    seed = secrets.randbelow(SEEDS) if request.seed is None else request.seed
    seeds = tuple((seed + number * count + i) % SEEDS for i in range(count))
    ratio = _ratio(service, request.ratio, row, len(tokens), new)
    return Ask(
        tokens.astype(np.int32),
        memory,
        ratio,
        sampling,
        seeds,
        new,
        keep=bool(request.store),
    )


def _ratio(
    service: Service, asked: int | str | None, row: History, length: int, new: int
) -> int:
    """Returns the ratio of the windows that a prompt and its answer begin."""
    _check_ratio(service, asked)
    if asked is None and not row.length:
        asked = "auto"
    config = service.model.config
    plan = make_plan(config, asked, length=length, new_tokens=new, before=row)
    return int(plan.ratios[-1])


def _check_ratio(service: Service, asked: int | str | list[int] | None) -> None:
    """Raises BadRequest for a ratio that the beacons were not trained for.

    A new one compiles all programs anew, and everybody waits for that.
    """
    beacon = service.model.config.beacon
    if beacon is None or asked is None or isinstance(asked, str):
        return
    default = service.limits.ratio
    known = {0, *beacon.ratios, *(default if isinstance(default, list) else [default])}
    wrong = [
        x for x in (asked if isinstance(asked, list) else [asked]) if x not in known
    ]
    if wrong:
        able = ", ".join(map(str, sorted(x for x in known if isinstance(x, int) and x)))
        raise BadRequest(
            f"ratio={short(str(asked))} is not one of this server: use {able}, 'auto' "
            "or 'full'.",
            "ratio",
        )


def _memory(service: Service, name: str | None) -> tuple[Memory | None, About | None]:
    """Returns a memory and what is told of it; None, None for no name.

    Raises:
      Unknown: there is none of this name.
      BadRequest: it cannot be used here.
    """
    if name is None:
        return None, None
    about = service.store.about(name)
    try:
        memory = service.store.get(name)
    except PackError as error:
        raise BadRequest(f"memory={name!r} cannot be read: {error}", "memory") from None
    dtype = service.engine.shape.dtype
    if memory.dtype != dtype or memory.recent:
        has = "keeps recent windows" if memory.recent else f"is {memory.dtype}"
        raise BadRequest(
            f"memory={name!r} {has}, the server's are {dtype}: make it here again.",
            "memory",
        )
    return memory, about


def _listed(prompt: Any) -> list[Any]:
    """Returns prompts as a list; token ids are one prompt."""
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise BadRequest("prompt=[] has no prompt: give a text.", "prompt")
    return prompt
