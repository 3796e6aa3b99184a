"""The shapes of rows that data sets on the hub have."""

import json

import numpy as np
import pytest

from beacon_jax.data.fields import CONVERSATIONS, PAIRS, Dropped, Record, record
from beacon_jax.data.turns import Cell

PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


def turns(row):
    made = record("x", row)
    assert not isinstance(made, Dropped), made
    return made.turns


@pytest.mark.parametrize(
    "row",  # or (row, the user's text)
    [
        ({"prompt": "q", "completion": "r"}, "q"),
        ({"prompt": "q", "response": "r"}, "q"),
        ({"instruction": "q", "response": "r", "context": "c"}, "q\nc"),
        ({"instruction": "q", "response": "r", "context": None}, "q"),
        ({"question": "q", "answer": "r", "id": 7}, "q"),
        ({"question": "q", "answer": "r", "context": "c"}, "q\nc"),
        ({"prompt": [ASKED], "completion": [SAID]}, "q"),
        ({"messages": [ASKED, SAID], "source": "s"}, "q"),
        *({name: [ASKED, SAID]} for name in CONVERSATIONS),
        {"messages": json.dumps([ASKED, SAID])},
        {"messages": [], "conversations": [ASKED, SAID]},
        {"messages": [{"role": "user", "text": "q"}, {"from": "gpt", "text": "r"}]},
        *({question: "q", answer: "r"} for question, answer in PAIRS),
        {"instruction": "q", "input": "", "output": "r"},
        {"instruction": "", "input": "q", "output": "r"},
        ({"prompt": "q", "response": "r", "input": "i", "context": "c"}, "q\ni\nc"),
        {"prompt": [ASKED], "completion": "r"},
        {"prompt": "q", "completion": [SAID]},
        {"messages": repr([ASKED, SAID])},
        *(
            {"prompt": Cell(spell([ASKED])), "completion": Cell(spell([SAID]))}
            for spell in (json.dumps, repr)
        ),
        *(
            {"question": "q", name: Cell(repr({"text": ["r"], "answer_start": [3]}))}
            for name in ("answer", "answers")
        ),
        {"question": "q", "answers": Cell(repr(["r", "r"]))},
        {"prompt": "q", "completion": [{"type": "output_text", "text": "r"}]},
        {"question": "q", "answers": {"text": ["r"], "answer_start": [3]}},
        {"question": "q", "answers": ["r", "r"]},
        {"question": "q", "answers": [{"text": "r"}]},
        {"question": "q", "answer": {"value": "r", "aliases": ["R"]}},
        {"Question": "q", "Answer": "r"},
        {"text": " ", "prompt": "q", "completion": "r"},
    ],
)
def test_two_turns(row):
    row, user = row if isinstance(row, tuple) else (row, "q")
    assert turns(row) == (("user", user), ("assistant", "r"))


@pytest.mark.parametrize(
    ("role", "known"),
    [
        *((name, "user") for name in ("user", "User", "HUMAN", " prompter ")),
        *(
            (name, "assistant")
            for name in ("ai", "AI", "gpt", "gpt-4", "GPT-3.5-turbo")
        ),
        *((name, "assistant") for name in ("ChatGPT", "Assistant", "model", "bing")),
        *((name, "system") for name in ("System", "developer")),
        *((name, "tool") for name in ("tool", "function", "Observation")),
    ],
)
def test_roles_have_many_names_in_any_case(role, known):
    assert turns({"messages": [{"role": role, "content": "c"}]}) == ((known, "c"),)


@pytest.mark.parametrize(
    "parts",
    [
        PARTS,
        np.array(PARTS, object),
        ["a ", "b"],
        [{"type": "input_text", "text": "a "}, {"type": "output_text", "text": "b"}],
    ],
)
def test_content_may_be_a_list_of_parts_as_lists_or_arrays(parts):
    made = turns({"messages": [{"role": "developer", "content": parts}, SAID]})
    assert made == (("system", "a b"), ("assistant", "r"))


SYSTEM, TALK = ("system", "s"), (("user", "q"), ("assistant", "r"))
EARLIER = (("user", "1"), ("assistant", "2"))


@pytest.mark.parametrize(
    ("row", "made", "unread"),
    [
        ({"system": "s", "conversations": [ASKED, SAID]}, (SYSTEM, *TALK), ()),
        ({"system_prompt": "s", "question": "q", "response": "r"}, (SYSTEM, *TALK), ()),
        (
            {"instruction": "q", "output": "r", "history": [["1", "2"]], "system": "s"},
            (SYSTEM, *EARLIER, *TALK),
            (),
        ),
        (
            {
                "prompt": "q",
                "response": "r",
                "history": json.dumps([{**ASKED, "content": "1"}, {"ai": 0} | SAID]),
            },
            (("user", "1"), ("assistant", "r"), *TALK),
            (),
        ),
        (
            {"system": "t", "messages": [{"role": "system", "content": "s"}, SAID]},
            (SYSTEM, TALK[1]),
            ("system",),
        ),
        (
            {"messages": [ASKED, {**SAID, "weight": 0}], "tools": ["t"], "id": None},
            TALK,
            ("messages[].weight", "tools"),
        ),
        ({"prompt": "q", "messages": [ASKED, SAID], "tools": []}, TALK, ("prompt",)),
        ({"question": "q", "answers": ["r", "R"]}, TALK, ("answers[1:]",)),
        ({"prompt": [ASKED], "response": "r", "context": "c"}, TALK, ("context",)),
        (
            {"messages": [ASKED | {"value": "o"}, SAID | {"text": "r"}], "Id": 1},
            TALK,
            ("id", "messages[].value"),
        ),
        ({"Question": None, "question": "q", "ANSWER": "r"}, TALK, ()),
        ({"question": "q", "answer": "r", "label": 0}, TALK, ("label",)),
    ],
)
def test_what_a_row_has_besides_is_used_or_named(row, made, unread):
    found = record("x", row)
    assert not isinstance(found, Dropped), found
    assert (found.turns, found.unread) == (made, unread)


@pytest.mark.parametrize("cell", [str, Cell])
@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ('{"text": "inner", "x": 1}', "an object"),
        ('[{"content": "v"}]', "a list"),
        ('["a", "b"]', "a list"),
        ("['a', 'b']", "a list"),
        ("[1, 2]", "a list"),
        ("{}", ""),
        ("[citation needed]", ""),
        ("{'a': b}", ""),
    ],
)
def test_an_answer_in_json_is_a_text(answer, kind, cell):
    found = record("x", {"question": "q", "answer": cell(answer)})
    assert not isinstance(found, Dropped), found
    assert found.turns == (("user", "q"), ("assistant", answer))
    assert found.unread == ((f"answer as {kind}",) if cell is Cell and kind else ())


@pytest.mark.parametrize("name", ["text", "context", "input"])
def test_lists_in_cells_of_texts_are_counted_and_turns_refused(name):
    row = {} if name == "text" else {"question": "q", "answer": "r"}
    found = record("x", row | {name: Cell("['a', 'b']")})
    assert isinstance(found, Record) and found.unread == (f"{name} as a list",)
    text = found.text if found.turns is None else found.turns[0][1]
    assert text is not None and text.endswith("['a', 'b']")
    bad = record("x", row | {name: Cell(repr([ASKED, SAID]))})
    assert bad == Dropped("x", f"wrong type: {name} is a list, not text")


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"content": "t", "path": "a.py"}, ("path",)),
        ({"messages": [], "text": "t", "dialogue": "A: hi"}, ("dialogue",)),
        ({"TEXT": "t"}, ()),
    ],
)
def test_text(row, unread):
    made = record("x", row)
    assert not isinstance(made, Dropped), made
    assert (made.text, made.unread) == ("t", unread)


@pytest.mark.parametrize("ids", [[1, 2], "[1, 2]"])
def test_tokens(ids):
    made = record("x", {"input_ids": ids, "labels": ids})
    assert not isinstance(made, Dropped) and made.tokens is not None
    assert [x.tolist() for x in made.tokens if x is not None] == [[1, 2]] * 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "completion": " "}, "empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "content that is no text: 'image'",
        ),
        ({"question": "q", "answers": {"text": []}}, "empty"),
        (
            {"question": "q", "answers": {"place": [1]}},
            "wrong type: answers has 'place' (known: content, value, text)",
        ),
        *(
            ({"question": "q", "answer": x}, f"wrong type: answer is {kind}")
            for x, kind in [
                (5, "a number, not text"),
                (True, "true or false, not text"),
                ([1.5], "a number, not text"),
                (None, "null"),
            ]
        ),
        *(
            ({"question": "q", "answer": "r", name: x}, f"wrong type: {name} is {kind}")
            for name, x, kind in [
                ("context", {"a": 1}, "an object, not text"),
                ("system", [1], "a list, not text"),
            ]
        ),
        ({"text": 7}, "wrong type: text is a number"),
        ({"messages": [7]}, "wrong type: messages[] is a number, not an object"),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "wrong type: messages[].content is a number",
        ),
        ({"input_ids": [1.5]}, "wrong type: input_ids is no list of whole numbers"),
        ({"messages": '[{"role": "ai", "role": "ai"}]'}, "a key twice"),
        (
            {"Question": "p", "question": "q", "answer": "r"},
            "a key twice: 'question' in two cases",
        ),
        *(
            (
                {"question": "q", name: Cell(text)},
                f"wrong type: {name} is a list or object in the text of a Python",
            )
            for name, text in [
                ("answers", "{'text': array(['r'], dtype=object)}"),
                ("response", "[{'role': 'user', 'content': 'q'}\n {'role': 'ai'}]"),
            ]
        ),
        (
            {"prompt": "q", "response": "r", "history": "a"},
            "wrong type: history is no ",
        ),
        (
            {"prompt": "q", "response": "r", "history": [["a"]]},
            "wrong type: history is ",
        ),
        (
            {"dialogue": "A: hi", "summary": "s"},
            "wrong type: dialogue is text, not a l",
        ),
        ({"dialog": ["hi", "hello"]}, "missing role: a turn is text, without who"),
        (
            {"messages": [{"speaker": "a", "text": "b"}]},
            "missing role: a turn has 'spea",
        ),
        (
            {"messages": [{"role": "ai", "tool_calls": [1]}]},
            "missing content: a turn has",
        ),
        (
            {"messages": [{"role": "wizard", "text": "b"}]},
            "unknown role: 'wizard' (known",
        ),
        ({"role": "User", "text": "a"}, "a turn without its conversation"),
        (
            {"id": 7, "title": "t"},
            "unknown fields: it has 'id', 'title' (known: input_ids",
        ),
    ],
)
def test_what_is_left_out_says_why(row, reason):
    found = record("x", row)
    assert isinstance(found, Dropped) and found.reason.startswith(reason), found
