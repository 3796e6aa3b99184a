"""Records become examples: tokens, and which of them are targets.

The rules are those of docs/specification.md sections 3 and 6.

One function decides for every kind of row, so that preparing in advance and tokenising
on the fly give the same examples and drop the same rows for the same reasons.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.data import chat
from beacon_jax.data.sources import Record

# Why a record becomes no example. Those that begin with "shorter than" or "longer than"
# are length rules, expected and harmless; all others count as bad rows.
SHORTER = "shorter than min_length"
LONGER = "longer than max_length"
EMPTY = "empty"
LABELS_LENGTH = "labels and tokens differ in length"
OTHER_LABELS = "labels are other ids than the tokens"
OTHER_VOCABULARY = "token ids outside the tokenizer's vocabulary"
REASONS = (
    SHORTER,
    LONGER,
    EMPTY,
    LABELS_LENGTH,
    OTHER_LABELS,
    OTHER_VOCABULARY,
    *chat.REASONS,
)

IGNORED = -100  # the label of a token that is not a target


@dataclass(frozen=True)
class Rules:
    """Which records become examples, and how.

    min_length, max_length: tokens of an example, both included. chat_template: how
    conversations are written, a name of `chat.TEMPLATES`, or "" if there are none.
    cut_long: text above max_length is cut, as in the release, or left out, as in the
    paper (appendix A).
    """

    min_length: int = 0
    max_length: int = 20480
    chat_template: str = ""
    cut_long: bool = True

    def __post_init__(self) -> None:
        if self.min_length < 0 or self.max_length < max(1, self.min_length):
            raise ValueError(
                f"min_length={self.min_length}, max_length={self.max_length}: need "
                "0 <= min_length <= max_length and max_length >= 1"
            )
        if self.chat_template and self.chat_template not in chat.TEMPLATES:
            raise ValueError(
                f"data.chat_template={self.chat_template!r} is unknown; use one of "
                f"{', '.join(chat.TEMPLATES)}"
            )


class Example(NamedTuple):
    """One row of training.

    tokens: int32 [n]. labelled: bool [n], whether token t is a target, that is whether
    its own id is predicted (from token t - 1; `shift` does that).
    """

    tokens: np.ndarray
    labelled: np.ndarray


def make_example(record: Record, tokenizer: Any, rules: Rules) -> Example | str:
    """The example of a record, or the reason (one of `REASONS`) why there is none.

    Text: all tokens are targets. It is dropped below min_length; it gets an eos, if it
    does not end in one, when it has fewer than max_length tokens, and is cut to
    max_length, without eos, otherwise (or dropped, if rules.cut_long is off).
    Conversations are never cut: outside [min_length, max_length] they are dropped; only
    the assistant's answers and their end markers are targets. Tokenised rows are taken
    as they are inside [min_length, max_length]; without labels all are targets.

    Raises:
      ValueError: a conversation without rules.chat_template, or a tokenizer that lacks
        what the rules need (eos, offsets, a template with generation marks).
    """
    if record.text is not None:
        return _of_text(record.text, tokenizer, rules)
    if record.turns is not None:
        made = chat.encode(record.turns, tokenizer, rules.chat_template)
        example = made if isinstance(made, str) else Example(*made)
    else:
        assert record.tokens is not None
        example = _of_tokens(*record.tokens, tokenizer)
    return example if isinstance(example, str) else _within(example, rules)


def shift(tokens: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """Labels int32 [n]: what token t predicts, `tokens[t + 1]` if that is a target.

    -100 where it is not, and at the last token, which predicts nothing
    (docs/specification.md section 3). The only place where labels are shifted.
    """
    labels = np.full(len(tokens), IGNORED, np.int32)
    labels[:-1] = np.where(labelled[1:], tokens[1:], IGNORED)
    return labels


def _of_text(text: str, tokenizer: Any, rules: Rules) -> Example | str:
    if not text.strip():
        return EMPTY
    # verbose=False: a text longer than the model's positions is no reason to warn.
    tokens = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)
    if len(tokens) < rules.min_length:
        return SHORTER
    if len(tokens) > rules.max_length and not rules.cut_long:
        return LONGER
    if len(tokens) >= rules.max_length:
        tokens = tokens[: rules.max_length]
    elif not len(tokens) or tokens[-1] != chat.eos_of(tokenizer):
        # Some tokenizers, and some texts, bring their own eos: one is enough.
        tokens = np.append(tokens, np.int32(chat.eos_of(tokenizer)))
    return Example(tokens, np.ones(len(tokens), bool))


def _of_tokens(
    tokens: np.ndarray, labels: np.ndarray | None, tokenizer: Any
) -> Example | str:
    if not len(tokens):
        return EMPTY
    if np.min(tokens) < 0 or np.max(tokens) >= len(tokenizer):
        return OTHER_VOCABULARY
    tokens = np.asarray(tokens, np.int32)
    if labels is None:
        return Example(tokens, np.ones(len(tokens), bool))
    if len(labels) != len(tokens):
        return LABELS_LENGTH
    labelled = np.asarray(labels) != IGNORED
    if not np.array_equal(tokens[labelled], np.asarray(labels)[labelled]):
        return OTHER_LABELS
    return Example(tokens, labelled) if labelled.any() else chat.NO_LABELS


def _within(example: Example, rules: Rules) -> Example | str:
    if len(example.tokens) < rules.min_length:
        return SHORTER
    return LONGER if len(example.tokens) > rules.max_length else example
