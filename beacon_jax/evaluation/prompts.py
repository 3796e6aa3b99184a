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
    build: Callable[[int], Tokens], room: int, *, least: int = 0, name: str = "a task"
) -> int:
    """The largest n >= least whose build(n) has at most `room` tokens.

    build: more of something (lines, sentences) with larger n, hence more tokens.

    Raises:
      ValueError: not even `least` fit; names what does.
    """
    smallest = len(build(least))
    if smallest > room:
        raise ValueError(
            f"--lengths has one that leaves {name} {room} tokens for its prompt, which "
            f"needs {smallest}: use at least {smallest - room} tokens more."
        )
    step = 1
    while len(build(least + step)) <= room:
        step *= 2
    low, high = least + step // 2, least + step  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if len(build(middle)) <= room:
            low = middle
        else:
            high = middle
    return low
