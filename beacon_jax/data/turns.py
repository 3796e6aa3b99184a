"""Makes turns and texts of what data sets call a conversation, a question, an answer.

A turn is a dict with who speaks (WHO) and what (WORDS). The words may be a list of
parts of text. Roles are read in any case.
"""

import ast
import functools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.names import short
from beacon_jax.paths import RepeatedKeyError, single

WHO = ("role", "from")
WORDS = ("content", "value", "text")
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
LITERAL = 2**20  # characters of Python that are read; it takes 100 bytes for each
# What only answers of data sets have: SQuAD's and TriviaQA's.
_ANSWERS = ("answer_start", "aliases")
# A list of turns as str() of a numpy array writes it, without commas, or a part of it.
_TURNS = re.compile(r"""\s*\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")

Turn = tuple[str, str]


class Turns(NamedTuple):
    """Turns of a row, and which of its fields are not in them.

    Attributes:
      text: whether they are one text, which others may go on with.
    """

    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()
    text: bool = False


class Cell(str):
    """A text of a file that has nothing but texts (CSV): it may spell a list."""


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


def kind(value: Any) -> str:
    """Says what a value is, in the words of JSON."""
    known: tuple[tuple[Any, str], ...] = (
        (type(None), "null"),
        (str | bytes, "text"),
        (bool | np.bool_, "true or false"),
        (int | float | np.number, "a number"),
        (list | tuple | np.ndarray, "a list"),
        (dict, "an object"),
    )
    names = (name for types, name in known if isinstance(value, types))
    return next(names, f"a {type(value).__name__}")


def unquoted(value: Any) -> Any:
    """Returns the list or object that a text spells, as JSON or as Python does.

    All else is returned as it is. For fields that are nothing but lists: an answer in
    JSON is a text.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value, object_pairs_hook=single)
    except RepeatedKeyError:
        raise BadField("a key twice") from None
    except (ValueError, RecursionError):
        return _python(value)


def _python(text: str) -> Any:
    """Returns the list or dict whose repr a text is, as pandas writes CSV."""
    if len(text) > LITERAL:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            made = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text
    return made if isinstance(made, list | dict) else text


def spelt(field: str, value: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns what a text, a question or an answer is, and what of it is not read.

    A cell of CSV that spells turns, or the answers of a data set, is these. Other
    lists and objects stay texts, since an answer may be one; "FIELD as a list" is then
    not read.

    Raises:
      BadField: turns or answers that are neither JSON nor Python.
    """
    if not isinstance(value, Cell):
        return value, ()
    found = unquoted(value)
    if isinstance(found, str):
        arrays = "array([" in value and "dtype=" in value
        if arrays or _TURNS.match(value):
            raise BadField(
                f"wrong type: {field} is a list or object in the text of a Python "
                "program: write the rows to .jsonl, or the field by json.dumps"
            )
        return value, ()
    turns = is_list(found) and len(found) > 0 and all(map(says_who, found))
    answer = isinstance(found, dict) and any(name in found for name in _ANSWERS)
    if turns or answer or field == "answers":
        return found, ()
    return value, (f"{field} as {kind(found)}",) if has(found) else ()


@functools.lru_cache(maxsize=1024)
def role_of(name: str) -> str | None:
    """Returns user, assistant, system or tool; None: the name of no role."""
    given = name.strip().lower()
    return "assistant" if _GPT.fullmatch(given) else _ROLE_OF.get(given)


def says_who(turn: Any) -> bool:
    """Tells whether a value is a turn: a dict with a role."""
    return isinstance(turn, dict) and any(name in turn for name in WHO)


def conversation(field: str, value: Any) -> Turns:
    """Makes turns of a list of them, of one that is spelt, or of a dict of lists."""
    value = unquoted(value)
    if isinstance(value, dict):
        value = _transposed(field, value)
    if not is_list(value):
        raise BadField(f"wrong type: {field} is {kind(value)}, not a list of turns")
    extra = {
        f"{field}[].{name}"
        for turn in value
        if isinstance(turn, dict)
        for name in _besides(turn)
    }
    turns = tuple(_turn(field, turn) for turn in value)
    return Turns(turns, tuple(sorted(extra)))


def _besides(turn: dict) -> list[str]:
    """Lists what a turn has besides who speaks and what, which may be there twice."""
    role, words = _first(turn, WHO), _first(turn, WORDS)
    used = {name: role for name in WHO} | {name: words for name in WORDS}
    return [
        name
        for name, value in turn.items()
        if has(value) and not (name in used and _same(value, used[name]))
    ]


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) is str and one == other)


def _transposed(field: str, columns: dict) -> list[dict]:
    """Makes a list of turns from a dict of lists.

    TFDS and older Arrow files hold turns as a dict of lists.
    """
    lists = [value for value in columns.values() if is_list(value)]
    if len(lists) != len(columns) or len({len(value) for value in lists}) > 1:
        raise BadField(f"wrong type: {field} is an object, not a list of turns")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)
    ]


def _turn(field: str, turn: Any) -> Turn:
    if isinstance(turn, str):
        raise BadField("missing role: a turn is text, without who says it")
    if not isinstance(turn, dict):
        raise BadField(f"wrong type: {field}[] is {kind(turn)}, not an object")
    role, words = _first(turn, WHO), _first(turn, WORDS)
    if role is None:
        raise BadField(_missing("role", turn, WHO))
    if words is None:
        raise BadField(_missing("content", turn, WORDS))
    known = role_of(string(f"{field}[].role", role))
    if known is None:
        raise BadField(f"unknown role: {short(repr(role))} (known: {KNOWN_ROLES})")
    return known, content(f"{field}[].content", words)


def _first(turn: dict, names: Sequence[str]) -> Any:
    for name in names:
        if (value := turn.get(name)) is not None:
            return value
    return None


def _missing(what: str, turn: dict, known: Sequence[str]) -> str:
    there = listed(name for name, value in turn.items() if value is not None)
    return f"missing {what}: a turn has {there} (known: {', '.join(known)})"


def content(field: str, value: Any) -> str:
    """Returns the words of a turn, which may be a list of parts; only text is known."""
    if not is_list(value):
        return string(field, value)
    texts = []
    for part in value:
        if isinstance(part, dict):
            what = part.get("type", "text")
            if not isinstance(what, str) or what not in _TEXTS:
                raise BadField(f"content that is no text: {short(repr(what))}")
            part = part.get("text")
        texts.append(string(f"{field}[]", part))
    return "".join(texts)


def asked(field: str, value: Any) -> Turns:
    """Makes a turn of a question, or the turns that it is a list of."""
    value, unread = spelt(field, value)
    if is_list(value):
        return conversation(field, value)
    return Turns((("user", filled(field, value)),), unread, text=True)


def said(field: str, value: Any) -> Turns:
    """Makes a turn of an answer, or the turns that it is a list of.

    Of several answers that are all right (SQuAD, with or without their places) the
    first is taken, and "FIELD[1:]" is not read.
    """
    value, unread = spelt(field, value)
    while not isinstance(value, str | bytes):
        if isinstance(value, dict):
            there = listed(value)
            value = _first(value, WORDS)
            if value is None:
                known = ", ".join(WORDS)
                raise BadField(f"wrong type: {field} has {there} (known: {known})")
        elif not is_list(value):
            raise BadField(f"wrong type: {field} is {kind(value)}, not text")
        elif len(value) and all(map(says_who, value)):
            return conversation(field, value)
        elif len(value) and all(isinstance(x, dict) and "type" in x for x in value):
            value = content(field, value)
        elif not len(value):
            raise BadField("empty")
        else:
            if any(x != value[0] for x in value[1:]):
                unread = (f"{field}[1:]",)
            value = value[0]
    return Turns((("assistant", filled(field, value)),), unread)


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
        question, answer = (string("history[]", text) for text in pair)
        turns += [("user", question), ("assistant", answer)]
    return tuple(turns)


def string(field: str, value: Any) -> str:
    """Returns a text that a tokenizer can take, of a str or of bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise BadField("invalid UTF-8") from None
    if not isinstance(value, str):
        raise BadField(f"wrong type: {field} is {kind(value)}, not text")
    if "\0" in value:
        raise BadField("NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" in JSON: tokenizers raise on it
            raise BadField("lone surrogate") from None
    return str(value)  # not a Cell


def filled(field: str, value: Any) -> str:
    """Returns a text that is not blank."""
    value = string(field, value)
    if not value or value.isspace():
        raise BadField("empty")
    return value
