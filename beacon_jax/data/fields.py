"""Makes records of the rows of a source: fields become text, turns or tokens.

| fields                           | record                                            |
|----------------------------------|---------------------------------------------------|
| input_ids [, labels]             | tokens                                            |
| conversations: [{role, content}] | turns; messages is another name of it             |
| conversations: [{from, value}]   | turns (ShareGPT: human is user, gpt is assistant) |
| text                             | text                                              |
| instruction, output [, input]    | two turns (LongAlpaca); input on a line of its own|
| instruction, response [, context]| two turns (Dolly), likewise                       |
| prompt, completion               | two turns, or two lists of turns (TRL)            |
| prompt, response                 | two turns                                         |
| question, answer [, context]     | two turns; context as input                       |
| chapter, summary_text            | two turns (BookSum); the user's: BOOKSUM, chapter |
| content                          | text (files of source code)                       |

Other fields are ignored. The first line of the table whose fields are all in the row,
none of them null, decides. The content of a turn may be a list of {type: "text", text}.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.paths import RepeatedKeyError, single

# The release ships BookSum as finished conversations only, so its wording is not known.
BOOKSUM = "Summarize the following chapter.\n\n"
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}


class Record(NamedTuple):
    """One usable row; exactly one of text, turns and tokens is not None.

    Attributes:
      where: "folder/file.jsonl:17", the 1-based line or row of a file, relative to the
        source.
      turns: (role, content) in order; roles are "user", "assistant", "system".
      tokens: int32 [n] of a row that is tokenised, and its labels int32 [n] or None. A
        label of -100 is none. labels[t] belongs to token t, as in transformers: not
        shifted.
    """

    where: str
    text: str | None = None
    turns: tuple[tuple[str, str], ...] | None = None
    tokens: tuple[np.ndarray, np.ndarray | None] | None = None


class Dropped(NamedTuple):
    """A row, or a file, that was left out, and the reason in a few words."""

    where: str
    reason: str


class _BadField(Exception):
    """Raised for a field that cannot be used; its message is a Dropped's reason."""


def parse(where: str, data: bytes) -> Record | Dropped:
    """Makes the record of a row of UTF-8 JSON, or says why the row is dropped."""
    row = decoded(data)
    return Dropped(where, row) if isinstance(row, str) else record(where, row)


def decoded(data: bytes) -> dict[str, Any] | str:
    """Parses a row of UTF-8 JSON: returns its object, or the reason why it is none."""
    try:
        # Not json.loads(bytes), which guesses UTF-16 and UTF-32. A file's first row may
        # have a byte order mark in front.
        row = json.loads(data.decode("utf-8-sig"), object_pairs_hook=single)
    except UnicodeDecodeError:
        return "invalid UTF-8"
    except RepeatedKeyError:
        return "a key twice"
    except (ValueError, RecursionError):
        return "not JSON"
    if isinstance(row, list) and row and all(map(_says_who, row)):
        return {"messages": row}  # turns without a name for all of them
    return row if isinstance(row, dict) else "not an object"


def _says_who(turn: Any) -> bool:
    return isinstance(turn, dict) and bool({"role", "from"} & turn.keys())


def record(where: str, row: Any) -> Record | Dropped:
    """Makes the record of a row of fields, or says why the row is dropped.

    Strings may be bytes, and lists may be arrays.
    """
    if not isinstance(row, dict):
        return Dropped(where, "not an object")
    present = {key for key, value in row.items() if value is not None}
    for fields, make in _FORMS:
        if present.issuperset(fields):
            try:
                return make(where, row)
            except _BadField as error:
                return Dropped(where, str(error))
    if any(set(fields) <= row.keys() for fields, _ in _FORMS):
        return Dropped(where, "wrong type")
    return Dropped(where, UNKNOWN)


def _tokens(where: str, row: dict) -> Record:
    tokens = _integers(row["input_ids"])
    if not len(tokens):
        raise _BadField("empty")
    if tokens.min() < 0:
        raise _BadField("wrong type")
    labels = row.get("labels")
    if labels is not None:
        labels = _integers(labels)
        if len(labels) != len(tokens):
            raise _BadField("labels of another length")
    return Record(where, tokens=(tokens, labels))


def _integers(value: Any) -> np.ndarray:
    """Returns a list of integers as int32 [n]."""
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        raise _BadField("wrong type") from None
    if array.ndim == 1 and not array.size:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise _BadField("wrong type")
    limits = np.iinfo(np.int32)
    if array.min() < limits.min or array.max() > limits.max:
        raise _BadField("wrong type")
    return array.astype(np.int32)


def _conversation(where: str, row: dict) -> Record:
    turns = row["conversations" if row.get("conversations") is not None else "messages"]
    if isinstance(turns, dict):
        turns = _transposed(turns)
    if not isinstance(turns, list | tuple | np.ndarray):
        raise _BadField("wrong type")
    return _turns(where, tuple(_turn(turn) for turn in turns))


def _transposed(columns: dict) -> list[dict]:
    """Makes a list of turns from a dict of lists.

    TFDS and older Arrow files hold turns as a dict of lists.
    """
    lists = [
        value for value in columns.values() if isinstance(value, list | np.ndarray)
    ]
    if len(lists) != len(columns) or len({len(value) for value in lists}) > 1:
        raise _BadField("wrong type")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)
    ]


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise _BadField("wrong type")
    role, content = (
        turn.get(ours) if turn.get(ours) is not None else turn.get(theirs)
        for ours, theirs in (("role", "from"), ("content", "value"))
    )
    if role is None:
        raise _BadField("missing role")
    if content is None:
        raise _BadField("missing content")
    known = ROLES.get(_string(role))
    if known is None:
        raise _BadField("unknown role")
    return known, _content(content)


def _content(content: Any) -> str:
    """Returns the text of a turn, which may be a list of parts; only text is known."""
    if not isinstance(content, list | tuple | np.ndarray):
        return _string(content)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise _BadField("content that is no text")
        texts.append(_string(part.get("text")))
    return "".join(texts)


def _turns(where: str, turns: tuple[tuple[str, str], ...]) -> Record:
    if all(not content or content.isspace() for _, content in turns):
        raise _BadField("empty")
    return Record(where, turns=turns)


def _text(where: str, row: dict, *, field: str = "text") -> Record:
    return Record(where, text=_filled(row[field]))


def _pair(fields: tuple[str, str], more: str | None, where: str, row: dict) -> Record:
    """Makes two turns of two fields, or the turns of two lists of them.

    more: a field that the user's text may go on with.
    """
    asked, answered = (row[field] for field in fields)
    lists = [isinstance(x, list | tuple | np.ndarray) for x in (asked, answered)]
    if all(lists):
        return _turns(where, tuple(_turn(turn) for turn in [*asked, *answered]))
    user, added = _filled(asked), row.get(more)
    if added is not None and (added := _string(added)):
        user = f"{user}\n{added}"
    return _turns(where, (("user", user), ("assistant", _filled(answered))))


def _booksum(where: str, row: dict) -> Record:
    user = BOOKSUM + _filled(row["chapter"])
    return _turns(where, (("user", user), ("assistant", _filled(row["summary_text"]))))


def _string(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise _BadField("invalid UTF-8") from None
    if not isinstance(value, str):
        raise _BadField("wrong type")
    if "\0" in value:
        raise _BadField("NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # "\ud800" in JSON: tokenizers raise on it
            raise _BadField("lone surrogate") from None
    return value


def _filled(value: Any) -> str:
    value = _string(value)
    if not value or value.isspace():
        raise _BadField("empty")
    return value


def _lone_content(where: str, row: dict) -> Record:
    if row.get("role") is not None:
        raise _BadField("a turn without its conversation")
    return _text(where, row, field="content")


_FORMS: tuple[tuple[tuple[str, ...], Callable[[str, dict], Record]], ...] = (
    (("input_ids",), _tokens),
    (("conversations",), _conversation),
    (("messages",), _conversation),
    (("text",), _text),
    *(
        (fields, functools.partial(_pair, fields, more))
        for fields, more in (
            (("instruction", "output"), "input"),
            (("instruction", "response"), "context"),
            (("prompt", "completion"), None),
            (("prompt", "response"), None),
            (("question", "answer"), "context"),
        )
    ),
    (("chapter", "summary_text"), _booksum),
    (("content",), _lone_content),
)
UNKNOWN = "unknown fields (known: {})".format(
    ", ".join(" + ".join(fields) for fields, _ in _FORMS)
)
# Columns that are read from files that hold columns.
COLUMNS = frozenset(field for fields, _ in _FORMS for field in fields) | {
    "labels",
    "input",
    "context",
    "role",
}
