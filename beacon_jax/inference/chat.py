"""A conversation whose past is a compressed memory: a turn feeds only what is new."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Unpack

import numpy as np

from beacon_jax.inference import validate
from beacon_jax.inference.feeding import check_memory, choose_dtype, choose_recent
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.options import ELSEWHERE, CompleteOptions, Completion, collect
from beacon_jax.inference.template import encode_turns, try_template, turn_ends
from beacon_jax.inference.validate_ratio import check_ratios
from beacon_jax.names import hinted

if TYPE_CHECKING:
    from beacon_jax.inference.model import Generation, Model

# Options of `complete` that mean nothing to a conversation.
_NOT_OURS = {
    "on_text": "give it to each message, say(text, on_text=...)",
    "instruct": "a chat always writes by the chat template, leave it out",
    "method": "it compresses a context: give memory=compress(text, method=...)",
    "spans": "they mark parts of a text: give memory=compress(text, spans=...)",
}


def _options() -> dict[str, str]:
    """Says of every name of an option what to do if it is given to `Chat.say`."""
    names = [field.name for field in dataclasses.fields(Completion)]
    known = {name: name for name in names} | ELSEWHERE
    said = "options belong to the conversation, give {} to Chat(model, ...)."
    return {name: said.format(meant) for name, meant in known.items()}


class Chat:
    """A conversation in the chat template of the model's tokenizer.

    Each turn writes the whole conversation by the template and compares its tokens with
    those that the memory holds already. What is new is fed. A template may write
    earlier turns differently now: some leave out old thoughts, and text that is
    tokenised anew may be cut elsewhere. Then the memory is truncated to what both begin
    with, and fed from there. So it is always that of the conversation as written.

    A context, compressed or loaded, comes in front of the template's first token. The
    template's bos is left out then, because the context has one. The context is never
    truncated.

    Attributes:
      messages: [{"role": ..., "content": ...}], those of the system and of both sides.
      memory: context and conversation, up to the last answer; None: nothing yet.
    """

    @hinted("Chat")
    def __init__(
        self,
        model: "Model",
        memory: "Memory | None" = None,
        system: str | None = None,
        *,
        chat_template: str | None = None,
        **options: Unpack[CompleteOptions],
    ):
        """Starts a conversation.

        Args:
          memory: a memory of one row: what the conversation is about.
          system: the system message.
          chat_template: jinja text in place of the tokenizer's own.
          options: those of `Model.complete`, with 512 new tokens by default. `ratio` is
            that of the conversation's windows (None: as the memory goes on), `stop`
            ends an answer besides the tokenizer's end token, turn i draws with
            seed + i, and `on_text` is given to `say`.

        Raises:
          TypeError: an argument of another type, or an option that does not exist or
            is no chat's.
          ValueError: no tokenizer, no chat template or one that cannot be used, a
            memory of several rows or of another model, or an option out of range.
        """
        from beacon_jax.inference.model import Model

        validate.model(model, Model, "Chat")
        validate.memory(memory, Memory)
        for name, text in (("system", system), ("chat_template", chat_template)):
            if text is not None:
                validate.message(name, text)
        if memory is not None and len(memory) != 1:
            raise ValueError(
                f"memory has {len(memory)} rows: a conversation has one (memory[i])."
            )
        if chat_template is not None:
            validate.hint_at_file("chat_template", chat_template)
        own = ("model", "memory", "system", "chat_template")
        asked = collect(Completion, "Chat", {"max_new_tokens": 512, **options}, own)
        validate.options(asked, 1)
        check_ratios(asked.ratio, model.config)
        for name, remedy in _NOT_OURS.items():
            given = getattr(asked, name)
            if given is not None and given is not False:
                raise TypeError(f"Chat({name}={validate.shown(given)}): {remedy}.")
        self.memory = memory
        self.messages: list[dict[str, str]] = []
        if system:
            self.messages.append({"role": "system", "content": system})
        check_memory(model, memory, 1)
        choose_dtype(model, memory, asked.memory_dtype)
        choose_recent(model, memory, asked, False)
        try_template(model.tokenizer, self.messages, chat_template)
        self._model, self._template = model, chat_template
        self._options: CompleteOptions = {
            "max_new_tokens": 512,
            **options,
            "stop": turn_ends(model, asked.stop),
        }
        self._seed = int(np.asarray(asked.seed).reshape(()))
        self._base = int(memory.lengths[0]) if memory is not None else 0
        # Without token ids the end of the context cannot be cut back to: keep it.
        self._after = memory.rows[0].last if memory is not None else None
        forgot = memory is not None and memory.rows[0].tokens is None
        self._context = memory if forgot else None
        self._held = np.zeros(0, np.int32)  # tokens of the memory behind the context
        self._starts: list[int] = []  # of each turn, in `_held`

    def __repr__(self) -> str:
        count = len(self._starts)
        turns = "1 turn" if count == 1 else f"{count} turns"
        return f"Chat({turns}, {self.memory!r})"

    @hinted("Chat.say", _options())
    def say(
        self, text: str, on_text: Callable[[str], None] | None = None
    ) -> "Generation":
        """Answers a message; message and answer become part of the conversation.

        An error or an interrupt leaves the conversation as it was.

        Raises:
          TypeError: no text, or an option, which belongs to `Chat`.
          ValueError: the template refuses the conversation, or as `Model.complete`.
        """
        validate.message("text", text)
        validate.callback("on_text", on_text, "piece of text")
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.encode(messages)
        memory, same = self._cut(known(tokens, self._held))
        turn: CompleteOptions = {
            **self._options,
            "seed": self._seed + len(self._starts),
            "on_text": on_text,
        }
        made = self._model.complete(tokens[same:], memory=memory, **turn)
        self._starts.append(same)
        self.messages = [*messages, {"role": "assistant", "content": made.text}]
        self.memory = made.memory
        self._held = np.concatenate([tokens, made.tokens]).astype(np.int32)
        return made

    def undo(self) -> None:
        """Takes the last turn back, message and answer.

        Raises:
          ValueError: no turn has been made yet.
        """
        if not self._starts:
            raise ValueError("nothing to undo: no turn has been made yet.")
        start = self._starts.pop()
        self.memory, start = self._cut(start)
        self._held = self._held[:start]
        self.messages = self.messages[:-2]

    def encode(self, messages: list[dict[str, str]]) -> np.ndarray:
        """Returns the tokens [n] of a conversation up to where its answer begins."""
        return encode_turns(
            self._model,
            messages,
            template=self._template,
            first=not self._base,
            after=self._after,
        )

    def _cut(self, tokens: int) -> "tuple[Memory | None, int]":
        """Returns the memory of the conversation's first `tokens`, see `cut_back`."""
        return cut_back(self.memory, self._base, tokens, self._context)


def known(tokens: np.ndarray, held: np.ndarray) -> int:
    """Counts the tokens of a conversation that need not be fed again.

    Both begin with them. At least one token is left to feed, for the logits behind it.
    """
    size = min(len(tokens) - 1, len(held))
    differ = np.flatnonzero(tokens[:size] != held[:size])
    return int(differ[0]) if len(differ) else size


def cut_back(
    memory: Memory | None, base: int, tokens: int, context: Memory | None = None
) -> tuple[Memory | None, int]:
    """Returns the memory of a conversation's first `tokens`, and their number.

    They are fewer where the memory has to go back further.

    Args:
      memory: of one row: the context, and the conversation behind it.
      base: tokens of the context.
      context: its memory, for one whose token ids were not kept.
    """
    if memory is None or base + tokens == 0:
        return None, 0
    end, row = base + tokens, memory.rows[0]
    if end == row.length:
        return memory, tokens
    end = row.cut_place(end)  # the conversation has the tokens behind it
    if end < base:
        return context, 0
    return memory.truncate(end), end - base
