"""Whatever a client sends: it gets an answer of ours, and the server goes on.

After each test the server answers, its threads live, its engine is empty, and nothing
was logged as an error.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import resource
import socket
import threading
import time
from urllib.parse import quote

import pytest

from tests.serving.conftest import LIMITS, eventually, served
from tests.serving.raw import (
    Reader,
    connect,
    exchange,
    fair,
    head,
    keyed,
    logged,
    post,
    read,
    refused,
    still_serves,
)

KEY = "a-key-that-none-may-see"
BODY = 2**20
QUICK = 1.5  # seconds for a request
TIGHT = dataclasses.replace(
    LIMITS, key=None, body=BODY, seconds=QUICK, tokens=4000, connections=128, queue=16
)
COMPLETIONS, CHATS, MEMORIES = "/v1/completions", "/v1/chat/completions", "/v1/memories"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server with small limits and a store."""
    with served(model, tmp_path_factory.mktemp("store"), TIGHT) as service:
        yield service


@pytest.fixture(scope="module")
def locked(model):
    """A server that has a key."""
    with served(model, None, dataclasses.replace(TIGHT, key=KEY)) as service:
        yield service


@pytest.fixture(autouse=True)
def unharmed(request):
    """Asserts after each test that the servers are as they were."""
    with logged() as log:
        yield
        for name in ("server", "locked"):
            if name in request.fixturenames:
                still_serves(request.getfixturevalue(name), eventually)
    assert not log.bad, "\n".join(log.bad)
    assert KEY not in "\n".join(log.all)


def ask(server, **fields):
    """Posts a completion."""
    asked = {"prompt": "hello", "max_tokens": 1} | fields
    return post(server, COMPLETIONS, json.dumps(asked).encode())


def remember(server, **fields):
    """Posts a memory."""
    asked = {"text": "hello there, how are you?"} | fields
    return post(server, MEMORIES, json.dumps(asked).encode())


# --- names -----------------------------------------------------------------------

IDS = {
    "parent": "..",
    "parents": "../../../etc/passwd",
    "encoded": "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "twice encoded": "%252e%252e%252f",
    "absolute": "/etc/passwd",
    "absolute, encoded": "%2Fetc%2Fpasswd",
    "NUL": "mem-%00",
    "NUL behind an id": f"mem-{'0' * 32}%00",
    "newline": f"mem-{'0' * 32}%0a",
    "header": "x%0d%0aSet-Cookie:%20a=b",
    "long": "m" * 5000,
    "unicode": "%E2%98%83%F0%9F%98%80",
    "no UTF-8": "%ff%fe",
    "upper case": f"mem-{'A' * 32}",
    "short": "mem-123",
    "other digits": "mem-" + quote("٣" * 32),
    "file": f"mem-{'0' * 32}.json",
    "glob": "mem-*",
    "tilde": "~root",
    "unknown": f"mem-{'0' * 32}",
    "empty": "",
}


@pytest.mark.parametrize("name", IDS.values(), ids=IDS)
def test_an_id_of_another_form_is_a_memory_that_is_not_there(server, name):
    for method, behind in [("GET", ""), ("DELETE", ""), ("POST", "/append")]:
        body = b'{"text": "more"}' if method == "POST" else b""
        length = f"Content-Length: {len(body)}"
        kind = "Content-Type: application/json"
        sent = head(method, f"{MEMORIES}/{name}{behind}", length, kind) + body
        answer = exchange(server, sent, method)
        if name or behind:
            refused(answer)
            assert answer.status in (400, 404, 405), answer
        assert "set-cookie" not in answer.headers
        assert b"root:" not in answer.body


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "mem-\0", "x" * 5000, 7, [], {}])
@pytest.mark.parametrize("field", ["memory", "model"])
def test_a_field_that_names_something_else_is_refused(server, field, name):
    refused(ask(server, **{field: name}), field)


def test_files_beside_the_page_are_not_served(server):
    for path in ("/page/../app.py", "/page/..%2fapp.py", "/page/%2e%2e/app.py",
                 "/page//etc/passwd", "/page/%2fetc%2fpasswd", "/page/%00",
                 "/page/" + "x" * 5000, "/page/..\\app.py", "//etc/passwd", "/page"):
        answer = exchange(server, head("GET", path), "GET")
        assert b"import" not in answer.body and b"root:" not in answer.body
        assert answer.status in (307, 400, 404), (path, answer)


def test_names_for_people_are_told_as_they_are_and_become_no_headers(server):
    for name in ["../../x", "a\r\nSet-Cookie: a=b", "\0", "☃" * 200, "<script>", ""]:
        answer = remember(server, text=f"a text named {name!r}", name=name)
        assert answer.status in (200, 201)
        assert answer.json["name"] == name
        assert "set-cookie" not in answer.headers
        about = exchange(server, head("GET", f"{MEMORIES}/{answer.json['id']}"), "GET")
        assert about.json["name"] == name
    refused(remember(server, name="n" * 201), "name")
    assert exchange(server, head("GET", MEMORIES), "GET").status == 200


# --- keys ------------------------------------------------------------------------

WRONG = {
    "none": [],
    "wrong": ["Authorization: Bearer wrong"],
    "part": [f"Authorization: Bearer {KEY[:-1]}"],
    "longer": [f"Authorization: Bearer {KEY}x"],
    "other scheme": [f"Authorization: Basic {KEY}"],
    "bare": [f"Authorization: {KEY}"],
    "other case": [f"Authorization: Bearer {KEY.upper()}"],
    "latin": ["Authorization: Bearer \xe9\xff"],
    "two": ["Authorization: Bearer no", f"Authorization: Bearer {KEY}"],
    "long": ["Authorization: Bearer " + "x" * 20_000],
}


@pytest.mark.parametrize("lines", WRONG.values(), ids=WRONG)
def test_a_wrong_key_gets_one_and_the_same_answer(locked, lines):
    wanted = exchange(locked, head("GET", "/v1/models"), "GET")
    assert wanted.status == 401 and wanted.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/metrics/", MEMORIES, "/v1/none",
                 "/%76%31/models", "/v1/memories/mem-1", "/v1/../v1/models"):
        answer = exchange(locked, head("GET", path, *lines), "GET")
        assert answer.status == 401, (path, answer)
        assert answer.body == wanted.body
    for path in (COMPLETIONS, CHATS, MEMORIES):
        assert post(locked, path, b"{", *lines).status == 401


def test_paths_written_in_other_ways_do_not_pass_the_key(locked):
    for path in ("//v1/models", "/V1/models", "/./v1/models", "http://x/v1/models",
                 "/page/../v1/models", "/v1%2fmodels", "/v1/models/", "/v1//models",
                 "/metrics%2f", "/%6detrics", "/page/../metrics", ";/v1/models", "*"):
        answer = exchange(locked, head("GET", path), "GET")
        assert answer.status in (307, 400, 401, 404), (path, answer)
        assert b"tiny" not in answer.body and b"beacon_jax_" not in answer.body


def test_neither_keys_nor_paths_become_metrics(locked):
    for number in range(30):
        exchange(locked, head("GET", f"/v1/{KEY}{number}"), "GET")
        exchange(locked, head("GET", f"/v1/models/{KEY}{number}", *keyed(locked)), "GET")
        exchange(locked, head("GET", f"/{KEY}{number}/"), "GET")
        exchange(locked, head("PUT", f"/v1/memories/{number}/{KEY}"), "PUT")
    told = exchange(locked, head("GET", "/metrics", *keyed(locked)), "GET")
    assert told.status == 200
    assert KEY.encode() not in told.body
    assert len(told.body.splitlines()) < 300


# --- bodies ----------------------------------------------------------------------


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(server):
    for length in (BODY + 1, 10**12, 10**19):
        for path in (COMPLETIONS, CHATS, MEMORIES, "/v1/none"):
            answer = exchange(server, head("POST", path, f"Content-Length: {length}"))
            assert answer.status == 413
            refused(answer, f"{BODY:,}", "--max_body")


def test_a_body_without_a_length_is_refused_when_it_is_too_large(server):
    with connect(server) as connection:
        connection.sendall(head("POST", COMPLETIONS, "Transfer-Encoding: chunked"))
        part = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(40):
                connection.sendall(part)
        answer = read(connection)
    assert answer.status in (0, 413), answer  # 0: it closed before all was sent


def test_a_body_shorter_than_it_says_is_given_up(server):
    begin = time.monotonic()
    answer = exchange(server, head("POST", COMPLETIONS, "Content-Length: 100") + b"{}")
    assert answer.status == 408
    refused(answer, "1.5 s", "send it faster")
    assert QUICK - 0.2 < time.monotonic() - begin < QUICK + 5


def test_a_body_longer_than_it_says_is_two_requests(server):
    body = json.dumps({"prompt": "hello", "max_tokens": 1}).encode()
    sent = head("POST", COMPLETIONS, f"Content-Length: {len(body)}") + body
    with connect(server) as connection:
        connection.sendall(sent + b"} garbage\r\n\r\n")
        answers = Reader(connection)
        assert read(answers).status == 200
        assert read(answers).status in (0, 400)


LENGTHS = {
    "negative": ["Content-Length: -1"],
    "sign": ["Content-Length: +2"],
    "hex": ["Content-Length: 0x2"],
    "superscript": ["Content-Length: \xb2"],
    "comma": ["Content-Length: 2, 3"],
    "two": ["Content-Length: 2", "Content-Length: 3"],
    "5000 digits": ["Content-Length: " + "9" * 5000],
    "empty": ["Content-Length:"],
    "words": ["Content-Length: many"],
}


@pytest.mark.parametrize("lines", LENGTHS.values(), ids=LENGTHS)
def test_a_length_that_is_no_number_is_refused(server, lines):
    answer = exchange(server, head("POST", COMPLETIONS, *lines) + b"{}")
    assert answer.status in (400, 413), answer
    refused(answer)


SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
SHAPES = {
    "length and chunks": (["Content-Length: 5", "Transfer-Encoding: chunked"], b"0\r\n\r\n"),
    "two codings": (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], b"0\r\n\r\n"),
    "a list": (["Transfer-Encoding: gzip, chunked"], b"0\r\n\r\n"),
    "space": (["Transfer-Encoding : chunked"], b"0\r\n\r\n"),
    "tab": (["Transfer-Encoding:\tchunked"], b"0\r\n\r\n"),
    "underscore": (["Transfer_Encoding: chunked", "Content-Length: 5"], b"0\r\n\r\n"),
    "xchunked": (["Transfer-Encoding: xchunked"], b"0\r\n\r\n"),
    "folded": (["Transfer-Encoding:\r\n chunked"], b"0\r\n\r\n"),
    "bare newline": (["X: a\nTransfer-Encoding: chunked"], b"0\r\n\r\n"),
    "size": (["Transfer-Encoding: chunked"], b"-1\r\n\r\n"),
    "huge size": (["Transfer-Encoding: chunked"], b"f" * 30 + b"\r\n"),
    "extension": (["Transfer-Encoding: chunked"], b"0;" + b"x" * 100_000 + b"\r\n\r\n"),
    "trailers": (["Transfer-Encoding: chunked"], b"0\r\nContent-Length: 9\r\n\r\n"),
    "no end": (["Transfer-Encoding: chunked"], b"2\r\n{}XX0\r\n\r\n"),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_two_readers_might_read_in_two_ways_is_read_in_one(server, shape):
    lines, body = shape
    with connect(server) as connection:
        connection.sendall(head("POST", COMPLETIONS, *lines) + body + SMUGGLED)
        answer = read(connection)
        # The empty body is refused; never is the second request taken for the first.
        refused(answer)
        assert answer.status in (400, 408, 501), answer


def test_garbage_is_refused_in_our_form(server):
    for sent in (b"\x00" * 100, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", b"GET /\r\n\r\n",
                 b"GET /none HTTP/9.9\r\n\r\n", b"GE\x00T / HTTP/1.1\r\nHost: x\r\n\r\n",
                 b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 50_000,
                 b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
                 b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                 b"GET / HTTP/1.1\r\n\r\n", b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n"):
        answer = exchange(server, sent, "GET")
        assert answer.status in (0, 400, 404, 408, 431), (sent[:30], answer)
        if answer.status:
            refused(answer)


def test_garbage_behind_a_request_does_not_reach_its_answer(server):
    body = json.dumps({"prompt": "hello", "max_tokens": 20, "temperature": 0}).encode()
    sent = head("POST", COMPLETIONS, f"Content-Length: {len(body)}") + body
    alone = exchange(server, sent).json["choices"]
    with connect(server) as connection:
        connection.sendall(sent + b"\x00\xff" * 1000)
        assert read(connection).json["choices"] == alone
    with connect(server) as connection:  # a hundred requests at once, on one connection
        connection.sendall(head("GET", "/health") * 100 + sent)
        answers = Reader(connection)
        for _ in range(100):
            assert read(answers, "GET").status == 200
        assert read(answers).json["choices"] == alone


def test_other_methods_are_refused_and_told_which_there_are(server):
    for path in ("/", "/health", "/v1/models", COMPLETIONS, CHATS, MEMORIES,
                 f"{MEMORIES}/mem-1", f"{MEMORIES}/mem-1/append", "/metrics", "/none"):
        for method in ("OPTIONS", "PUT", "TRACE", "PATCH", "CONNECT", "PROPFIND"):
            answer = exchange(server, head(method, path), method)
            assert answer.status in (404, 405), (method, path, answer)
            refused(answer)
            assert answer.status == 404 or "allow" in answer.headers


def test_an_upgrade_to_another_protocol_is_not_taken(server):
    for kind in ("websocket", "h2c", "x"):
        lines = ["Connection: Upgrade", f"Upgrade: {kind}", "Sec-WebSocket-Version: 13",
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
        answer = exchange(server, head("GET", "/health", *lines), "GET")
        assert answer.status == 200


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
    for fields in ({"text": half}, {"text": "a", "name": half}, {"text": "a", "spans": half},
                   {"text": "a", "method": half}, {"text": "a", "ratio": half},
                   {"text": "a", "max_bytes": half},
                   {"messages": [{"role": half, "content": "a"}]},
                   {"messages": [{"role": "user", "content": half}]}):
        refused(post(server, MEMORIES, json.dumps(fields).encode()))
    listed = exchange(server, head("GET", MEMORIES), "GET")
    assert listed.status == 200
    refused(ask(server, stop=[half]))
    made = remember(server)
    refused(post(server, f"{MEMORIES}/{made.json['id']}/fork", json.dumps({"name": half}).encode()))


def test_the_last_of_equal_fields_counts(server):
    answer = post(server, COMPLETIONS, b'{"prompt": 7, "prompt": "a", "max_tokens": 1}')
    assert answer.status == 200


def test_characters_that_are_written_as_pairs_are_read(server):
    answer = post(server, COMPLETIONS, b'{"prompt": "\\ud83d\\ude00", "max_tokens": 1}')
    assert answer.status == 200


# --- values ----------------------------------------------------------------------

HUGE = 10**30
VALUES = {
    "prompt": [None, 7, {}, [], [[]], [""], "", [None], ["a", 7], [[7], "a"], [True],
               [-1], [10**9], [HUGE], [1.5], [[1, -1]], ["a"] * 3000, [["a"]],
               [[1]] * 3000, [1, "a"] * 20_000],
    "max_tokens": [-1, 0, 1.5, "1", True, 10**6, 10**12, HUGE],
    "temperature": [-1, "1", True, HUGE, 1e300, 1e-300, 2.0, -0.0, None],
    "top_p": [-1, 0, 2, 1e-30, "1", []],
    "top_k": [-1, 0, HUGE, 1.5, 2**31, 2**63],
    "min_p": [-1, 2, 1, HUGE],
    "repetition_penalty": [0, -1, 1e-30, 1e30, HUGE, 1e38],
    "n": [0, -1, 128, 129, HUGE, 1.0, "2"],
    "logprobs": [-1, 0, 20, 21, HUGE, True, "5"],
    "stop": ["", [], [""], ["a"] * 16, ["a"] * 17, "x" * 1000, "x" * 1001, [7], 7, "\0"],
    "seed": [-1, -(2**63), 2**64 - 1, 2**64, HUGE, 1.5, "7"],
    "ratio": [-1, 0, 1, 3, 7, 4096, 2**31, 2**63, HUGE, "x8", "auto", "auto-0", "auto-9999",
              "auto-99999", "full", True, 1.5, [8], [2, 4, 8], []],
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
    "messages": [None, [], {}, "hello", [[]], [{}], [{"role": "user"}], [{"role": "", "content": "a"}],
                 [{"role": "x" * 41, "content": "a"}], [{"role": "{{ 7*7 }}", "content": "a"}],
                 [{"role": "user", "content": 7}], [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "user", "content": "a" * 50_000}], [{"role": "user", "content": ""}],
                 [{"role": "user", "content": "a"}] * 3000, [7] * 20_000,
                 [{"role": "assistant", "content": None}], [{"role": "tool", "content": "a"}]],
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
    "max_bytes": [-1, 0, 1, HUGE, "0", "512MiB", "1e9", "99999999999999TiB", "x", "-1", 1.5,
                  "9" * 31, []],
    "method": ["os", "os.path", "beacon_jax.cli", "/etc/passwd", "../../x", "", "__import__", "\0",
               "snapkv ", "BEACON", "m" * 5000, 7],
    "spans": ["", "a", "(", "(a+)+$", "(a*)*b", "(?P<x", "a{99999}{99999}", "(a{6000}){6000}",
              "x" * 1000, "x" * 1001, r"\d{5}", "(?=a)", ".*", r"\p{L}+", "^", "a|" * 300 + "b",
              "(" * 400 + ")" * 400, [], [[]], [[0]], [[0, 1, 2]], [[0, 1]], [[1, 0]], [[-1, 2]],
              [[0, HUGE]], [[0, 10**9]], [[0, 1]] * 20_000, [["a", "b"]] * 10_000, 7],
    "lossless": ["windows", "slots", "x"],
    "name": [7, "n" * 200, "n" * 201],
    "stream": [1, "yes"],
    "background": [1],
}


@pytest.mark.parametrize("field", MEMORY_VALUES)
def test_a_memory_is_made_or_its_wrong_field_is_named(server, field):
    for value in MEMORY_VALUES[field]:
        fair(remember(server, **{field: value}), field)


def test_an_expression_that_takes_for_ever_is_given_up_while_others_answer(server):
    answers = []
    text = "a" * 3000 + "b"
    slow = threading.Thread(
        target=lambda: answers.append(remember(server, text=text, spans="(a+)+$"))
    )
    slow.start()
    begin = time.monotonic()
    while slow.is_alive():
        assert ask(server).status == 200
        assert time.monotonic() - begin < 30
    (answer,) = answers
    refused(answer, "spans=", "repeats what repeats itself")


# --- forms -----------------------------------------------------------------------


def form(*parts: tuple[str, bytes], boundary: str = "B", end: bytes = b"--B--\r\n") -> bytes:
    """Writes a form of parts: what stands behind form-data, and content."""
    lines = [
        f"--{boundary}\r\nContent-Disposition: form-data{about}\r\n\r\n".encode() + content
        for about, content in parts
    ]
    return b"\r\n".join([*lines, end])


FILE = ('; name="file"; filename="a.txt"', b"hello there")
MULTIPART = "Content-Type: multipart/form-data; boundary=B"
FORMS = {
    "no boundary": (form(FILE), "Content-Type: multipart/form-data"),
    "another boundary": (form(FILE), "Content-Type: multipart/form-data; boundary=X"),
    "long boundary": (form(FILE), f"Content-Type: multipart/form-data; boundary={'B' * 9000}"),
    "charset": (form(("", b"x")), MULTIPART + "; charset=nonsense"),
    "nothing": (b"", MULTIPART),
    "garbage": (b"\x00\xff" * 1000, MULTIPART),
    "end only": (b"--B--\r\n", MULTIPART),
    "no end": (form(FILE, end=b""), MULTIPART),
    "no name": (form(("", b"x")), MULTIPART),
    "no header": (b"--B\r\n\r\nhello\r\n--B--\r\n", MULTIPART),
    "bad header": (b"--B\r\nnonsense\r\n\r\nhello\r\n--B--\r\n", MULTIPART),
    "two files": (form(FILE, FILE), MULTIPART),
    "two files of other names": (form(FILE, ('; name="f"; filename="b"', b"x")), MULTIPART),
    "no file": (form(('; name="ratio"', b"8")), MULTIPART),
    "text and file": (form(FILE, ('; name="text"', b"x")), MULTIPART),
    "many fields": (form(FILE, *[(f'; name="f{i}"', b"x") for i in range(500)]), MULTIPART),
    "many headers": (b"--B\r\n" + b"A: b\r\n" * 9000 + b"\r\nx\r\n--B--\r\n", MULTIPART),
    "other field": (form(FILE, ('; name="other"', b"x")), MULTIPART),
    "deep field": (form(FILE, ('; name="ratio"', b"[" * 100_000)), MULTIPART),
    "NaN": (form(FILE, ('; name="ratio"', b"NaN")), MULTIPART),
    "ratio": (form(FILE, ('; name="ratio"', b"3")), MULTIPART),
    "bytes": (form(FILE, ('; name="max_bytes"', b"many")), MULTIPART),
    "surrogate": (form(FILE, ('; name="spans"', b'"\\ud800"')), MULTIPART),
    "large field": (form(FILE, ('; name="name"', b"x" * 900_000)), MULTIPART),
    "not text": (form(('; name="file"; filename="a.pdf"', b"%PDF-1.4\x00\x01\xff")), MULTIPART),
    "zip": (form(('; name="file"; filename="a.zip"', b"PK\x03\x04" + b"\x00" * 99)), MULTIPART),
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


KINDS = ["text/html", "application/xml", "x", "", ";;;", "multipart/mixed; boundary=B",
         "application/x-www-form-urlencoded", "multipart/form-data;boundary=\"", "\xff"]


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_content_answer_or_are_refused(server, kind):
    for body in (b'{"text": "hello there"}', b"\x00", b"<a/>"):
        fair(post(server, MEMORIES, body, f"Content-Type: {kind}"))
        refused(post(server, COMPLETIONS, body, f"Content-Type: {kind}"))
