"""Answers as JSON: whole ones, and the chunks of those that are streamed."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from beacon_jax.core.loss import Likely
from beacon_jax.core.memory import slot_nbytes
from beacon_jax.serving.prompts import Prompted
from beacon_jax.serving.rows import Ask, Ended, Event, Failed, Piece, Read
from beacon_jax.serving.service import Service
from beacon_jax.serving.store import About

type JSON = dict[str, Any]


class Answering:
    """Prompts on their way through the engine, and what comes back of them.

    `async for number, event in answering` yields what happens to prompt `number`.
    Leaving the block cancels what has not ended.
    """

    def __init__(self, service: Service, prompted: Sequence[Prompted]):
        """Submits the prompts, all of them or none.

        Raises:
          Busy, TooLong: as `Engine.submit`.
        """
        self._engine = service.engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = sum(len(each.ask.seeds) for each in prompted)
        self.tickets = []
        try:
            for number, each in enumerate(prompted):
                self.tickets.append(self._engine.submit(each.ask, self._teller(number)))
        except Exception:
            self.close()
            raise

    def _teller(self, number: int) -> Any:
        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return tell

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self._open:
            number, event = await self._queue.get()
            if isinstance(event, Failed):
                raise event.error
            self._open -= isinstance(event, Ended)
            yield number, event

    def close(self) -> None:
        """Cancels what has not ended."""
        if self._open:
            for ticket in self.tickets:
                self._engine.cancel(ticket)


class Writer:
    """Writes the answer to a request, of prompts with `n` choices each.

    Attributes:
      chat: whether it is a conversation's.
      more: what is added to the last part: "memory" of a stored answer.
    """

    def __init__(
        self, service: Service, prompted: Sequence[Prompted], *, chat: bool, top: int
    ):
        """Starts an answer.

        Args:
          top: how many of the most likely tokens are told.
        """
        self.service, self.prompted, self.chat, self.top = service, prompted, chat, top
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.completion_tokens = 0
        self.entries = 0
        self.more: JSON = {}

    def index(self, number: int, choice: int) -> int:
        """Numbers a choice among those of all prompts."""
        return number * len(self.prompted[number].ask.seeds) + choice

    def head(self, kind: str) -> JSON:
        """Returns what every part begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.service.name,
        }

    def note(self, event: Event) -> None:
        """Counts what has happened."""
        if isinstance(event, Piece):
            self.completion_tokens += len(event.tokens)
        elif isinstance(event, Ended):
            self.entries += event.entries

    def usage(self, tickets: Sequence[Any]) -> JSON:
        """Returns tokens, what they took, and times."""
        rows = [each.ask.before.length for each in self.prompted]
        new = [len(each.ask.tokens) for each in self.prompted]
        read = sum(rows) + sum(new)
        config = self.service.model.config
        nbytes = slot_nbytes(config, self.service.engine.shape.dtype)
        choices = [len(each.ask.seeds) for each in self.prompted]
        tokens = sum((a + b) * n for a, b, n in zip(rows, new, choices, strict=True))
        tokens += self.completion_tokens
        return {
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": self.completion_tokens,
                "total_tokens": read + self.completion_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(rows)},
                "memory": {
                    "tokens": tokens,
                    "slots": self.entries,
                    "bytes": self.entries * nbytes,
                    "full_bytes": tokens * nbytes,
                },
            },
            "timings": tickets[0].timings(),
        }

    # --- chunks ------------------------------------------------------------------

    def chunk(self, number: int, event: Event) -> JSON | None:
        """Returns the chunk that tells of an event; None: there is nothing to tell."""
        prompted = self.prompted[number]
        if isinstance(event, Piece):
            told = None
            if event.likely is not None:
                told = self.logprobs(event.tokens, event.likely)
            return self._choice(self.index(number, event.choice), event.text, told)
        if isinstance(event, Ended):
            index = self.index(number, event.choice)
            return self._choice(index, "", None, event.finish)
        if isinstance(event, Read) and prompted.echo:
            return self._echo(number, event)
        return None

    def _echo(self, number: int, event: Read) -> JSON:
        """Returns the chunk that has the prompt, as every choice begins with it."""
        ask = self.prompted[number].ask
        text, told = self.text(ask.tokens), None
        if ask.likely:
            likely = _echoed(ask, event.likely)
            told = self.logprobs(ask.tokens, likely, first=True)
        count = range(len(ask.seeds))
        parts = [self._choice(self.index(number, i), text, told) for i in count]
        return parts[0] | {"choices": [part["choices"][0] for part in parts]}

    async def chunk_of(self, number: int, event: Event) -> JSON | None:
        """Returns `chunk`; how likely a long prompt was takes a while, elsewhere."""
        if isinstance(event, Read) and event.likely is not None:
            return await asyncio.to_thread(self.chunk, number, event)
        return self.chunk(number, event)

    def opening(self) -> list[JSON]:
        """Returns the chunks that begin an answer of a conversation."""
        count = len(self.prompted[0].ask.seeds) if self.chat else 0
        first = {"role": "assistant", "content": ""}
        kind = "chat.completion.chunk"
        return [
            self.head(kind)
            | {"choices": [{"index": i, "delta": first, "finish_reason": None}]}
            for i in range(count)
        ]

    def closing(self, tickets: Sequence[Any], *, usage: bool) -> JSON | None:
        """Returns the last chunk: what it took, and the memory that was kept."""
        if not usage and not self.more:
            return None
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return self.head(kind) | {"choices": []} | self.usage(tickets) | self.more

    def _choice(
        self, index: int, text: str, told: JSON | None, finish: str | None = None
    ) -> JSON:
        if self.chat:
            delta = {"content": text} if finish is None else {}
            choice: JSON = {"index": index, "delta": delta, "logprobs": told}
            kind = "chat.completion.chunk"
        else:
            choice = {"index": index, "text": text, "logprobs": told}
            kind = "text_completion"
        return self.head(kind) | {"choices": [choice | {"finish_reason": finish}]}

    # --- whole -------------------------------------------------------------------

    async def whole(self, answering: Answering) -> tuple[JSON, list[Ended]]:
        """Waits for the whole answer; returns it, and how its choices ended."""
        found: dict[int, JSON] = {}
        ends = []
        async for number, event in answering:
            self.note(event)
            if isinstance(event, Ended):
                ends.append(event)
            chunk = await self.chunk_of(number, event)
            if chunk is None:
                continue
            for new in chunk["choices"]:
                text = new["delta"].get("content", "") if self.chat else new["text"]
                nothing: JSON = {"text": [], "told": [], "finish": None}
                at = found.setdefault(new["index"], nothing)
                at["text"].append(text)
                if new["logprobs"]:
                    at["told"].append(new["logprobs"])
                at["finish"] = new["finish_reason"] or at["finish"]
        choices = []
        for index in sorted(found):
            at = found[index]
            text = "".join(at["text"])
            choice: JSON = {"index": index}
            if self.chat:
                choice["message"] = {
                    "role": "assistant",
                    "content": text,
                    "refusal": None,
                }
            else:
                choice["text"] = text
            choice["logprobs"] = _joined(at["told"])
            choices.append(choice | {"finish_reason": at["finish"]})
        kind = "chat.completion" if self.chat else "text_completion"
        whole = self.head(kind) | {"choices": choices}
        return whole | self.usage(answering.tickets), ends

    # --- how likely --------------------------------------------------------------

    def text(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of tokens."""
        return self.service.model.tokenizer.decode(
            [int(x) for x in tokens], clean_up_tokenization_spaces=False
        )

    def logprobs(self, tokens: Any, likely: Likely, first: bool = False) -> JSON:
        """Returns how likely tokens were, in the form of the request's kind.

        Args:
          first: nothing is known of the first token, which nothing stands before.
        """
        words = [self.text([token]) for token in tokens]
        rows = _rows(likely, self.top)
        if self.chat:
            return {"content": self._chat_logprobs(words, rows)}
        chosen: list[float | None] = [own for own, _ in rows]
        top: list[dict[str, float] | None] = []
        for word, (own, others) in zip(words, rows, strict=True):
            found = {word: own}
            for token, value in others:
                other = self.text([token])
                found[other] = max(value, found.get(other, -np.inf))
            top.append(found)
        if first and chosen:
            chosen[0] = top[0] = None
        lengths = np.cumsum([0, *map(len, words)])[:-1]
        return {
            "tokens": words,
            "token_logprobs": chosen,
            "top_logprobs": top if self.top else None,
            "text_offset": lengths.tolist(),
        }

    def _chat_logprobs(self, words: list[str], rows: "Told") -> list[JSON]:
        def entry(word: str, value: float) -> JSON:
            whole = "\ufffd" not in word
            found = list(word.encode()) if whole else None
            return {"token": word, "logprob": value, "bytes": found}

        return [
            entry(word, own)
            | {"top_logprobs": [entry(self.text([x]), value) for x, value in others]}
            for word, (own, others) in zip(words, rows, strict=True)
        ]


# Of each token how likely it was, and (id, how likely) of the most likely ones.
type Told = list[tuple[float, list[tuple[int, float]]]]


def _rows(likely: Likely, top: int) -> Told:
    chosen, ids, best = (np.asarray(x).tolist() for x in likely)
    return [
        (own, list(zip(tokens[:top], values[:top], strict=True)))
        for own, tokens, values in zip(chosen, ids, best, strict=True)
    ]


def _echoed(ask: Ask, likely: Likely | None) -> Likely:
    """Returns how likely the prompt's tokens were; the first one has a line of zeros.

    What the memory had pending was fed in front of it.
    """
    assert likely is not None
    skip = len(ask.fed) - len(ask.tokens)
    line = lambda x: np.zeros((1, *x.shape[1:]), x.dtype)
    return Likely(*(np.concatenate([line(x), x])[skip:] for x in likely))


def _joined(parts: list[JSON]) -> JSON | None:
    """Joins what chunks told of how likely their tokens were."""
    if not parts:
        return None
    whole: JSON = {}
    for name in parts[0]:
        lists = [part[name] for part in parts]
        if any(x is None for x in lists):
            whole[name] = None
        else:
            whole[name] = [x for each in lists for x in each]
    if "text_offset" in whole:
        lengths = np.cumsum([0, *map(len, whole["tokens"])])[:-1]
        whole["text_offset"] = lengths.tolist()
    return whole


def shown(about: About, *, whole: bool = True) -> About:
    """Returns what a client is told of a memory; in lists without what is long."""
    hidden = {"base", "biased"}
    if not whole:
        hidden |= {"windows", "messages", "spans"}
    return {name: x for name, x in about.items() if name not in hidden}


def event(data: Any) -> JSON:
    """Returns a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return {"data": text}
