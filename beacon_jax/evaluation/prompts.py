"""Texts to prompts of a wanted number of tokens: chat template, cutting, fitting."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax import tokenise
from beacon_jax.inference.model import Model
from beacon_jax.inference.template import written

Tokens = Int[np.ndarray, " n"]


def encode(model: Model, text: str, prefix: str = "", chat: str = "auto") -> Tokens:
    """The prompt of a user's `text`, whose answer begins with `prefix`.

    Args:
      chat: "auto": in the tokenizer's chat template, if it has one; "none": as it is.
    """
    if not templated(model, chat):
        return tokenise.encode(model.tokenizer, text + prefix, "start")
    turns = [{"role": "user", "content": text}]
    text = written(model.tokenizer, turns, thinks=False)  # tasks ask for short answers
    return tokenise.encode(model.tokenizer, text + prefix, "bare")


def ask(model: Model, text: str, prefix: str, chat: str) -> Tokens:
    """Makes a prompt whose answer begins with `prefix`.

    The prefix stands on a line of its own or, in a template, begins the assistant's
    turn.
    """
    line = "" if templated(model, chat) else "\n"
    return encode(model, text + line, prefix, chat)


def templated(model: Model, chat: str) -> bool:
    """Whether questions are put into the tokenizer's chat template."""
    return chat == "auto" and bool(getattr(model.tokenizer, "chat_template", None))


def cut_middle(tokenizer: Any, text: str, most: int) -> str:
    """The text, or the text of its first and last most // 2 tokens if it has more.

    LongBench's: the middle goes, since beginnings and ends hold instructions. The two
    halves can come out a few tokens longer or shorter once joined.
    """
    found = tokenise.encode(tokenizer, text, "start")
    if len(found) <= most:
        return text
    half = most // 2
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return decode(found[:half].tolist()) + decode(found[len(found) - half :].tolist())


def fit(
    build: Callable[[int], Tokens],
    room: int,
    *,
    least: int = 0,
    near: int = 0,
    name: str = "a task",
) -> int:
    """The largest n >= least whose build(n) has at most `room` tokens.

    Args:
      build: more of something (lines, sentences) with larger n, hence more tokens.
      near: a guess, such as what fitted before; a good one costs a tenth of none.

    Raises:
      ValueError: not even `least` fit; names what does.
    """
    size = lambda n: len(build(n))
    low, under = least, size(least)
    if under > room:
        raise ValueError(
            f"--lengths has one that leaves {name} {room} tokens for its prompt, which "
            f"needs {under}: use at least {under - room} tokens more."
        )
    high = over = 0  # unknown
    step = max(1, near // 128)
    if near > low:
        at, got = near, size(near)
        while got > room:
            high, over = at, got
            at, step = max(least, at - step), 2 * step
            got = size(at)
        low, under = at, got
    while not high:
        got = size(low + step)
        if got > room:
            high, over = low + step, got
        else:
            low, under, step = low + step, got, 2 * step
    # Sizes are nearly linear in n; every third time the middle, should they not be.
    turn = 0
    while (width := high - low) > 1:
        share = 0.5 if turn % 3 == 2 else (room - under) / (over - under)
        at = low + min(max(round(share * width), 1), width - 1)
        got, turn = size(at), turn + 1
        if got > room:
            high, over = at, got
        else:
            low, under = at, got
    return low
