"""Whatever stands in a body: the answer is good, or an error that names the field.

After each test the server is as it was, see `test_hostile`.
"""

import dataclasses
import json
import threading
import time

import pytest

from tests.serving.conftest import LIMITS, served
from tests.serving.raw import exchange, fair, head, post, refused, unharmed

# A minute or so each: `make test` has the other tests of the server.
pytestmark = pytest.mark.slow

TIGHT = dataclasses.replace(LIMITS, body=2**20, seconds=1.5, tokens=4000, queue=16)
COMPLETIONS, CHATS, MEMORIES = "/v1/completions", "/v1/chat/completions", "/v1/memories"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server with small limits and a store."""
    with served(model, tmp_path_factory.mktemp("store"), TIGHT) as service:
        yield service


@pytest.fixture(autouse=True)
def all_is_well(server):
    """Asserts after each test that the server is as it was."""
    with unharmed(server):
        yield


def ask(server, **fields):
    """Posts a completion."""
    asked = {"prompt": "hello", "max_tokens": 1} | fields
    return post(server, COMPLETIONS, json.dumps(asked).encode())


def remember(server, **fields):
    """Posts a memory."""
    asked = {"text": "hello there, how are you?"} | fields
    return post(server, MEMORIES, json.dumps(asked).encode())


# --- JSON ------------------------------------------------------------------------

TEXTS = {
    "nothing": b"",
    "space": b"  ",
    "half": b'{"prompt": "a"',
    "more": b'{"prompt": "a"} x',
    "null": b"null",
    "number": b"7",
    "list": b"[]",
    "deep lists": b"[" * 100_000,
    "deep lists, closed": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"prompt":' * 100_000,
    "deep field": b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    **{
        f"{depth} deep": b'{"tools":' + b"[" * depth + b"]" * depth + b"}"
        for depth in (500, 900, 1500, 3000, 9000)
    },
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": Infinity}',
    "minus infinity": b'{"prompt": "a", "top_p": -Infinity}',
    "too large": b'{"prompt": "a", "temperature": 1e999}',
    "400 digits": b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}",
    "5000 digits": b'{"prompt": "a", "temperature": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"prompt": "\\ud800"}',
    "surrogates the wrong way round": b'{"prompt": "\\udc00\\ud800"}',
    "surrogate as a name": b'{"prompt": "a", "\\ud800": 1}',
    "surrogate in a field": b'{"prompt": "a", "model": "\\udfff"}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "half of a character": b'{"prompt": "\xe2\x98"}',
    "UTF-16, cut": '{"prompt": "a"}'.encode("utf-16")[:-1],
    "control": b'{"prompt": "\x01"}',
    "single quotes": b"{'prompt': 'a'}",
    "same field, then wrong": b'{"prompt": "a", "prompt": 7}',
    "proto": b'{"__proto__": {}, "prompt": "a"}',
    "other field": b'{"prompt": "a", "promt": "b"}',
    "form": b"prompt=a&max_tokens=1",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_body_that_is_not_what_it_should_be_is_refused(server, text):
    for path in (COMPLETIONS, CHATS, MEMORIES):
        answer = post(server, path, text)
        refused(answer)
        assert answer.status == 400, answer


def test_a_surrogate_is_refused_wherever_it_stands(server):
    half = "\ud800"
    for fields in (
        {"text": half},
        {"text": "a", "name": half},
        {"text": "a", "spans": half},
        {"text": "a", "method": half},
        {"text": "a", "ratio": half},
        {"text": "a", "max_bytes": half},
        {"messages": [{"role": half, "content": "a"}]},
        {"messages": [{"role": "user", "content": half}]},
    ):
        refused(post(server, MEMORIES, json.dumps(fields).encode()))
    listed = exchange(server, head("GET", MEMORIES), "GET")
    assert listed.status == 200
    refused(ask(server, stop=[half]))
    made = remember(server)
    refused(
        post(
            server,
            f"{MEMORIES}/{made.json['id']}/fork",
            json.dumps({"name": half}).encode(),
        )
    )


def test_the_last_of_equal_fields_counts(server):
    answer = post(server, COMPLETIONS, b'{"prompt": 7, "prompt": "a", "max_tokens": 1}')
    assert answer.status == 200


def test_characters_that_are_written_as_pairs_are_read(server):
    answer = post(server, COMPLETIONS, b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}')
    assert answer.status == 200


# --- values ----------------------------------------------------------------------

HUGE = 10**30
VALUES = {
    "prompt": [
        None,
        7,
        {},
        [],
        [[]],
        [""],
        "",
        [None],
        ["a", 7],
        [[7], "a"],
        [True],
        [-1],
        [10**9],
        [HUGE],
        [1.5],
        [[1, -1]],
        ["a"] * 3000,
        [["a"]],
        [[1]] * 3000,
        [1, "a"] * 20_000,
    ],
    "max_tokens": [-1, 0, 1.5, "1", True, 10**6, 10**12, HUGE],
    "temperature": [-1, "1", True, HUGE, 1e300, 1e-300, 2.0, -0.0, None],
    "top_p": [-1, 0, 2, 1e-30, "1", []],
    "top_k": [-1, 0, HUGE, 1.5, 2**31, 2**63],
    "min_p": [-1, 2, 1, HUGE],
    "repetition_penalty": [0, -1, 1e-30, 1e30, HUGE, 1e38],
    "n": [0, -1, 128, 129, HUGE, 1.0, "2"],
    "logprobs": [-1, 0, 20, 21, HUGE, True, "5"],
    "stop": [
        "",
        [],
        [""],
        ["a"] * 16,
        ["a"] * 17,
        "x" * 1000,
        "x" * 1001,
        [7],
        7,
        "\0",
    ],
    "seed": [-1, -(2**63), 2**64 - 1, 2**64, HUGE, 1.5, "7"],
    "ratio": [
        -1,
        0,
        1,
        3,
        7,
        4096,
        2**31,
        2**63,
        HUGE,
        "x8",
        "auto",
        "auto-0",
        "auto-9999",
        "auto-99999",
        "full",
        True,
        1.5,
        [8],
        [2, 4, 8],
        [],
    ],
    "echo": [1, "yes", None],
    "stream": [1, "no", None],
    "stream_options": [1, {}, {"include_usage": 1}, {"other": True}],
    "store": [1, "yes"],
    "best_of": [2, HUGE],
    "logit_bias": [{"5": 100}],
    "tools": [[{}]],
    "user": ["\0", "x" * 10_000, {}],
}


@pytest.mark.parametrize("field", VALUES)
def test_a_completion_answers_or_says_which_field_is_wrong(server, field):
    for value in VALUES[field]:
        answer = ask(server, **{field: value})
        fair(answer, *([] if answer.status == 429 else [field]))


def test_many_choices_and_probabilities_are_told(server):
    answer = ask(server, n=128, max_tokens=3, logprobs=20, seed=1)
    assert answer.status == 200
    assert len(answer.json["choices"]) == 128
    answer = ask(server, prompt="hello", echo=True, logprobs=20, max_tokens=0)
    assert answer.status == 200


CHAT_VALUES = {
    "messages": [
        None,
        [],
        {},
        "hello",
        [[]],
        [{}],
        [{"role": "user"}],
        [{"role": "", "content": "a"}],
        [{"role": "x" * 41, "content": "a"}],
        [{"role": "{{ 7*7 }}", "content": "a"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": "a" * 50_000}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": "a"}] * 3000,
        [7] * 20_000,
        [{"role": "assistant", "content": None}],
        [{"role": "tool", "content": "a"}],
    ],
    "max_tokens": [0, -1, HUGE, 10**12],
    "max_completion_tokens": [0, HUGE, 10**12, "5"],
    "top_logprobs": [-1, 21, HUGE, 20],
    "logprobs": [5, "yes"],
    "n": [0, 129, HUGE],
    "ratio": [3, HUGE, "auto"],
    "response_format": [{"type": "json_object"}],
}


@pytest.mark.parametrize("field", CHAT_VALUES)
def test_a_conversation_answers_or_says_which_field_is_wrong(server, field):
    plain = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
    for value in CHAT_VALUES[field]:
        asked = plain | {field: value}
        if field == "max_completion_tokens":
            asked.pop("max_tokens")
        answer = post(server, CHATS, json.dumps(asked).encode())
        fair(answer)


MEMORY_VALUES = {
    "text": [None, 7, [], "", "\0", " " * 10_000, "a" * 100_000, "☃" * 1000],
    "ratio": [*VALUES["ratio"], [8] * 10_000, [HUGE], [-1, 8], [0], ["a"] * 10_000],
    "max_slots": [-1, 0, 1, 2, HUGE, 2**31, 2**63, "5", 1.5],
    "max_bytes": [
        -1,
        0,
        1,
        HUGE,
        "0",
        "512MiB",
        "1e9",
        "99999999999999TiB",
        "x",
        "-1",
        1.5,
        "9" * 31,
        [],
    ],
    "method": [
        "os",
        "os.path",
        "beacon_jax.cli",
        "/etc/passwd",
        "../../x",
        "",
        "__import__",
        "\0",
        "snapkv ",
        "BEACON",
        "m" * 5000,
        7,
    ],
    "spans": [
        "",
        "a",
        "(",
        "(a+)+$",
        "(a*)*b",
        "(?R)",
        "(?P<x>(?&x)a|b)",
        "(?P<x",
        "a{99999}{99999}",
        "(a{6000}){6000}",
        "x" * 1000,
        "x" * 1001,
        r"\d{5}",
        "(?=a)",
        ".*",
        r"\p{L}+",
        "^",
        "a|" * 300 + "b",
        "(" * 400 + ")" * 400,
        [],
        [[]],
        [[0]],
        [[0, 1, 2]],
        [[0, 1]],
        [[1, 0]],
        [[-1, 2]],
        [[0, HUGE]],
        [[0, 10**9]],
        [[0, 1]] * 20_000,
        [["a", "b"]] * 10_000,
        7,
    ],
    "lossless": ["windows", "slots", "x"],
    "name": [7, "n" * 200, "n" * 201],
    "stream": [1, "yes"],
    "background": [1],
}


@pytest.mark.parametrize("field", MEMORY_VALUES)
def test_a_memory_is_made_or_its_wrong_field_is_named(server, field):
    for value in MEMORY_VALUES[field]:
        fair(remember(server, **{field: value}), field)


def test_a_text_that_is_far_too_long_is_not_even_encoded(server):
    text = "a" * 900_000
    turns = [{"role": "user", "content": text}]
    begin = time.monotonic()
    for answer in (
        ask(server, prompt=text),
        ask(server, prompt=[text[:20_000]] * 10),
        remember(server, text=text),
        post(server, MEMORIES, json.dumps({"messages": turns}).encode()),
        post(server, CHATS, json.dumps({"messages": turns}).encode()),
    ):
        assert answer.status == 413
        refused(answer, "characters", "--max_tokens")
    assert time.monotonic() - begin < 5


def test_an_expression_that_takes_for_ever_is_given_up_while_others_answer(server):
    answers = []
    text = "a" * 3000 + "b"
    slow = threading.Thread(
        target=lambda: answers.append(remember(server, text=text, spans="(a+)+$"))
    )
    slow.start()
    begin = time.monotonic()
    while slow.is_alive():
        asked = time.monotonic()
        assert ask(server).status == 200
        assert time.monotonic() - asked < 3 and time.monotonic() - begin < 60
    (answer,) = answers
    refused(answer, "spans=", "repeats what repeats itself")


# --- forms -----------------------------------------------------------------------


def form(
    *parts: tuple[str, bytes], boundary: str = "B", end: bytes = b"--B--\r\n"
) -> bytes:
    """Writes a form of parts: what stands behind form-data, and content."""
    lines = [
        f"--{boundary}\r\nContent-Disposition: form-data{about}\r\n\r\n".encode()
        + content
        for about, content in parts
    ]
    return b"\r\n".join([*lines, end])


FILE = ('; name="file"; filename="a.txt"', b"hello there")
MULTIPART = "Content-Type: multipart/form-data; boundary=B"
FORMS = {
    "no boundary": (form(FILE), "Content-Type: multipart/form-data"),
    "another boundary": (form(FILE), "Content-Type: multipart/form-data; boundary=X"),
    "long boundary": (
        form(FILE),
        f"Content-Type: multipart/form-data; boundary={'B' * 9000}",
    ),
    "charset": (form(("", b"x")), MULTIPART + "; charset=nonsense"),
    "nothing": (b"", MULTIPART),
    "garbage": (b"\x00\xff" * 1000, MULTIPART),
    "end only": (b"--B--\r\n", MULTIPART),
    "no end": (form(FILE, end=b""), MULTIPART),
    "no name": (form(("", b"x")), MULTIPART),
    "no header": (b"--B\r\n\r\nhello\r\n--B--\r\n", MULTIPART),
    "bad header": (b"--B\r\nnonsense\r\n\r\nhello\r\n--B--\r\n", MULTIPART),
    "two files": (form(FILE, FILE), MULTIPART),
    "two files of other names": (
        form(FILE, ('; name="f"; filename="b"', b"x")),
        MULTIPART,
    ),
    "no file": (form(('; name="ratio"', b"8")), MULTIPART),
    "text and file": (form(FILE, ('; name="text"', b"x")), MULTIPART),
    "many fields": (
        form(FILE, *[(f'; name="f{i}"', b"x") for i in range(500)]),
        MULTIPART,
    ),
    "many headers": (
        b"--B\r\n" + b"A: b\r\n" * 9000 + b"\r\nx\r\n--B--\r\n",
        MULTIPART,
    ),
    "other field": (form(FILE, ('; name="other"', b"x")), MULTIPART),
    "deep field": (form(FILE, ('; name="ratio"', b"[" * 100_000)), MULTIPART),
    "NaN": (form(FILE, ('; name="ratio"', b"NaN")), MULTIPART),
    "ratio": (form(FILE, ('; name="ratio"', b"3")), MULTIPART),
    "bytes": (form(FILE, ('; name="max_bytes"', b"many")), MULTIPART),
    "surrogate": (form(FILE, ('; name="spans"', b'"\\ud800"')), MULTIPART),
    "large field": (form(FILE, ('; name="name"', b"x" * 900_000)), MULTIPART),
    "not text": (
        form(('; name="file"; filename="a.pdf"', b"%PDF-1.4\x00\x01\xff")),
        MULTIPART,
    ),
    "zip": (
        form(('; name="file"; filename="a.zip"', b"PK\x03\x04" + b"\x00" * 99)),
        MULTIPART,
    ),
    "empty file": (form(('; name="file"; filename="a.txt"', b"")), MULTIPART),
}


@pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
def test_a_form_that_is_not_what_it_should_be_is_refused(server, shape):
    body, kind = shape
    answer = post(server, MEMORIES, body, kind)
    refused(answer)
    assert answer.status in (400, 413, 415), answer


def test_the_name_of_a_file_is_only_told(server):
    for name in ("../../x.txt", "/etc/passwd", "a\0b", "x" * 4000, "☃.txt", "a\\b"):
        part = (f'; name="file"; filename="{name}"', f"A file, {name[:9]!r}".encode())
        answer = post(server, MEMORIES, form(part), MULTIPART)
        fair(answer)
        if answer.status < 300:
            assert len(answer.json["name"]) <= 200


KINDS = [
    "text/html",
    "application/xml",
    "x",
    "",
    ";;;",
    "multipart/mixed; boundary=B",
    "application/x-www-form-urlencoded",
    'multipart/form-data;boundary="',
    "\xff",
]


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_content_answer_or_are_refused(server, kind):
    for body in (b'{"text": "hello there"}', b"\x00", b"<a/>"):
        fair(post(server, MEMORIES, body, f"Content-Type: {kind}"))
        refused(post(server, COMPLETIONS, body, f"Content-Type: {kind}"))
