"""Texts to prompts of a wanted number of tokens."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int

from beacon_jax.evaluation.model import Model

Tokens = Int[np.ndarray, " n"]


def encode(model: Model, text: str, prefix: str = "", chat: str = "auto") -> Tokens:
    """The prompt of a user's `text`, whose answer begins with `prefix`.

    Args:
      chat: "auto": in the tokenizer's chat template, if it has one; "none": as it is.
    """
    tokenizer = model.tokenizer
    special = True
    if chat == "auto" and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        special = False  # the template has them
    return ids(tokenizer, text + prefix, special=special)


def ids(tokenizer: Any, text: str, *, special: bool = False) -> Tokens:
    """Token ids of a text; `special` adds what the tokenizer puts in front (bos)."""
    found = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return np.asarray(found, np.int32)


def fit(
    build: Callable[[int], Tokens],
    room: int,
    *,
    least: int = 0,
    near: int = 0,
    name: str = "a task",
) -> int:
    """The largest n >= least whose build(n) has at most `room` tokens.

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
