"""Conversations as tokens, with the assistant's answers marked (SPEC section 6)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

TEMPLATES = ("qwen", "llama-2", "llama-3", "mistral", "hf", "no")

NO_ASSISTANT = "no assistant turn"
SAME_ROLE = "two turns of one role in a row"
UNKNOWN_ROLE = "unknown role"
MULTI_TURN = "more than one question for chat_template 'no'"
REFUSED = "refused by the chat template"


def encode(
    turns: Sequence[tuple[str, str]], tokenizer: Any, template: str
) -> tuple[np.ndarray, np.ndarray] | str:
    """(tokens int32 [n], labelled bool [n]) of a conversation, or a reason to drop it."""
    raise NotImplementedError(template)


def eos_of(tokenizer: Any) -> int:
    """The id of the eos token.

    Raises:
      ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r} has no eos token; set eos_token in "
            "its tokenizer_config.json"
        )
    return tokenizer.eos_token_id
