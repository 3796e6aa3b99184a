"""Makes turns and texts of what data sets call a conversation, a question, an answer.

A turn is a dict with who speaks (WHO) and what (WORDS). The words may be a list of
parts of text. Roles are read in any case.
"""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.names import short

WHO = ("role", "from")
WORDS = ("content", "value", "text")
_USED = {*WHO, *WORDS}
ROLES = {
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "ai", "bot", "model", "bard", "bing", "claude"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "ipython"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_GPT = re.compile(r"(chat)?gpt[-\w.]*")  # gpt, ChatGPT, gpt-4, gpt-3.5-turbo
# Types of parts that are text.
_TEXTS = ("text", "input_text", "output_text")
KNOWN_ROLES = ", ".join((*_ROLE_OF, "gpt", "gpt-4, ..."))
SHOWN = 8  # names that a reason lists

Turn = tuple[str, str]


class Turns(NamedTuple):
    """Turns of a row, and which of its fields are not in them."""

    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()


class BadField(Exception):
    """Raised for a field that cannot be used; its message is a Dropped's reason."""


def listed(names: Iterable[object]) -> str:
    """Lists the first names of fields, in quotes, for a reason."""
    every = [repr(short(str(name))) for name in names]
    more = len(every) - SHOWN
    return (", ".join(every[:SHOWN]) + (f", {more} more" if more > 0 else "")) or "none"


def has(value: Any) -> bool:
    """Tells whether a field holds anything: not null, blank or an empty list."""
    if value is None:
        return False
    if isinstance(value, str | bytes):
        return bool(value.strip())
    return not isinstance(value, list | tuple | dict | np.ndarray) or len(value) > 0


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def unquoted(value: Any) -> Any:
    """Returns the list or object that a text holds as JSON, as in CSV.

    All else is returned as it is.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


@functools.lru_cache(maxsize=1024)
def role_of(name: str) -> str | None:
    """Returns user, assistant, system or tool; None: the name of no role."""
    given = name.strip().lower()
    return "assistant" if _GPT.fullmatch(given) else _ROLE_OF.get(given)


def says_who(turn: Any) -> bool:
    """Tells whether a value is a turn: a dict with a role."""
    return isinstance(turn, dict) and any(name in turn for name in WHO)


def conversation(field: str, value: Any) -> Turns:
    """Makes turns of a list of them, of one as JSON, or of a dict of lists."""
    value = unquoted(value)
    if isinstance(value, dict):
        value = _transposed(value)
    if isinstance(value, str):
        raise BadField(f"wrong type: {field} is text, not a list of turns")
    if not is_list(value):
        raise BadField("wrong type")
    extra = {
        f"{field}[].{name}"
        for turn in value
        if isinstance(turn, dict)
        for name in turn.keys() - _USED
        if has(turn[name])
    }
    return Turns(tuple(map(_turn, value)), tuple(sorted(extra)))


def _transposed(columns: dict) -> list[dict]:
    """Makes a list of turns from a dict of lists.

    TFDS and older Arrow files hold turns as a dict of lists.
    """
    lists = [value for value in columns.values() if is_list(value)]
    if len(lists) != len(columns) or len({len(value) for value in lists}) > 1:
        raise BadField("wrong type")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)
    ]


def _turn(turn: Any) -> Turn:
    if isinstance(turn, str):
        raise BadField("missing role: a turn is text, without who says it")
    if not isinstance(turn, dict):
        raise BadField("wrong type")
    role, words = _first(turn, WHO), _first(turn, WORDS)
    if role is None:
        raise BadField(_missing("role", turn, WHO))
    if words is None:
        raise BadField(_missing("content", turn, WORDS))
    known = role_of(string(role))
    if known is None:
        raise BadField(f"unknown role: {short(repr(role))} (known: {KNOWN_ROLES})")
    return known, content(words)


def _first(turn: dict, names: Sequence[str]) -> Any:
    for name in names:
        if (value := turn.get(name)) is not None:
            return value
    return None


def _missing(what: str, turn: dict, known: Sequence[str]) -> str:
    there = listed(name for name, value in turn.items() if value is not None)
    return f"missing {what}: a turn has {there} (known: {', '.join(known)})"


def content(value: Any) -> str:
    """Returns the words of a turn, which may be a list of parts; only text is known."""
    if not is_list(value):
        return string(value)
    texts = []
    for part in value:
        if isinstance(part, dict):
            kind = part.get("type", "text")
            if not isinstance(kind, str) or kind not in _TEXTS:
                raise BadField(f"content that is no text: {short(repr(kind))}")
            part = part.get("text")
        texts.append(string(part))
    return "".join(texts)


def asked(field: str, value: Any) -> Turns:
    """Makes a turn of a question, or the turns that it is a list of."""
    value = unquoted(value)
    if is_list(value):
        return conversation(field, value)
    return Turns((("user", filled(value)),))


def said(field: str, value: Any) -> Turns:
    """Makes a turn of an answer, or the turns that it is a list of.

    Of several answers that are all right (SQuAD, with or without their places) the
    first is taken, and "FIELD[1:]" is not read.
    """
    value, unread = unquoted(value), ()
    while not isinstance(value, str | bytes):
        if isinstance(value, dict):
            value = _first(value, WORDS)
            if value is None:
                raise BadField("wrong type")
        elif not is_list(value):
            raise BadField("wrong type")
        elif len(value) and all(map(says_who, value)):
            return conversation(field, value)
        elif len(value) and all(isinstance(x, dict) and "type" in x for x in value):
            value = content(value)
        elif not len(value):
            raise BadField("empty")
        else:
            if any(x != value[0] for x in value[1:]):
                unread = (f"{field}[1:]",)
            value = value[0]
    return Turns((("assistant", filled(value)),), unread)


def before(value: Any) -> tuple[Turn, ...]:
    """Makes turns of what was said before: pairs of question and answer, or turns."""
    value = unquoted(value)
    if not is_list(value):
        raise BadField("wrong type: history is no list of turns or pairs")
    if all(map(says_who, value)):
        return conversation("history", value).turns
    turns: list[Turn] = []
    for pair in value:
        if not is_list(pair) or len(pair) != 2:
            raise BadField("wrong type: history is no list of turns or pairs")
        turns += [("user", string(pair[0])), ("assistant", string(pair[1]))]
    return tuple(turns)


def string(value: Any) -> str:
    """Returns a text that a tokenizer can take, of a str or of bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadField("invalid UTF-8") from None
    if not isinstance(value, str):
        raise BadField("wrong type")
    if "\0" in value:
        raise BadField("NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" in JSON: tokenizers raise on it
            raise BadField("lone surrogate") from None
    return value


def filled(value: Any) -> str:
    """Returns a text that is not blank."""
    value = string(value)
    if not value or value.isspace():
        raise BadField("empty")
    return value
