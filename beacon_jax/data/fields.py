"""Makes records of the rows of a source: fields become text, turns or tokens.

| fields                              | record                                         |
|-------------------------------------|------------------------------------------------|
| input_ids [, labels]                | tokens                                         |
| conversations, messages,            | turns: a list of {role, content}, of ShareGPT's|
| conversation, dialog or dialogue    | {from, value}, or the same in JSON or Python   |
| text                                | text                                           |
| instruction, output (or response)   | two turns (LongAlpaca, Dolly)                  |
| prompt, completion (or response)    | two turns; either may be a list of turns (TRL) |
| question, answer, answers or        | two turns; SQuAD's {"text": [...]} also: the   |
| response                            | first of several answers                       |
| query, response                     | two turns                                      |
| problem, solution                   | two turns                                      |
| inputs, targets                     | two turns                                      |
| input, output                       | two turns                                      |
| chapter, summary_text               | two turns (BookSum); the user's: BOOKSUM,      |
|                                     | chapter                                        |
| content                             | text (files of source code)                    |

With two turns, `input` and `context` go on with the user's text, on lines of their own;
the turns of `history` come before. `system` (or system_prompt) is the first turn, also
of a list of turns. The first line of the table whose fields all hold something decides.
Names are read in any case. What else a row holds is not read, and is counted by name
(`Record.unread`). What a turn may be is in `turns`. A question and an answer are texts
as they stand, also if they are JSON; only a cell of CSV may spell turns or answers.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from beacon_jax.data.turns import (
    BadField,
    Turn,
    asked,
    before,
    conversation,
    filled,
    has,
    is_list,
    kind,
    listed,
    role_of,
    said,
    says_who,
    spelt,
    string,
    unquoted,
)
from beacon_jax.names import short
from beacon_jax.paths import RepeatedKeyError, single

# The release ships BookSum as finished conversations only, so its wording is not known.
BOOKSUM = "Summarize the following chapter.\n\n"
CONVERSATIONS = ("conversations", "messages", "conversation", "dialog", "dialogue")
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "answers"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("inputs", "targets"),
    ("input", "output"),
)
MORE = ("input", "context")  # what a question may go on with
SYSTEM = ("system", "system_prompt")
NAMED = 20  # fields that a line names
INVALID = "invalid UTF-8"
# A string, which stays, or a comma in front of the end of what it is in.
_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+(?:"|\\?\Z))|,(?=\s*(?:[}\]]|\Z))', re.DOTALL)


class Record(NamedTuple):
    """One usable row; exactly one of text, turns and tokens is not None.

    Attributes:
      where: "folder/file.jsonl:17", the 1-based line or row of a file, relative to the
        source.
      turns: (role, content) in order; roles are "user", "assistant", "system", "tool".
      tokens: int32 [n] of a row that is tokenised, and its labels int32 [n] or None. A
        label of -100 is none. labels[t] belongs to token t, as in transformers: not
        shifted.
      unread: names of what the row holds besides, "messages[].weight" of turns.
    """

    where: str
    text: str | None = None
    turns: tuple[Turn, ...] | None = None
    tokens: tuple[np.ndarray, np.ndarray | None] | None = None
    unread: tuple[str, ...] = ()


class Dropped(NamedTuple):
    """A row, or a file, that was left out, and the reason in a few words.

    What stands in front of a colon is one of few; what is behind says more.
    """

    where: str
    reason: str


class Shape(NamedTuple):
    """Fields that a row has, what becomes of them, and others that are used then."""

    fields: tuple[str, ...]
    make: Callable[[tuple[str, ...], dict], Record]
    more: tuple[str, ...] = ()


def parse(where: str, data: bytes) -> Record | Dropped:
    """Makes the record of a row of UTF-8 JSON, or says why the row is dropped."""
    row = decoded(data)
    return Dropped(where, row) if isinstance(row, str) else record(where, row)


def decoded(data: bytes) -> dict[str, Any] | str:
    """Parses a row of UTF-8 JSON: returns its object, or the reason why it is none.

    Commas behind the last field, and behind the row, are left out.
    """
    try:
        # Not json.loads(bytes), which guesses UTF-16 and UTF-32. A file's first row may
        # have a byte order mark in front.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return INVALID
    try:
        try:
            row = json.loads(text, object_pairs_hook=single)
        except ValueError:
            mended = _COMMA.sub(lambda found: found[1] or "", text)
            if mended == text:
                raise
            row = json.loads(mended, object_pairs_hook=single)
    except RepeatedKeyError:
        return "a key twice"
    except (ValueError, RecursionError):
        quotes = re.match(r"\s*[{\[]\s*'", text)
        return "not JSON" + (": quotes must be double (json.dumps)" if quotes else "")
    if is_list(row) and row and all(map(says_who, row)):
        return {"messages": row}  # turns without a name for all of them
    return row if isinstance(row, dict) else "not an object"


def record(where: str, row: Any) -> Record | Dropped:
    """Makes the record of a row of fields, or says why the row is dropped.

    Strings may be bytes, and lists may be arrays.
    """
    if not isinstance(row, dict):
        return Dropped(where, "not an object")
    if not all(name.islower() for name in row):
        lower: dict[str, Any] = {}
        for name, value in row.items():
            if not has(value) and name.lower() in lower:
                continue
            if has(lower.get(name.lower())) and name.lower() in COLUMNS:
                return Dropped(where, f"a key twice: {short(name)!r} in two cases")
            lower[name.lower()] = value
        row = lower
    there = {name for name, value in row.items() if has(value)}
    try:
        # Blank fields decide only if nothing else is there.
        for names in (there, {name for name, x in row.items() if x is not None}):
            for shape in SHAPES:
                if names.issuperset(shape.fields) and _suits(shape, row):
                    made = shape.make(shape.fields, row)
                    extra = there - {*shape.fields, *shape.more} | {*made.unread}
                    return made._replace(where=where, unread=tuple(sorted(extra)))
    except BadField as error:
        return Dropped(where, str(error))
    for name in CONVERSATIONS:
        if name in there:  # a text
            return Dropped(where, f"wrong type: {name} is text, not a list of turns")
    for shape in SHAPES:
        if row.keys() >= set(shape.fields):
            empty = next((x for x in shape.fields if row[x] is None), shape.fields[0])
            return Dropped(where, f"wrong type: {empty} is {kind(row[empty])}")
    return Dropped(where, unknown(row))


def unknown(names: Iterable[object]) -> str:
    """Returns the reason to leave out a row or file of these fields."""
    return f"{UNKNOWN}: it has {listed(names)} (known: {KNOWN})"


def not_read(counts: dict[str, int]) -> str:
    """Lists what was not read, most first, with its number of rows."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    more = len(names) - NAMED
    rest = f" and {more} more" if more > 0 else ""
    made = (f"{short(name)} ({counts[name]:,} rows)" for name in names[:NAMED])
    return ", ".join(made) + rest


def _suits(shape: Shape, row: dict) -> bool:
    """Tells whether a field of turns holds some: a text of that name does not."""
    name = shape.fields[0]
    return name not in CONVERSATIONS or not isinstance(unquoted(row[name]), str | bytes)


def _tokens(fields: tuple[str, ...], row: dict) -> Record:
    tokens = _integers("input_ids", row["input_ids"])
    if not len(tokens):
        raise BadField("empty")
    if tokens.min() < 0:
        raise BadField("wrong type: input_ids has negative numbers")
    labels = row.get("labels")
    if labels is not None:
        labels = _integers("labels", labels)
        if len(labels) != len(tokens):
            raise BadField("labels of another length")
    return Record("", tokens=(tokens, labels))


def _integers(field: str, value: Any) -> np.ndarray:
    """Returns a list of integers as int32 [n]."""
    wrong = BadField(f"wrong type: {field} is no list of whole numbers of 32 bits")
    try:
        array = np.asarray(unquoted(value))
    except ValueError:  # ragged
        raise wrong from None
    if array.ndim == 1 and not array.size:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise wrong
    limits = np.iinfo(np.int32)
    if array.min() < limits.min or array.max() > limits.max:
        raise wrong
    return array.astype(np.int32)


def _conversation(fields: tuple[str, ...], row: dict) -> Record:
    made = conversation(fields[0], row[fields[0]])
    return _with_system(row, made.turns, made.unread)


def _with_system(row: dict, turns: tuple[Turn, ...], unread: Sequence[str]) -> Record:
    """Puts what the row has for the system in front, if the turns do not begin so."""
    names = [name for name in SYSTEM if has(row.get(name))]
    if names and (not turns or turns[0][0] != "system"):
        name = names.pop(0)
        turns = (("system", string(name, row[name])), *turns)
    return _turns(turns, (*unread, *names))


def _turns(turns: tuple[Turn, ...], unread: tuple[str, ...] = ()) -> Record:
    if all(not content or content.isspace() for _, content in turns):
        raise BadField("empty")
    return Record("", turns=turns, unread=unread)


def _text(fields: tuple[str, ...], row: dict) -> Record:
    role = row.get("role")
    if isinstance(role, str | bytes) and role_of(string("role", role)):
        raise BadField("a turn without its conversation")
    value, unread = spelt(fields[0], row[fields[0]])
    return Record("", text=filled(fields[0], value), unread=unread)


def _pair(fields: tuple[str, ...], row: dict) -> Record:
    """Makes turns of a question and an answer, or of lists of turns.

    The system's turn and the history stand in front.
    """
    question, answer = (
        make(name, row[name]) for make, name in zip((asked, said), fields, strict=True)
    )
    turns, unread = question.turns, [*question.unread, *answer.unread]
    more = [name for name in MORE if name not in fields and has(row.get(name))]
    if question.text:
        lines = [turns[0][1]]
        for name in more:
            value, noted = spelt(name, row[name])
            lines.append(string(name, value))
            unread += noted
        turns = (("user", "\n".join(lines)),)
    else:
        unread += more
    history = before(row["history"]) if has(row.get("history")) else ()
    return _with_system(row, (*history, *turns, *answer.turns), unread)


def _booksum(fields: tuple[str, ...], row: dict) -> Record:
    chapter, summary = (filled(name, row[name]) for name in fields)
    return _turns((("user", BOOKSUM + chapter), ("assistant", summary)))


SHAPES: Sequence[Shape] = (
    Shape(("input_ids",), _tokens, ("labels",)),
    *(Shape((name,), _conversation, SYSTEM) for name in CONVERSATIONS),
    Shape(("text",), _text),
    *(Shape(pair, _pair, (*MORE, *SYSTEM, "history")) for pair in PAIRS),
    Shape(("chapter", "summary_text"), _booksum),
    Shape(("content",), _text),
)
UNKNOWN = "unknown fields"
KNOWN = ", ".join(" + ".join(shape.fields) for shape in SHAPES)
# Columns that are read from files that hold columns, in any case.
COLUMNS = frozenset(
    name for shape in SHAPES for name in (*shape.fields, *shape.more)
) | {"role"}
