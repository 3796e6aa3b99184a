"""Clients that are slow, go away, or open connections and leave them."""

import asyncio
import contextlib
import dataclasses
import json
import resource
import select
import socket
import time

import pytest

from beacon_jax.serving import listen
from tests.serving.conftest import LIMITS, eventually, served
from tests.serving.raw import (
    Reader,
    connect,
    exchange,
    head,
    post,
    read,
    refused,
    unharmed,
)

# A minute or so each: `make test` has the other tests of the server.
pytestmark = pytest.mark.slow

QUICK = 1.0  # seconds for a head, a body, and to take an answer
MOST = 64  # connections
COMPLETIONS, MEMORIES = "/v1/completions", "/v1/memories"


@pytest.fixture(scope="module")
def server(model):
    """A server that waits for clients a second, and has few connections."""
    limits = dataclasses.replace(LIMITS, seconds=QUICK, connections=MOST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listen, "IDLE", 2)
        with served(model, None, limits) as service:
            # Those who do not read are noticed before the kernel has taken megabytes.
            listening = service.server.socket  # type: ignore[attr-defined]
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            yield service


@pytest.fixture(autouse=True)
def all_is_well(server):
    """Asserts after each test that the server is as it was."""
    with unharmed(server):
        yield


def streamed(**fields):
    """Writes the request of a stream."""
    asked = {"prompt": "hello", "max_tokens": 300, "stream": True} | fields
    body = json.dumps(asked).encode()
    return head("POST", COMPLETIONS, f"Content-Length: {len(body)}") + body


def closed(connection: socket.socket, seconds: float) -> bool:
    """Waits until the other side closes a connection."""
    connection.settimeout(seconds)
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


def idle(server) -> bool:
    """Tells whether the engine has nothing to do."""
    return not any(server.engine.state().values())


def connections(server) -> int:
    """Counts connections that the server has open."""
    return len(server.server._server.server_state.connections)


def test_a_head_that_comes_byte_by_byte_is_given_up(server):
    with connect(server) as connection:
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in head("GET", "/health") * 9:
                connection.sendall(bytes([byte]))
                if select.select([connection], [], [], 0.05)[0]:
                    break
        assert closed(connection, 5)
        assert time.monotonic() - begin < QUICK + 4


def test_a_second_head_that_comes_byte_by_byte_does_not_hold_up_others(server):
    with connect(server) as connection:
        connection.sendall(head("GET", "/health") + b"GET /hea")
        assert read(connection, "GET").status == 200
        for _ in range(20):
            connection.sendall(b"l")
            assert exchange(server, head("GET", "/health"), "GET").status == 200


def test_a_body_that_stops_is_given_up_while_others_answer(server):
    waiting = [connect(server) for _ in range(20)]
    for each in waiting:
        each.sendall(head("POST", COMPLETIONS, "Content-Length: 1000") + b'{"prompt"')
    begin = time.monotonic()
    assert exchange(server, streamed(max_tokens=2)).status == 200
    for each in waiting:
        answer = read(each)
        assert answer.status == 408
        refused(answer, "1 s")
        each.close()
    assert time.monotonic() - begin < QUICK + 10


def test_a_stream_that_nobody_reads_is_given_up_and_frees_its_row(server):
    waiting = []
    for _ in range(6):  # more than there are rows
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        each.connect(server.server.socket.getsockname())
        each.sendall(streamed(max_tokens=500, logprobs=20))
        waiting.append(each)
    assert exchange(server, streamed(max_tokens=2, stream=False)).status == 200
    eventually(lambda: idle(server), 60)
    eventually(lambda: connections(server) == 0, 20)
    for each in waiting:
        each.close()


def test_a_long_answer_that_nobody_reads_is_given_up(server):
    asked = streamed(stream=False, n=4, max_tokens=200, logprobs=20)
    waiting = []
    for _ in range(3):
        each = socket.socket()
        each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        each.connect(server.server.socket.getsockname())
        each.sendall(asked)
        waiting.append(each)
    eventually(lambda: server.engine.state()["answering"] > 0)
    eventually(lambda: idle(server), 60)
    eventually(lambda: connections(server) == 0, 20)
    for each in waiting:
        each.close()


def test_a_client_that_reads_slowly_gets_all_of_its_stream(server):
    with connect(server) as connection:
        connection.sendall(streamed(max_tokens=200, temperature=0))
        got = b""
        while b"[DONE]" not in got:
            part = connection.recv(2000)
            assert part, got[-200:]
            got += part
            time.sleep(0.02)


def test_those_who_go_away_at_any_moment_leave_nothing_behind(server):
    for number in range(40):
        connection = connect(server)
        sent = streamed(prompt="hello " * (1 + number * 5), max_tokens=400)
        if number % 5 == 4:
            sent = sent[: len(sent) // 2]
        connection.sendall(sent)
        time.sleep(0.004 * number)
        if number % 3 == 0:  # resets the connection
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
            )
        connection.close()
    eventually(lambda: idle(server))
    eventually(lambda: connections(server) == 0, 20)


def test_those_who_go_away_while_a_memory_is_made_end_it(server, text):
    for stream in (False, True):
        for number in range(8):
            body = json.dumps(
                {"text": f"{number} {stream} " + text, "stream": stream, "ratio": 8}
            ).encode()
            with connect(server) as connection:
                length = f"Content-Length: {len(body)}"
                connection.sendall(head("POST", MEMORIES, length) + body)
                time.sleep(0.01 * number)
        eventually(lambda: not server.reading.jobs())
    answer = post(server, MEMORIES, json.dumps({"text": text}).encode())
    assert answer.status in (200, 201)


def test_a_client_that_has_sent_all_and_closes_its_side_costs_nothing(server):
    with connect(server) as connection:
        connection.sendall(streamed(max_tokens=500))
        connection.shutdown(socket.SHUT_WR)
        closed(connection, 20)
    eventually(lambda: idle(server))


async def _open(server, count: int) -> list:
    """Opens connections, and leaves them."""
    host, port = server.server.socket.getsockname()

    async def one() -> tuple | None:
        try:
            return await asyncio.wait_for(asyncio.open_connection(host, port), 60)
        except (OSError, TimeoutError):
            return None

    found = []
    for start in range(0, count, 200):
        found += await asyncio.gather(*(one() for _ in range(min(200, count - start))))
    return [x for x in found if x is not None]


def _crowd(server, count: int) -> None:
    async def run() -> None:
        writers = [writer for _, writer in await _open(server, count)]
        assert len(writers) > 0.9 * count
        # There is room for those who mean it.
        for _ in range(5):
            answer = await asyncio.to_thread(exchange, server, streamed(max_tokens=2))
            assert answer.status == 200
        assert connections(server) <= MOST + 1
        for writer in writers:
            writer.close()

    asyncio.run(run())
    eventually(lambda: connections(server) == 0, 20)


def test_hundreds_of_connections_that_are_left_open_keep_nobody_out(server):
    _crowd(server, 500)


@pytest.mark.slow
def test_ten_thousand_connections_that_are_left_open_keep_nobody_out(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        _crowd(server, min(10_000, hard // 2 - 200))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_requests_than_connections_are_refused_in_our_form(server):
    waiting = []
    for _ in range(MOST + 20):
        each = connect(server)
        each.sendall(head("POST", COMPLETIONS, "Content-Length: 1000"))
        waiting.append(each)
    answers = [read(each) for each in waiting]
    for each in waiting:
        each.close()
    assert {408, 503} <= {x.status for x in answers} <= {0, 408, 503}
    for answer in answers:
        if answer.status:  # else it was closed with its head on the way
            refused(answer)


def test_an_error_behind_a_complete_answer_closes_the_connection(server):
    with connect(server) as connection:
        connection.sendall(head("POST", "/none", "Transfer-Encoding: chunked"))
        assert read(connection).status == 404
        connection.sendall(b"-7\r\n\xff\r\n")
        assert closed(connection, 5)


def test_a_connection_is_used_again_and_again(server):
    with connect(server) as connection:
        reader = Reader(connection)
        for number in range(50):
            sent = streamed(stream=False, max_tokens=1 + number % 3)
            connection.sendall(sent)
            assert read(reader).status == 200
