"""Turns conversations into tokens and marks the assistant's answers.

The rules are those of docs/specification.md section 6.

The whole conversation is written as one string and tokenised once; which tokens are
targets follows from where they lie in that string. The templates are those of the
release (fastchat's, with its system prompts and separators):

  qwen     <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
           <|im_start|>user\\nQ<|im_end|>\\n<|im_start|>assistant\\n[A<|im_end|>]\\n
  llama-3  <|start_header_id|>user<|end_header_id|>\\n\\nQ<|eot_id|>
           <|start_header_id|>assistant<|end_header_id|>\\n\\n[A<|eot_id|>]
  llama-2  [INST] Q [/INST][ A </s>]<s>
  mistral  [INST] Q [/INST][ A</s>]
  no       Q[ A eos]: one question and one answer without any marker
  hf       the tokenizer's own template, which must mark answers by {% generation %}

The line breaks above, and the brackets around the targets, are not part of the
templates. The tokenizer adds its own bos, as everywhere (`tokenise`).

A token may straddle the start of an answer, and is then treated as in the release. The
release counts the tokens of the text up to the answer. A token that begins in front of
the answer is therefore no target: for example "\\n\\n", made of a header's "\\n" and an
answer's "\\n". In `no` the release counts the tokens of the answer. There a token with
the first character of the answer is a target: for example " A".

The release's counting drifts where pieces tokenise differently alone: a question that
begins with a newline under qwen shifts its masks by one. The masks here stay right.
"""

import functools
import itertools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from transformers.utils.chat_template_utils import render_jinja_template

from beacon_jax.names import check_choice
from beacon_jax.tokenise import Place, encode_spans
from beacon_jax.tokenise import encode as encode_text

log = logging.getLogger(__name__)

NO_ASSISTANT = "no assistant turn"
EMPTY_TURN = "empty turn"
SAME_ROLE = "two turns of one role in a row"
UNKNOWN_ROLE = "unknown role"
MULTI_TURN = "more than one question for chat_template 'no'"
REFUSED = "refused by the chat template"
NO_LABELS = "no labelled token"
REASONS = (
    NO_ASSISTANT,
    EMPTY_TURN,
    SAME_ROLE,
    UNKNOWN_ROLE,
    MULTI_TURN,
    REFUSED,
    NO_LABELS,
)


class Format(NamedTuple):
    """The way a template writes a conversation, and the tokens it cannot do without.

    Attributes:
      answer: the four texts around that of an answer: in front and unlabelled, in front
        and labelled, behind and labelled, behind and unlabelled.
    """

    system: str
    question: tuple[str, str]
    answer: tuple[str, str, str, str]
    needs: tuple[str, ...]


FORMATS = {
    "qwen": Format(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        ("<|im_start|>user\n", "<|im_end|>\n"),
        ("<|im_start|>assistant\n", "", "<|im_end|>", "\n"),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama-3": Format(
        "",
        ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>", ""),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama-2": Format(
        "", ("[INST] ", " "), ("[/INST]", " ", " </s>", "<s>"), ("<s>", "</s>")
    ),
    "mistral": Format("", ("[INST] ", " "), ("[/INST]", " ", "</s>", ""), ("</s>",)),
}
TEMPLATES = (*FORMATS, "hf", "no")
TURN_ROLES = ("user", "assistant")
HF_ROLES = (*TURN_ROLES, "system", "tool")
Span = tuple[int, int]


def encode(
    turns: Sequence[tuple[str, str]], tokenizer: Any, template: str
) -> tuple[np.ndarray, np.ndarray] | str:
    """Tokenises a conversation and marks its targets, or says why it is dropped.

    Args:
      turns: (role, content) in order; those in front of the first of the user are left
        out (`not_written`). Roles are user and assistant in turn; `hf` leaves that to
        its template, which also gets system and tool.
      tokenizer: a fast tokenizer of transformers.
      template: one of TEMPLATES.

    Returns:
      The tokens int32 [n], and labelled bool [n], which marks the targets: the
      assistant's text and its end marker. One of REASONS if the conversation is to be
      dropped, perhaps with more behind a colon.

    Raises:
      ValueError: no template or an unknown one, or a tokenizer without its markers,
        without offsets, or, for `hf`, without a template that marks answers.
    """
    _check(tokenizer, template)
    turns = _from_first_question(turns, template)
    reason = _fault(turns, template)
    if reason:
        return reason
    if template == "hf":
        return _by_own_template(turns, tokenizer)
    if template == "no":
        return _plain(turns, tokenizer)
    text, spans = render(turns, template)
    return _tokenise(text, spans, tokenizer, from_start=True)


def render(turns: Sequence[tuple[str, str]], template: str) -> tuple[str, list[Span]]:
    """Returns a conversation's text and the character ranges of its targets.

    A range is [start, stop).
    """
    form = FORMATS[template]
    text, spans = form.system, []
    for role, content in turns:
        if role == "user":
            text += form.question[0] + content + form.question[1]
            continue
        head, before, after, tail = form.answer
        start = len(text) + len(head)
        text += head + before + content + after
        spans.append((start, len(text)))
        text += tail
    return text, spans


def eos_of(tokenizer: Any) -> int:
    """Returns the id of the eos token.

    Raises:
      ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r} has no eos token; set eos_token in "
            "its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _check(tokenizer: Any, template: str) -> None:
    if not template:
        raise ValueError(
            "data.chat_template='' but the data holds conversations; set it to one of "
            f"{', '.join(TEMPLATES)}"
        )
    check_choice("data.chat_template", template, TEMPLATES)
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer={name!r} is a {type(tokenizer).__name__}, which cannot say "
            "where in the text a token lies; conversations need a tokenizer.json"
        )
    if template == "no":
        eos_of(tokenizer)
    elif template == "hf":
        _own_template(tokenizer)
    else:
        missing = [m for m in FORMATS[template].needs if not _has(tokenizer, m)]
        if missing:
            raise ValueError(
                f"data.chat_template={template!r} needs {' '.join(missing)}, which "
                f"tokenizer={name!r} does not have; use the template of its model, "
                "'hf' or 'no'"
            )


def _has(tokenizer: Any, token: str) -> bool:
    found = tokenizer.convert_tokens_to_ids(token)
    return found is not None and (
        found != tokenizer.unk_token_id or token == tokenizer.unk_token
    )


def not_written(turns: Sequence[tuple[str, str]], template: str) -> list[str]:
    """Names what `encode` leaves out in front of the user's first turn."""
    kept = len(_from_first_question(turns, template))
    roles = {role for role, words in turns[: len(turns) - kept] if words.strip()}
    return [
        f"{role} turns in front of the user's (chat_template={template})"
        for role in sorted(roles)
    ]


def _from_first_question(
    turns: Sequence[tuple[str, str]], template: str
) -> list[tuple[str, str]]:
    """Returns the turns from the user's first on; `hf` also has the system's."""
    asks = [role == "user" for role, _ in turns]
    first = asks.index(True) if True in asks else len(turns)
    if template == "hf" and first and turns[first - 1][0] == "system":
        first -= 1
    return list(turns[first:])


def _fault(turns: list[tuple[str, str]], template: str) -> str:
    """Returns the reason why these turns cannot be written, or ""."""
    roles = [role for role, _ in turns]
    known = HF_ROLES if template == "hf" else TURN_ROLES
    for role in roles:
        if role not in known:
            hint = "" if role not in HF_ROLES else "; data.chat_template=hf may"
            return f"{UNKNOWN_ROLE}: {template} writes no turns of {role}{hint}"
    if "assistant" not in roles:
        return NO_ASSISTANT
    if any(not content for _, content in turns):
        return EMPTY_TURN
    if template != "hf" and any(a == b for a, b in itertools.pairwise(roles)):
        return SAME_ROLE
    return MULTI_TURN if template == "no" and len(turns) > 2 else ""


def _plain(
    turns: list[tuple[str, str]], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray] | str:
    (_, question), (_, answer) = turns
    # As the release does: whatever the tokenizer cannot hold is lost here already.
    question = tokenizer.decode(
        encode_text(tokenizer, question, "start").tolist(), skip_special_tokens=True
    )
    answer = " " + answer + tokenizer.eos_token
    start = len(question) + len(answer) - len(answer.lstrip())
    text = question + answer
    return _tokenise(text, [(start, len(text))], tokenizer)


def _by_own_template(
    turns: list[tuple[str, str]], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray] | str:
    # What tokenizer.apply_chat_template(return_assistant_tokens_mask=True) does, except
    # that it stops marking, silently, at an answer that begins with a space under a
    # tokenizer that leaves spaces out of its offsets (Llama-3).
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        # Its annotation says str; it returns texts and their spans.
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=_own_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"data.chat_template='hf' but the chat template of tokenizer="
            f"{tokenizer.name_or_path!r} is no jinja template: {error.message} (line "
            f"{error.lineno}). Mend it, or use one of {', '.join(FORMATS)}."
        ) from None
    except ValueError:  # of `_own_template`
        raise
    except Exception as error:  # a template is a program of the user's
        _warn_once(f"{REFUSED}: {error}")
        return REFUSED
    (text,), (spans,) = rendered
    return _tokenise(text, spans, tokenizer, at="bare")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _own_template(tokenizer: Any) -> str:
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"data.chat_template='hf' but tokenizer={name!r} has no chat template; use "
            f"one of {', '.join(FORMATS)} or add a chat_template.jinja to it"
        )
    template = tokenizer.get_chat_template()
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            f"data.chat_template='hf' but the chat template of tokenizer={name!r} does "
            "not say which text is the assistant's; put {% generation %} and "
            "{% endgeneration %} around an answer and its end marker in it, or use one "
            f"of {', '.join(FORMATS)}"
        )
    return template


def _tokenise(
    text: str,
    spans: list[Span],
    tokenizer: Any,
    *,
    from_start: bool = False,
    at: Place = "start",
) -> tuple[np.ndarray, np.ndarray] | str:
    """Tokenises the text; targets are the tokens that overlap a span.

    Args:
      from_start: a token that begins in front of a span is no target.
    """
    encoded = encode_spans(tokenizer, text, at)
    start, stop = encoded.spans.T
    # Spaces are left out of some tokenizers' offsets; a token of spaces only is then
    # empty and lies at their end. Give it the place behind the token before it.
    before = np.maximum.accumulate(np.append(0, stop[:-1]))
    start = np.where(start == stop, np.minimum(start, before), start)
    labelled = np.zeros(len(start), bool)
    for first, last in spans:
        inside = start >= first if from_start else stop > first
        labelled |= inside & (start < last)
    if not labelled.any():
        return NO_LABELS
    return encoded.ids, labelled
