"""Writes conversations by the model's chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from beacon_jax.inference.validate import shown
from beacon_jax.tokenise import encode

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model


def check_template(tokenizer: Any, template: str | None = None) -> None:
    """Raises ValueError, with what to do, if there is nothing to write turns with.

    Args:
      template: jinja text in place of the tokenizer's own.
    """
    if tokenizer is None:
        raise ValueError(
            "tokenizer=None: a conversation is text. Put the tokenizer files into "
            "the model's folder."
        )
    if not (template or tokenizer.chat_template):
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, base "
            "models have none: give the prompt as it is, without instruct=True "
            "(--instruct), or the jinja text by chat_template=... "
            "(--chat_template=FILE), or add a chat_template.jinja to its folder."
        )


def encode_turns(
    model: "Model",
    messages: Sequence[dict[str, str]],
    *,
    template: str | None = None,
    first: bool = True,
    after: int | str | None = None,
    answers: bool = True,
) -> np.ndarray:
    """Returns the tokens [n] of a conversation up to where the next answer begins.

    Args:
      messages: [{"role": ..., "content": ...}].
      template: jinja text in place of the tokenizer's own.
      first, after: as in `Model.encode`. A context in front has a bos, so the
        template's is left out behind one.
      answers: if not, they end with the last message instead.

    Raises:
      ValueError: no template, one that refuses the conversation, or a token that the
        model has no embedding of.
    """
    tokenizer = model.tokenizer
    check_template(tokenizer, template)
    text = written(tokenizer, messages, template, answers=answers)
    # The template writes the special tokens itself.
    if not first:
        text = text.removeprefix(tokenizer.bos_token or "")
    ids = encode(tokenizer, text, "bare" if first else "behind", after)
    return model.encode(ids, "the conversation", first=first)


def try_template(
    tokenizer: Any, messages: Sequence[dict[str, str]], template: str | None
) -> None:
    """Writes a first message by the template, to find one that cannot be used.

    Args:
      messages: those in front of it.
      template: jinja text in place of the tokenizer's own.

    Raises:
      ValueError: no template, or one that is broken or refuses this.
    """
    check_template(tokenizer, template)
    written(tokenizer, [*messages, {"role": "user", "content": "Hello"}], template)


def written(
    tokenizer: Any,
    messages: Sequence[dict[str, str]],
    template: str | None = None,
    *,
    answers: bool = True,
    thinks: bool = True,
) -> str:
    """Writes a conversation by a template.

    Args:
      template: jinja text in place of the tokenizer's own.
      answers: the next answer begins at its end; if not, the last message goes on.
      thinks: the answer may begin with thoughts, if that is what the template's model
        does; if not, templates that know `enable_thinking` (Qwen3's) leave them out.

    Raises:
      ValueError: the template is broken, or refuses the conversation.
    """
    # A broken template may raise anything: it is a program of the user's.
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=answers,
            continue_final_message=not answers,
            **({} if thinks else {"enable_thinking": False}),
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{_named(tokenizer, template)} is no jinja template: {error.message} "
            f"(line {error.lineno}). {_remedy(tokenizer, template)}"
        ) from None
    except Exception as error:
        if type(error) is jinja2.TemplateError:  # of its own raise_exception
            said = f"{_named(tokenizer, template)} refuses this: {error}"
            raise ValueError(said if said.endswith(".") else f"{said}.") from None
        raise ValueError(
            f"{_named(tokenizer, template)} cannot write a conversation: {error!r}. "
            f"{_remedy(tokenizer, template)}"
        ) from error


def _remedy(tokenizer: Any, template: str | None) -> str:
    """Says which file has a template that is broken, and what to do."""
    if template is not None:
        return "Mend it, or leave it out for that of the tokenizer."
    folder = Path(getattr(tokenizer, "name_or_path", ""))
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    file = next((x for x in (folder / n for n in names) if x.is_file()), folder)
    return (
        f"Mend it in {file}, or copy that file from the model it is of, or give "
        "another template by chat_template=... (--chat --chat_template=FILE)."
    )


def _named(tokenizer: Any, template: str | None) -> str:
    if template is None:
        folder = getattr(tokenizer, "name_or_path", "")
        return "the tokenizer's chat template" + (f" (of {folder})" if folder else "")
    return f"chat_template={shown(template)}"


def encode_question(
    model: "Model", text: Any, *, first: bool, after: int | str | None = None
) -> np.ndarray:
    """Returns the tokens [n] of one question in the template, up to its answer.

    Args:
      first, after: as in `encode_turns`.

    Raises:
      ValueError: not a text, no template, or one that refuses it.
    """
    if not isinstance(text, str):
        raise ValueError(
            f"instruct=True with a prompt of type {type(text).__name__}: the chat "
            "template is for text. Give a str, or leave instruct out."
        )
    turns = [{"role": "user", "content": text}]
    return encode_turns(model, turns, first=first, after=after)


def turn_ends(model: "Model", stop: str | Sequence[str] = ()) -> list[str]:
    """Returns `stop` and the end of a turn.

    Chat models end a turn by a token that config.json may not name.
    """
    ends = [stop] if isinstance(stop, str) else list(stop)
    tokenizer = model.tokenizer
    if tokenizer.eos_token_id not in (None, *model.config.eos_ids):
        ends.append(tokenizer.eos_token)
    return ends


def ended_at_once(model: "Model", *, instruct: bool) -> str:
    """Says why an answer has no token, and what to do."""
    text = "the model ended at once: its first token was an end token"
    has = model.tokenizer is not None and model.tokenizer.chat_template
    if has and not instruct:
        return f"{text}. Instruct models expect --instruct (instruct=True)"
    return text
