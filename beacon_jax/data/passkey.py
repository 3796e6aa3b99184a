"""Passkey samples: a 5-digit key hidden in real text, asked for at the end.

Training and evaluation share one construction. The wording is the usual one (Landmark
Attention, LongLLaMA, RULER niah_single). The haystack is real text, not the repeated
sentences of the original, which any compressor passes (docs/evaluation-protocols.md
section 2.3).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from beacon_jax.tokenise import encode_spans

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is {key}"

Span = tuple[int, int]


@dataclass(frozen=True)
class Passkey:
    """One sample. Spans are half-open token ranges.

    Attributes:
      tokens: int32 [length].
      answer: the end of the tokens: `answer == (length - digits, length)`.
      needle: the whole inserted sentence.
      mentions: the key's two places inside the needle.
    """

    tokens: np.ndarray
    key: int
    answer: Span
    needle: Span
    mentions: tuple[Span, Span]


def draw_key(rng: np.random.Generator) -> int:
    """Draws a uniform 5-digit key without a leading zero."""
    return int(rng.integers(10_000, 100_000))


def encode_with_key(template: str, key: int, tokenizer: Any) -> tuple[np.ndarray, list]:
    """Tokenises the template with the key filled in, as a part of a longer text.

    A token that covers any digit of the key belongs to the key's span: some tokenizers
    glue a space to the first digit.

    Returns:
      Token ids [n], and the token spans of the key.
    """
    text = template.format(key=key)
    out = encode_spans(tokenizer, text, "behind")
    spans, start = [], text.find(str(key))
    while start >= 0:
        end = start + len(str(key))
        hit = [
            i for i, (a, b) in enumerate(out.spans.tolist()) if a < end and b > start
        ]
        spans.append((hit[0], hit[-1] + 1))
        start = text.find(str(key), end)
    return out.ids, spans


def contains(tokens: np.ndarray, part: np.ndarray) -> bool:
    """Tells whether `part` [n] occurs as a contiguous run of `tokens` [m]."""
    if len(tokens) < len(part):
        return False
    views = np.lib.stride_tricks.sliding_window_view(tokens, len(part))
    return bool((views == part).all(axis=1).any())


def last_window_start(length: int, window: int) -> int:
    """Returns where the last (full or partial) window of `length` tokens begins."""
    return (length - 1) // window * window


def make_passkey(
    rng: np.random.Generator,
    text_tokens: np.ndarray,
    length: int,
    depth: float,
    tokenizer: Any,
    window: int = 0,
) -> Passkey:
    """Makes a sample of exactly `length` tokens with the needle at `depth`.

    Args:
      text_tokens: int [>= length] haystack; its first tokens are used.
      depth: 0 puts the needle first, 1 last; in between its first token is `round(depth
        * room)`, where room is the largest start that is allowed.
      window: if > 0, the needle ends before the last window starts, so that answering
        needs the (compressed) past at every depth. 0: anywhere before the question.

    Raises:
      ValueError: depth outside [0, 1], too little text, or a length without room.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth} must lie in [0, 1]")
    key = draw_key(rng)
    question, (span,) = encode_with_key(QUESTION, key, tokenizer)
    while contains(text_tokens[:length], question[slice(*span)]):
        key = draw_key(rng)
        question, (span,) = encode_with_key(QUESTION, key, tokenizer)
    needle, (first, second) = encode_with_key(NEEDLE, key, tokenizer)
    fill = length - len(needle) - len(question)
    limit = length - len(question)
    if window:
        limit = min(limit, last_window_start(length, window))
    room = limit - len(needle)
    if fill < 0 or room < 0:
        raise ValueError(
            f"length={length} (window={window}) has no room for a needle of "
            f"{len(needle)} and a question of {len(question)} tokens; use a longer one"
        )
    if len(text_tokens) < fill:
        raise ValueError(
            f"text_tokens has {len(text_tokens)} tokens, length={length} needs {fill}; "
            "name a longer text"
        )
    at = round(depth * room)
    hay = np.asarray(text_tokens[:fill], np.int32)
    return Passkey(
        tokens=np.concatenate([hay[:at], needle, hay[at:], question]),
        key=key,
        answer=(length - len(question) + span[0], length - len(question) + span[1]),
        needle=(at, at + len(needle)),
        mentions=((at + first[0], at + first[1]), (at + second[0], at + second[1])),
    )
