"""Whatever a client sends: it gets an answer of ours, and the server goes on.

After each test the server answers, its threads live, its engine is empty, and nothing
was logged as an error. `test_hostile_values` has what stands inside of bodies.
"""

import contextlib
import dataclasses
import json
import time
from urllib.parse import quote

import pytest

from tests.serving.conftest import LIMITS, served
from tests.serving.raw import (
    Reader,
    connect,
    exchange,
    head,
    keyed,
    post,
    read,
    refused,
    unharmed,
)

KEY = "a-key-that-none-may-see"
BODY = 2**20
QUICK = 1.5  # seconds for a request
TIGHT = dataclasses.replace(LIMITS, body=BODY, seconds=QUICK, tokens=4000, queue=16)
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
def all_is_well(request):
    """Asserts after each test that the servers are as they were, and kept the key."""
    found = [x for x in ("server", "locked") if x in request.fixturenames]
    with unharmed(*map(request.getfixturevalue, found)) as log:
        yield
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


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "mem-\0", "x" * 5000, 7, [], {}]
)
@pytest.mark.parametrize("field", ["memory", "model"])
def test_a_field_that_names_something_else_is_refused(server, field, name):
    refused(ask(server, **{field: name}), field)


def test_files_beside_the_page_are_not_served(server):
    for path in (
        "/page/../app.py",
        "/page/..%2fapp.py",
        "/page/%2e%2e/app.py",
        "/page//etc/passwd",
        "/page/%2fetc%2fpasswd",
        "/page/%00",
        "/page/" + "x" * 5000,
        "/page/..\\app.py",
        "//etc/passwd",
        "/page",
    ):
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
    for path in (
        "/v1/models",
        "/metrics",
        "/metrics/",
        MEMORIES,
        "/v1/none",
        "/%76%31/models",
        "/v1/memories/mem-1",
        "/v1/../v1/models",
    ):
        answer = exchange(locked, head("GET", path, *lines), "GET")
        assert answer.status == 401, (path, answer)
        assert answer.body == wanted.body
    for path in (COMPLETIONS, CHATS, MEMORIES):
        assert post(locked, path, b"{", *lines).status == 401


def test_paths_written_in_other_ways_do_not_pass_the_key(locked):
    for path in (
        "//v1/models",
        "/V1/models",
        "/./v1/models",
        "http://x/v1/models",
        "/page/../v1/models",
        "/v1%2fmodels",
        "/v1/models/",
        "/v1//models",
        "/metrics%2f",
        "/%6detrics",
        "/page/../metrics",
        ";/v1/models",
        "*",
    ):
        answer = exchange(locked, head("GET", path), "GET")
        assert answer.status in (307, 400, 401, 404), (path, answer)
        assert b"tiny" not in answer.body and b"beacon_jax_" not in answer.body


def test_neither_keys_nor_paths_become_metrics(locked):
    for number in range(30):
        exchange(locked, head("GET", f"/v1/{KEY}{number}"), "GET")
        exchange(
            locked, head("GET", f"/v1/models/{KEY}{number}", *keyed(locked)), "GET"
        )
        exchange(locked, head("GET", f"/{KEY}{number}/"), "GET")
        exchange(locked, head("PUT", f"/v1/memories/{number}/{KEY}"), "PUT")
    told = exchange(locked, head("GET", "/metrics", *keyed(locked)), "GET")
    assert told.status == 200
    assert KEY.encode() not in told.body
    assert len(told.body.splitlines()) < 300


def test_a_page_of_another_site_cannot_use_the_rights_of_a_browsers_user(server):
    body = b'{"text": "hello there"}'
    for kind in ("cross-site", "same-site"):
        lines = ["Content-Type: text/plain", f"Sec-Fetch-Site: {kind}"]
        answer = post(server, MEMORIES, body, *lines)
        assert answer.status == 403
        refused(answer)
    assert post(server, MEMORIES, body, "Sec-Fetch-Site: same-origin").status < 300


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
    "length and chunks": (
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        b"0\r\n\r\n",
    ),
    "two codings": (
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
        b"0\r\n\r\n",
    ),
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
    for sent in (
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
        b"GET /\r\n\r\n",
        b"GET /none HTTP/9.9\r\n\r\n",
        b"GE\x00T / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n" * 50_000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    ):
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
    for path in (
        "/",
        "/health",
        "/v1/models",
        COMPLETIONS,
        CHATS,
        MEMORIES,
        f"{MEMORIES}/mem-1",
        f"{MEMORIES}/mem-1/append",
        "/metrics",
        "/none",
    ):
        for method in ("OPTIONS", "PUT", "TRACE", "PATCH", "CONNECT", "PROPFIND"):
            answer = exchange(server, head(method, path), method)
            assert answer.status in (404, 405), (method, path, answer)
            refused(answer)
            assert answer.status == 404 or "allow" in answer.headers


def test_an_upgrade_to_another_protocol_is_not_taken(server):
    for kind in ("websocket", "h2c", "x"):
        lines = [
            "Connection: Upgrade",
            f"Upgrade: {kind}",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        ]
        answer = exchange(server, head("GET", "/health", *lines), "GET")
        assert answer.status == 200
