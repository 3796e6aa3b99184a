"""The shapes of rows that data sets on the hub have."""

import numpy as np
import pytest

from beacon_jax.data.fields import UNKNOWN, Dropped, record

PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
ASKED, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


def turns(row):
    made = record("x", row)
    assert not isinstance(made, Dropped), made
    return made.turns


@pytest.mark.parametrize(
    ("row", "user"),
    [
        ({"prompt": "q", "completion": "r"}, "q"),
        ({"prompt": "q", "response": "r"}, "q"),
        ({"instruction": "q", "response": "r", "context": "c"}, "q\nc"),
        ({"instruction": "q", "response": "r", "context": None}, "q"),
        ({"question": "q", "answer": "r", "id": 7}, "q"),
        ({"question": "q", "answer": "r", "context": "c"}, "q\nc"),
        ({"prompt": [ASKED], "completion": [SAID]}, "q"),
        ({"messages": [ASKED, SAID], "source": "s"}, "q"),
    ],
)
def test_two_turns(row, user):
    assert turns(row) == (("user", user), ("assistant", "r"))


def test_content_may_be_a_list_of_parts_as_lists_or_arrays():
    for parts in (PARTS, np.array(PARTS, object)):
        made = turns({"messages": [{"role": "developer", "content": parts}, SAID]})
        assert made == (("system", "a b"), ("assistant", "r"))


def test_code_is_text():
    made = record("x", {"content": "def f(): ...", "path": "a.py"})
    assert not isinstance(made, Dropped) and made.text == "def f(): ..."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [ASKED], "completion": "r"}, "wrong type"),
        ({"prompt": "q", "completion": " "}, "empty"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "content that is no text",
        ),
        ({"question": "q", "answers": {"text": ["r"]}}, UNKNOWN),
    ],
)
def test_what_is_left_out_says_why(row, reason):
    assert record("x", row) == Dropped("x", reason)
    assert "messages" in UNKNOWN and "question + answer" in UNKNOWN
