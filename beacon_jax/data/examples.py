"""Turns records into examples: tokens, and which of them are targets.

The rules are those of docs/specification.md sections 3 and 6.

One function decides for every kind of row, so that preparing in advance and tokenising
on the fly give the same examples and drop the same rows for the same reasons.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.data import chat
from beacon_jax.data.heldout import HELD_OUT
from beacon_jax.data.sources import Record
from beacon_jax.names import check_choice
from beacon_jax.tokenise import check_ids, encode

# Why a record becomes no example. Those of EXPECTED are harmless; all others count as
# bad rows.
SHORTER = "shorter than min_length"
LONGER = "longer than max_length"
EMPTY = "empty"
LABELS_LENGTH = "labels and tokens differ in length"
OTHER_LABELS = "labels are other ids than the tokens"
OTHER_VOCABULARY = "token ids outside the tokenizer's vocabulary"
# What becomes of text above max_length.
LONG = ("split", "cut", "drop")
REASONS = (
    SHORTER,
    LONGER,
    EMPTY,
    LABELS_LENGTH,
    OTHER_LABELS,
    OTHER_VOCABULARY,
    *chat.REASONS,
)

EXPECTED = (SHORTER, LONGER, HELD_OUT)

IGNORED = -100  # the label of a token that is not a target


@dataclass(frozen=True)
class Rules:
    """The rules by which records become examples.

    Attributes:
      min_length, max_length: least and most tokens of an example.
      chat_template: how conversations are written: a name of `chat.TEMPLATES`, or "" if
        there are none.
      long: what becomes of text above max_length: "split" into examples of max_length
        tokens, the last one shorter; "cut" after max_length, as in the release; or
        "drop", as in the paper (appendix A).
      heldout: share of the documents that are kept for evaluation (`data.heldout`).
    """

    min_length: int = 0
    max_length: int = 20480
    chat_template: str = ""
    long: str = "split"
    heldout: float = 0.0

    def __post_init__(self) -> None:
        if self.min_length < 0 or self.max_length < max(1, self.min_length):
            raise ValueError(
                f"data.min_length={self.min_length}, data.max_length="
                f"{self.max_length}: need 0 <= min_length <= max_length and max_length "
                ">= 1."
            )
        if self.chat_template:
            check_choice("data.chat_template", self.chat_template, chat.TEMPLATES)
        check_choice("data.long", self.long, LONG)
        if not 0.0 <= self.heldout < 1.0:
            raise ValueError(
                f"data.heldout={self.heldout} is a share of the documents: use a "
                "number from 0 to below 1."
            )


class Example(NamedTuple):
    """One row of training.

    Attributes:
      tokens: int32 [n].
      labelled: bool [n], whether token t is a target, that is whether its own id is
        predicted. Token t - 1 predicts it; `shift` moves the labels there.
    """

    tokens: np.ndarray
    labelled: np.ndarray


class Made(NamedTuple):
    """The result of a record: its examples, or the reason why there are none.

    Attributes:
      examples: none if there is a reason.
      reason: one of `REASONS`, perhaps with more behind a colon, or "".
      lost: tokens of the record that are in no example, as far as they were counted.
      unread: names of what the record's row has besides (`Record.unread`).
    """

    examples: tuple[Example, ...] = ()
    reason: str = ""
    lost: int = 0
    unread: tuple[str, ...] = ()


def make_examples(
    record: Record, tokenizer: Any, rules: Rules, vocab_size: int | None = None
) -> Made:
    """Returns the examples of a record, or the reason why there is none.

    Text: all tokens are targets. Text below min_length is dropped. Text with fewer than
    max_length tokens gets an eos, if it does not end in one. Text above max_length is
    cut, without eos, dropped, or split (`Rules.long`). Each piece of split text begins
    with the tokenizer's bos if the text does. The last piece gets an eos if there is
    room and none yet; it is left out if it is below min_length.

    Conversations are never cut: outside [min_length, max_length] they are dropped. Only
    the assistant's answers and their end markers are targets.

    Tokenised rows are taken as they are inside [min_length, max_length]; without labels
    all tokens are targets.

    Args:
      vocab_size: rows of the embedding of the model that is to be trained; None: there
        is no model yet, it will have a row for each token.

    Raises:
      ValueError: a conversation without rules.chat_template, or a tokenizer that lacks
        what the rules need (eos, offsets, a template with generation marks); a token
        that the model has no embedding of.
    """
    made = _make(record, tokenizer, rules, vocab_size)
    if vocab_size is not None:
        for example in made.examples:
            check_ids(example.tokens, vocab_size, record.where, tokenizer)
    if made.reason:
        return made
    dropped = chat.not_written(record.turns or (), rules.chat_template)
    return made._replace(unread=(*record.unread, *dropped))


def _make(record: Record, tokenizer: Any, rules: Rules, vocab_size: int | None) -> Made:
    if record.text is not None:
        return _of_text(record.text, tokenizer, rules)
    if record.turns is not None:
        made = chat.encode(record.turns, tokenizer, rules.chat_template)
        example = made if isinstance(made, str) else Example(*made)
    else:
        assert record.tokens is not None
        if vocab_size is not None:
            check_ids(record.tokens[0], vocab_size, record.where, tokenizer)
        example = _of_tokens(*record.tokens, vocab_size or len(tokenizer))
    if isinstance(example, str):
        return Made(reason=example)
    n = len(example.tokens)
    if n < rules.min_length:
        return Made(reason=SHORTER, lost=n)
    return Made(reason=LONGER, lost=n) if n > rules.max_length else Made((example,))


def shift(tokens: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Returns labels int32 [n]: what each token is to predict.

    Token t predicts `tokens[t + 1]` if that is a target. Its label is -100 otherwise,
    and at the last token, which predicts nothing (docs/specification.md section 3).
    Labels of examples are shifted only here.
    """
    labels = np.full(len(tokens), IGNORED, np.int32)
    labels[:-1] = np.where(labelled[1:], tokens[1:], IGNORED)
    return labels


def _of_text(text: str, tokenizer: Any, rules: Rules) -> Made:
    if not text.strip():
        return Made(reason=EMPTY)
    tokens = encode(tokenizer, text, "start")
    n, size = len(tokens), rules.max_length
    if n < rules.min_length:
        return Made(reason=SHORTER, lost=n)
    if n <= size or rules.long == "cut":
        return Made(
            (_all_targets(_ended(tokens[:size], tokenizer, size)),),
            "",
            n - min(n, size),
        )
    if rules.long == "drop":
        return Made(reason=LONGER, lost=n)
    pieces = [_ended(x, tokenizer, size) for x in _pieces(tokens, tokenizer, size)]
    lost = 0
    if len(pieces[-1]) < rules.min_length:
        lost = len(pieces.pop())
    return Made(tuple(map(_all_targets, pieces)), "", lost)


def _pieces(tokens: np.ndarray, tokenizer: Any, size: int) -> list[np.ndarray]:
    """Cuts tokens [n] into pieces of at most `size`, each with the bos of the first."""
    bos = tokens[:1]
    if tokenizer.bos_token_id is None or bos[0] != tokenizer.bos_token_id or size < 2:
        return [tokens[i : i + size] for i in range(0, len(tokens), size)]
    starts = range(1, len(tokens), size - 1)
    return [np.concatenate([bos, tokens[i : i + size - 1]]) for i in starts]


def _ended(tokens: np.ndarray, tokenizer: Any, size: int) -> np.ndarray:
    """Returns the tokens with an eos behind them, if there is room and none yet.

    Some texts bring their own.
    """
    eos = np.int32(chat.eos_of(tokenizer)) if len(tokens) < size else None
    if eos is None or (len(tokens) and tokens[-1] == eos):
        return tokens
    return np.append(tokens, eos)


def _all_targets(tokens: np.ndarray) -> Example:
    return Example(tokens, np.ones(len(tokens), bool))


def _of_tokens(
    tokens: np.ndarray, labels: np.ndarray | None, known: int
) -> Example | str:
    if not len(tokens):
        return EMPTY
    if np.min(tokens) < 0 or np.max(tokens) >= known:
        return OTHER_VOCABULARY
    tokens = np.asarray(tokens, np.int32)
    if labels is None:
        return _all_targets(tokens)
    if len(labels) != len(tokens):
        return LABELS_LENGTH
    labelled = np.asarray(labels) != IGNORED
    if not np.array_equal(tokens[labelled], np.asarray(labels)[labelled]):
        return OTHER_LABELS
    return Example(tokens, labelled) if labelled.any() else chat.NO_LABELS
