"""Requests that cross each other, errors inside, and what thousands leave behind."""

import concurrent.futures
import gc
import json
import random
import threading
import time

import jax
import numpy as np
import pytest

from beacon_jax.inference.memory import Memory
from beacon_jax.serving import programs
from beacon_jax.serving.reading import Job
from beacon_jax.serving.rows import Prompt, Row, Ticket
from tests.serving.conftest import eventually, served
from tests.serving.raw import connect, exchange, head, logged, post, read, still_serves

# A minute or so each: `make test` has the other tests of the server.
pytestmark = pytest.mark.slow

COMPLETIONS, MEMORIES = "/v1/completions", "/v1/memories"


@pytest.fixture(scope="module")
def server(model):
    """A server without a store, so that memories go when they are deleted."""
    with served(model) as service:
        yield service


@pytest.fixture(autouse=True)
def unharmed(server):
    """Asserts after each test that the server is as it was."""
    yield
    still_serves(server)


def ask(server, **fields):
    """Posts a completion, greedy."""
    asked = {"prompt": "hello", "max_tokens": 8, "temperature": 0} | fields
    return post(server, COMPLETIONS, json.dumps(asked).encode())


def remember(server, text, behind="", **fields):
    """Posts a memory."""
    return post(server, MEMORIES + behind, json.dumps({"text": text} | fields).encode())


def begun(server, path, **fields):
    """Sends a request, and returns the connection."""
    body = json.dumps(fields).encode()
    connection = connect(server, 60)
    length = f"Content-Length: {len(body)}"
    connection.sendall(head("POST", path, length) + body)
    return connection


def delete(server, name):
    """Deletes a memory."""
    return exchange(server, head("DELETE", f"{MEMORIES}/{name}"), "DELETE")


def text_of(answer):
    """Returns the text of an answer."""
    assert answer.status == 200, answer
    return answer.json["choices"][0]["text"]


def count(*kinds):
    """Counts objects that are alive."""
    gc.collect()
    return sum(isinstance(x, kinds) for x in gc.get_objects())


# --- memories ----------------------------------------------------------------------


def test_a_memory_that_is_deleted_while_it_is_asked_answers_to_the_end(server, text):
    name = remember(server, text).json["id"]
    wanted = text_of(ask(server, memory=name, max_tokens=200))
    for wait in (0, 0.05, 0.2):
        remember(server, text)
        asked = {"prompt": "hello", "temperature": 0, "max_tokens": 200}
        with begun(server, COMPLETIONS, memory=name, **asked) as connection:
            time.sleep(wait)
            assert delete(server, name).status == 200
            answer = read(connection)
        assert answer.status == 404 or text_of(answer) == wanted
        assert ask(server, memory=name).status == 404
    assert not server.store.held


def test_equal_texts_are_made_for_those_who_stay_when_others_go(server, text):
    for number in range(8):
        fields = {"text": f"{number} {text}", "ratio": 8}
        connections = [begun(server, MEMORIES, **fields) for _ in range(3)]
        streams = [begun(server, MEMORIES, stream=True, **fields) for _ in range(2)]
        time.sleep(0.01 * number)
        for gone in (connections.pop(), streams.pop()):
            gone.close()
        time.sleep(0.003 * number)
        connections.append(begun(server, MEMORIES, **fields))
        for connection in connections:
            answer = read(connection)
            assert answer.status in (200, 201), answer
            connection.close()
        for connection in streams:
            assert b"[DONE]" in read(connection).body
            connection.close()
        assert delete(server, answer.json["id"]).status == 200


def test_the_last_who_goes_ends_it_and_the_next_who_comes_gets_it_anyway(server, text):
    for number in range(12):
        fields = {"text": f"{text} {number}", "ratio": 8}
        first = begun(server, MEMORIES, **fields)
        time.sleep(random.Random(number).uniform(0, 0.08))
        first.close()
        answer = remember(server, **fields)
        assert answer.status in (200, 201), answer
        delete(server, answer.json["id"])


def test_a_memory_that_is_deleted_in_the_making_does_not_appear_later(server, text):
    for number in range(10):
        made = remember(server, f"{number} {text * 2}", background=True)
        assert made.status == 202
        name = made.json["id"]
        time.sleep(0.01 * number)
        assert delete(server, name).status == 200
        eventually(lambda: not server.reading.jobs())
        time.sleep(0.05)
        about = exchange(server, head("GET", f"{MEMORIES}/{name}"), "GET")
        assert about.status == 404
    assert not server.store.held


def test_what_is_appended_to_a_deleted_memory_is_refused(server, text):
    parent = remember(server, text).json["id"]
    first = remember(server, text * 3, background=True)  # the next has to wait
    with begun(server, f"{MEMORIES}/{parent}/append", text="more") as connection:
        eventually(
            lambda: len(server.reading.jobs()) == 2 or parent not in server.store
        )
        assert delete(server, parent).status == 200
        answer = read(connection)
    assert answer.status in (201, 404), answer  # it was read before it was deleted
    assert remember(server, "more", f"/{parent}/append").status == 404
    delete(server, first.json["id"])
    if answer.status == 201:
        delete(server, answer.json["id"])


def _anything(server, name, kind):
    """Does one of six things with a memory."""
    if kind == 0:
        return ask(server, memory=name, n=2)
    if kind == 1:
        return ask(server, memory=name, store=True)
    if kind == 2:
        return remember(server, "More.", f"/{name}/append")
    if kind == 3:
        return post(server, f"{MEMORIES}/{name}/fork", b"")
    if kind == 4:
        return delete(server, name)
    return exchange(server, head("GET", MEMORIES), "GET")


def test_all_at_once_make_ask_continue_and_delete_the_same_memories(server):
    texts = [f"{number}. " + "Doors have keys. " * 30 for number in range(3)]
    statuses, stop = [], time.monotonic() + 4

    def one(number):
        rng = random.Random(number)
        while time.monotonic() < stop:
            made = remember(server, rng.choice(texts), ratio=8)
            statuses.append(made.status)
            if made.status not in (200, 201):
                continue
            name = made.json["id"]
            for kind in rng.sample(range(6), 3):
                statuses.append(_anything(server, name, kind).status)

    with logged() as log, concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert not log.bad, log.bad[0]
    assert set(statuses) <= {200, 201, 404, 409, 429}, set(statuses)
    listed = exchange(server, head("GET", MEMORIES), "GET").json["data"]
    for about in listed:
        assert delete(server, about["id"]).status == 200
    assert server.store.held == 0


# --- errors inside -----------------------------------------------------------------


def poisoned(server, name):
    """Makes the keys and values of a memory NaN."""
    memory = server.store.get(name)

    def spoil(x):
        return np.full_like(x, np.nan) if np.issubdtype(x.dtype, np.floating) else x

    state = jax.tree.map(spoil, memory.state)
    spoiled = Memory(memory.config, state, memory.rows, memory.identity)
    server.store._held[name] = spoiled


def test_a_row_that_is_not_finite_fails_alone(server, text):
    wanted = text_of(ask(server, prompt=text[:300], max_tokens=100))
    name = remember(server, text).json["id"]
    poisoned(server, name)
    asked = {"prompt": text[:300], "max_tokens": 100, "temperature": 0}
    for n in (1, 3):
        with begun(server, COMPLETIONS, **asked) as other:
            answer = ask(server, memory=name, n=n)
            assert answer.status == 400 and "finite" in answer.error["message"], answer
            assert text_of(read(other)) == wanted
        # What it left in its rows reaches nobody either.
        assert text_of(ask(server, prompt=text[:300], max_tokens=100)) == wanted
    delete(server, name)


def test_an_error_while_one_prompt_is_read_fails_that_one(server, text, monkeypatch):
    wanted = text_of(ask(server, max_tokens=200))
    read_window = programs.window

    def broken(model, state, tokens, *rest):
        if 500 in tokens:
            raise RuntimeError("of the device")
        return read_window(model, state, tokens, *rest)

    monkeypatch.setattr(programs, "window", broken)
    asked = {"prompt": "hello", "max_tokens": 200, "temperature": 0}
    with logged() as log, begun(server, COMPLETIONS, **asked) as other:
        answer = ask(server, prompt=[500, 500])
        assert answer.status == 500 and "Traceback" not in answer.error["message"]
        assert text_of(read(other)) == wanted
    assert len(log.bad) == 1 and "of the device" in log.bad[0]


@pytest.mark.parametrize("name", ["block", "insert", "release", "placed"])
def test_after_an_error_of_the_device_the_engine_begins_anew(server, name, monkeypatch):
    whole, calls = getattr(programs, name), []

    def broken(*given):
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("of the device")
        return whole(*given)

    wanted = text_of(ask(server, max_tokens=40))
    monkeypatch.setattr(programs, name, broken)
    asked = {"prompt": "hello", "max_tokens": 40, "temperature": 0}
    with logged():
        asking = [begun(server, COMPLETIONS, **asked) for _ in range(6)]
        answers = [read(connection) for connection in asking]
    for connection in asking:
        connection.close()
    assert {x.status for x in answers} <= {200, 500}
    assert all(text_of(x) == wanted for x in answers if x.status == 200)
    monkeypatch.undo()
    assert text_of(ask(server, max_tokens=40)) == wanted


def test_an_error_while_a_memory_is_made_is_told_and_the_next_is_made(
    server, text, monkeypatch
):
    whole, calls = server.model.compress, []

    def broken(*given, **options):
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("of the device")
        return whole(*given, **options)

    monkeypatch.setattr(
        type(server.model), "compress", lambda _, *a, **k: broken(*a, **k)
    )
    with logged() as log:
        assert remember(server, text + "!").status == 500
        made = remember(server, text + "!")
    assert made.status == 201
    assert len(log.bad) == 1
    delete(server, made.json["id"])


# --- what is left ------------------------------------------------------------------


def _mixed(server, number, text):
    rng = random.Random(number)
    kind = number % 6
    if kind == 0:
        made = remember(server, f"{text[:400]} {number}", ratio=8)
        assert made.status == 201, made
        name = made.json["id"]
        kept = ask(server, memory=name, max_tokens=2, store=True)
        more = remember(server, "More.", f"/{name}/append").json["id"]
        for each in (name, more, kept.json["memory"]["id"]):
            assert delete(server, each).status == 200
    elif kind == 1:
        with begun(server, COMPLETIONS, prompt=text, max_tokens=300, stream=True):
            time.sleep(rng.uniform(0, 0.05))
    elif kind == 2:
        with begun(server, MEMORIES, text=text + str(number), stream=number % 4 < 2):
            time.sleep(rng.uniform(0, 0.05))
    elif kind == 3:
        assert ask(server, n=3, logprobs=2, max_tokens=4).status in (200, 429)
    elif kind == 4:
        with begun(server, COMPLETIONS, prompt="a", max_tokens=20, stream=True) as it:
            read(it)
    else:
        ask(server, prompt=[10**6])


@pytest.mark.parametrize("times", [60, pytest.param(800, marks=pytest.mark.slow)])
def test_requests_leave_nothing_behind(server, text, times):
    kinds = (Ticket, Prompt, Row, Job, Memory)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda number: _mixed(server, number, text), range(30)))
        still_serves(server)
        before, arrays, threads = (
            count(*kinds),
            len(jax.live_arrays()),
            threading.active_count(),
        )
        list(
            pool.map(lambda number: _mixed(server, number, text), range(30, 30 + times))
        )
        still_serves(server)
    eventually(lambda: not server.server._server.server_state.tasks)
    assert server.store.held == 0 and not server.store._about
    assert not server.reading._jobs and not server.reading._waiting
    assert count(*kinds) <= before + 8
    assert len(jax.live_arrays()) <= arrays + 20
    assert threading.active_count() <= threads + 40
