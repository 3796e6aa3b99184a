"""Synthetic questions: against a server that misbehaves, interrupted and resumed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

from beacon_jax.cli.synthesize import describe
from beacon_jax.data.answers import Answers, parse_pairs
from beacon_jax.data.endpoint import Endpoint, Pace, retry_after
from beacon_jax.data.examples import Rules, make_examples
from beacon_jax.data.segments import token_counter
from beacon_jax.data.sources import Record, open_parts, read_part
from beacon_jax.data.synthesize import (
    FAILURES,
    SHORTEST_SEGMENT,
    TURN_TOKENS,
    Inquiry,
    synthesize,
)
from tests.data import chat_tokenizers
from tests.data.chat_server import ChatServer, pairs_about

KEY = "sk-very-secret-0123456789"
count = token_counter()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def books(tmp_path):
    """Three books of 4, 7 and 1 segments of 100 tokens, and rows without text."""
    path = tmp_path / "books.jsonl"
    lines = [
        json.dumps({"text": "\n\n".join(paragraph(b, i) for i in range(n))})
        for b, n in enumerate((4, 7, 1))
    ]
    talk = {"conversations": [{"role": "user", "content": "Q"}]}
    path.write_text("\n".join([lines[0], "not JSON", *lines[1:], json.dumps(talk)]))
    return path


def paragraph(book, number):
    text = f"Chapter {number} of book {book}. It tells what happened there and then. "
    return (text * 9)[:280].rsplit(" ", 1)[0] + "."


def make(server, books, tmp_path, *, tries=6, key="", wait=0.01, **more):
    endpoint = Endpoint(
        server.url, "m", key=key, tries=tries, first_wait=wait, longest_wait=0.1
    )
    more = {"segment_tokens": 100, "max_tokens": 800, "concurrency": 3, **more}
    out = more.pop("out", tmp_path / "qa.jsonl")
    return Inquiry((str(books),), out, endpoint, **more)


def run(settings, **more):
    return synthesize(settings, **more)


def read(path):
    return [json.loads(line)["conversations"] for line in path.read_text().splitlines()]


def undisturbed(books, tmp_path, **more):
    """What a run without any trouble writes."""
    with ChatServer().running() as server:
        out = tmp_path / "undisturbed.jsonl"
        run(make(server, books, tmp_path, out=out, **more))
    return out.read_bytes()


def test_neighbouring_segments_become_conversations_that_fit(books, tmp_path):
    with ChatServer().running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
    assert (report.documents, report.segments, report.skipped) == (3, 12, 2)
    assert (report.asked, report.failed, report.stopped) == (12, 0, "")
    assert server.most_at_once <= 3
    talks = read(settings.out)
    assert len(talks) == report.conversations > 3
    assert sum(map(len, talks)) == 2 * report.pairs == 2 * 12 * 4
    texts = [json.loads(line)["text"] for line in read_lines(books)]
    segments = {p["question"]: s for s in server.served for p in pairs_about(s)}
    for talk in talks:
        assert [t["role"] for t in talk] == ["user", "assistant"] * (len(talk) // 2)
        context, first = talk[0]["content"].rsplit("\n\n", 1)
        questions = [first, *(t["content"] for t in talk[2::2])]
        answers = [t["content"] for t in talk[1::2]]
        asked = list(dict.fromkeys(segments[q] for q in questions))
        # The context is one stretch of one book: the segments asked about, in order.
        assert any(context in text for text in texts)
        assert context.split() == " ".join(asked).split()
        expected = [pair for segment in asked for pair in pairs_about(segment)]
        assert questions == [p["question"] for p in expected]
        assert answers == [p["answer"] for p in expected]
        tokens = sum(count([t["content"] for t in talk])) + TURN_TOKENS * len(talk)
        assert tokens <= settings.max_tokens
    # Every segment is in one conversation.
    assert Counter(q for t in talks for q in segments_of(t, segments)) == Counter(
        dict.fromkeys(server.served, 4)
    )


def read_lines(path):
    return [line for line in path.read_text().splitlines() if '"text"' in line]


def segments_of(talk, segments):
    first = talk[0]["content"].rsplit("\n\n", 1)[1]
    return [segments[q] for q in [first, *(t["content"] for t in talk[2::2])]]


def test_conversations_are_read_back_as_a_source(books, tmp_path):
    with ChatServer().running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
    rows = [row for p in open_parts([str(settings.out)]) for row in read_part(p)]
    turns = [row.turns for row in rows if isinstance(row, Record) and row.turns]
    assert len(turns) == len(rows) == report.conversations
    assert [len(t) for t in turns] == [len(t) for t in read(settings.out)]
    assert turns[0][0][0] == "user" and turns[0][1][0] == "assistant"


@pytest.mark.parametrize("template", ["qwen", "llama-3", "llama-2", "mistral"])
def test_no_conversation_is_too_long_for_training(books, tmp_path, template):
    """With the tokenizer of the training run, whatever its chat template adds."""
    tokenizer = getattr(chat_tokenizers, template.replace("-", "_"))()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with ChatServer().running() as server:
        folder = str(tmp_path / "tokenizer")
        settings = make(server, books, tmp_path, tokenizer=folder, max_tokens=600)
        report = run(settings)
    assert report.conversations > 3
    rules = Rules(max_length=settings.max_tokens, chat_template=template)
    lengths = []
    for part in open_parts([str(settings.out)]):
        for row in read_part(part):
            assert isinstance(row, Record)
            (example,) = make_examples(row, tokenizer, rules).examples
            lengths.append(len(example.tokens))
    assert max(lengths) > settings.max_tokens / 2  # nor needlessly short


def test_request_names_the_model_the_segment_and_the_number_of_pairs(books, tmp_path):
    with ChatServer().running() as server:
        run(make(server, books, tmp_path, pairs=3, key=KEY, limit=1))
    assert len(server.bodies) == 4  # the segments of the first book only
    for body, headers in zip(server.bodies, server.headers, strict=True):
        assert body["model"] == "m"
        assert "Write 3 questions" in body["messages"][0]["content"]
        assert "of book 0." in body["messages"][1]["content"]
        assert headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "trouble", [429, 500, 503, "drop", (200, {}), (429, {"Retry-After": "x"})]
)
def test_trouble_that_passes_is_retried_and_leaves_no_trace(books, tmp_path, trouble):
    """Every third request gets it, at any time during the run, but no segment twice:
    a malformed answer is asked about once more, not for ever."""
    troubled = set()

    def behave(number, text):
        if number % 3 or text in troubled:
            return None
        troubled.add(text)
        return trouble

    bad = ChatServer(behave)
    with bad.running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
    assert len(server.bodies) > 12 and set(server.served.values()) == {1}
    assert (report.asked, report.failed, report.stopped) == (12, 0, "")
    assert settings.out.read_bytes() == undisturbed(books, tmp_path)


def test_retry_after_holds_all_requests_that_long(books, tmp_path):
    told = ChatServer(
        lambda number, text: (429, {"Retry-After": "0.6"}) if number == 4 else None
    )
    with told.running() as server:
        run(make(server, books, tmp_path, concurrency=1))
    assert server.times[5] - server.times[4] >= 0.6


def test_retry_after_is_seconds_or_a_date():
    assert retry_after("7") == 7.0
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < retry_after(soon) <= 31
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    assert [retry_after(h) for h in (None, "", "soon", "-3", "nan", past)] == [0.0] * 6
    assert retry_after("1e9") == 600.0


def test_requests_are_spaced_by_the_rate_limit():
    pace, stop = Pace(requests_per_minute=600), threading.Event()
    began = time.monotonic()
    threads = [threading.Thread(target=pace.wait, args=(stop,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=5)
    assert time.monotonic() - began >= 0.4


def test_malformed_answer_is_asked_about_once_more(books, tmp_path):
    """A conversation follows in which the model sees what it wrote."""

    def behave(number, text):
        bad = len(server.bodies[number]["messages"]) == 2 and "book 1" in text
        return "Sure! Here are 4 questions." if bad else None

    server = ChatServer(behave)
    with server.running():
        settings = make(server, books, tmp_path)
        report = run(settings)
    assert (report.asked, report.useless) == (12, 0)
    assert len(server.bodies) == 12 + 7
    again = [b["messages"] for b in server.bodies if len(b["messages"]) == 4]
    assert {m[2]["content"] for m in again} == {"Sure! Here are 4 questions."}
    assert settings.out.read_bytes() == undisturbed(books, tmp_path)


def test_answer_that_stays_malformed_is_counted_and_never_asked_again(books, tmp_path):
    hopeless = ChatServer(
        lambda n, text: "No." if "Chapter 2 of book 1" in text else None
    )
    with hopeless.running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
        assert report.useless == 1 and report.pairs == 11 * 4
        assert len(server.bodies) == 11 + 2
        report = run(settings)
        assert len(server.bodies) == 11 + 2
    assert (report.known, report.asked, report.stopped) == (12, 0, "")
    # Conversations do not reach across the hole.
    assert not any("Chapter 2 of book 1" in t[0]["content"] for t in read(settings.out))


def test_connection_that_dies_midway_leaves_what_there_is_and_resumes(books, tmp_path):
    dead = ChatServer(lambda number, text: "drop" if number >= 2 else None)
    with dead.running() as first:
        settings = make(first, books, tmp_path, tries=2, concurrency=1)
        report = run(settings)
    assert report.stopped.startswith("the endpoint fails") and report.asked == 2
    assert report.failed == FAILURES and "same command" in describe(report)
    assert sum(map(len, read(settings.out))) == 2 * 2 * 4
    with ChatServer().running() as second:
        settings = make(second, books, tmp_path)
        report = run(settings)
    assert (report.known, report.asked, report.failed) == (2, 10, 0)
    served = first.served + second.served
    assert len(served) == 12 and set(served.values()) == {1}
    assert settings.out.read_bytes() == undisturbed(books, tmp_path)


def test_answer_that_does_not_come_in_time_is_asked_for_again(books, tmp_path):
    asked = threading.Event()  # no answer before the run is over

    def slow(number, text):
        if number == 2:
            asked.wait(30)

    with ChatServer(slow).running() as server:
        settings = make(server, books, tmp_path)
        endpoint = dataclasses.replace(settings.endpoint, timeout=3)
        report = run(dataclasses.replace(settings, endpoint=endpoint))
        assert len(server.bodies) == 13
        asked.set()
    assert (report.asked, report.failed) == (12, 0)
    assert settings.out.read_bytes() == undisturbed(books, tmp_path)


def test_server_that_is_gone_is_given_up_soon(books, tmp_path):
    with ChatServer().running() as server:
        settings = make(server, books, tmp_path, tries=2)
    report = run(settings)
    assert report.stopped.startswith("the endpoint fails") and report.asked == 0
    assert report.failed <= FAILURES + settings.concurrency
    assert settings.out.read_text() == ""


@pytest.mark.parametrize(
    "status", [401, 404, (302, {"Location": "http://127.0.0.1:9/"})]
)
def test_refusal_of_everything_stops_the_run_at_once(books, tmp_path, status):
    with ChatServer(lambda number, text: status).running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
    assert len(server.bodies) <= settings.concurrency
    code = status if isinstance(status, int) else 302
    assert f"HTTP {code}" in report.stopped and server.url in report.stopped


def test_refusal_of_one_segment_leaves_the_others(books, tmp_path):
    refusing = ChatServer(
        lambda n, text: 400 if "Chapter 3 of book 0" in text else None
    )
    with refusing.running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
    assert (report.asked, report.failed, report.stopped) == (11, 1, "")
    assert report.failures == {'HTTP 400: {"error": "as told"}': 1}
    assert "1 of 12 segments without an answer" in describe(report)
    with ChatServer().running() as server:
        run(make(server, books, tmp_path))
        assert len(server.bodies) == 1
    assert settings.out.read_bytes() == undisturbed(books, tmp_path)


def test_stop_waits_for_what_is_under_way_and_keeps_it(books, tmp_path):
    stop = threading.Event()

    def behave(number, text):
        if number == 4:
            stop.set()
        time.sleep(0.05)

    with ChatServer(behave).running() as server:
        report = run(make(server, books, tmp_path), stop=stop)
        asked = len(server.bodies)
        assert report.stopped == "interrupted"
        assert report.asked == asked and 5 <= asked < 12
        settings = make(server, books, tmp_path)
        run(settings)
        assert len(server.bodies) == 12 and set(server.served.values()) == {1}
    assert settings.out.read_bytes() == undisturbed(books, tmp_path)


def test_equal_segments_are_asked_about_once(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text((json.dumps({"text": paragraph(0, 0)}) + "\n") * 2)
    with ChatServer().running() as server:
        report = run(make(server, path, tmp_path))
    assert (report.documents, report.segments, report.asked) == (2, 1, 1)
    assert report.conversations == 2 and len(server.bodies) == 1


def test_an_answer_damaged_by_a_kill_is_asked_again(books, tmp_path):
    with ChatServer().running() as server:
        settings = make(server, books, tmp_path)
        run(settings)
        whole = settings.out.read_bytes()
        kept = tmp_path / "qa.jsonl.answers"
        kept.write_bytes(kept.read_bytes()[:-10])
        report = run(settings)
    assert (report.known, report.asked) == (11, 1)
    assert settings.out.read_bytes() == whole
    assert len(kept.read_text().splitlines()) == 13  # nothing in it is ever cut


def test_pairs_that_cannot_fit_are_left_out_and_counted(books, tmp_path):
    def behave(number, text):
        pairs = pairs_about(text)
        pairs[2]["answer"] = "Very long. " * 200
        return json.dumps(pairs)

    with ChatServer(behave).running() as server:
        settings = make(server, books, tmp_path)
        report = run(settings)
    assert report.unfit == 12 * 2 and report.pairs == 12 * 2
    assert "24 pairs that do not fit" in describe(report)
    assert all("Very long." not in json.dumps(talk) for talk in read(settings.out))


def test_key_appears_nowhere_but_in_the_header(books, tmp_path, capsys, caplog):
    """Not even if the server sends it back."""

    def behave(number, text):
        return (401, {"X-Key": KEY}) if number else None

    class Echo(ChatServer):
        def _send(self, handler, status, body, headers):
            ChatServer._send(handler, status, body + KEY.encode(), headers)

    lines = []
    with Echo(behave).running() as server:
        settings = make(server, books, tmp_path, key=KEY, tries=1)
        report = run(settings, show=lines.append)
    assert report.stopped and server.headers[0]["Authorization"].endswith(KEY)
    files = [f.read_text() for f in tmp_path.iterdir()]
    shown = [repr(settings), repr(report), describe(report), *lines, *files]
    shown += [caplog.text, *capsys.readouterr()]
    assert not any(KEY in text for text in shown)
    with pytest.raises(ValueError, match="API key") as raised:
        Endpoint("http://x/v1", "m", key=KEY + "\nX: y")
    assert KEY not in str(raised.value)


def test_only_one_run_writes_a_file(books, tmp_path):
    with ChatServer().running() as server:
        settings = make(server, books, tmp_path)
        with (
            Answers(tmp_path / "qa.jsonl.answers"),
            pytest.raises(BlockingIOError, match="another run"),
        ):
            run(settings)
        assert not server.bodies


def test_damaged_lines_of_the_answers_cost_only_themselves(tmp_path):
    path = tmp_path / "qa.jsonl.answers"
    with Answers(path) as answers:
        for key in "abc":
            answers.add(key, [(f"{key}?", f"{key}!")])
    first, second, third = path.read_bytes().splitlines(keepends=True)
    damaged = first + b"\xff" + second[1:] + b'{"key": "b", "pairs": [["b?"]]}\n'
    damaged += b"[" * 99_999 + b"\n" + third + b'{"key": "d", "pa'
    path.write_bytes(damaged)
    with Answers(path) as answers:
        assert answers.known() == {"a", "c"}
        answers.add("d", [("d?", "d!")])
    with Answers(path) as answers:
        assert answers.known() == {"a", "c", "d"}
        assert answers.get("c") == [("c?", "c!")] and answers.get("b") == []
        assert answers.get("d") == [("d?", "d!")]
    assert path.read_bytes().startswith(damaged)


def test_file_of_something_else_is_not_overwritten(books, tmp_path):
    (tmp_path / "qa.jsonl").write_text("precious")
    with ChatServer().running() as server:
        with pytest.raises(FileExistsError, match=r"qa\.jsonl"):
            run(make(server, books, tmp_path))
        assert not server.bodies
    assert (tmp_path / "qa.jsonl").read_text() == "precious"


def test_source_without_long_text_is_an_error(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": "Too short."}) + "\n")
    settings = Inquiry((str(path),), tmp_path / "qa.jsonl", Endpoint("http://x", "m"))
    with pytest.raises(ValueError, match=f"at least {SHORTEST_SEGMENT} tokens"):
        run(settings)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"pairs": 0}, "pairs=0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"limit": -1}, "limit=-1"),
        ({"max_tokens": 100}, "max_tokens=100.*segment_tokens=100"),
    ],
)
def test_impossible_settings_are_refused(books, tmp_path, setting, named):
    with ChatServer().running() as server, pytest.raises(ValueError, match=named):
        make(server, books, tmp_path, **setting)
    with pytest.raises(ValueError, match="endpoint='localhost"):
        Endpoint("localhost:8000/v1", "m")


PAIRS = [("Who?", "Ann."), ("Why?", "So.")]


@pytest.mark.parametrize(
    "answer",
    [
        '[{"question": "Who?", "answer": "Ann."},{"question": "Why?","answer": "So."}]',
        '```json\n[{"question": "Who?", "answer": "Ann."},\n'
        '{"question": "Why?", "answer": "So."}]\n```\nI hope {this} helps.',
        '{"question": "Who?", "answer": "Ann."}\n{"question": "Why?", "answer": "So."}',
        '{"all": [{"Question": " Who? ", "Answer": "Ann."},{"q": "Why?", "a": "So."}]}',
        'Here: [{"question": "Who?", "answer": "Ann."}, {"question": "Why?", '
        '"answer": "So."}, {"question": "How?", "ans',
        '{"qa": [{"question": "Who?", "answer": "Ann."}, {"question": "Why?", '
        '"answer": "So."}, {"question": "Ho',
        '[{"question": "Who?", "answer": "Ann."}, {"question": "Who?", "answer": "B"}, '
        '{"question": "", "answer": "x"}, {"question": "y", "answer": null}, '
        '{"question": "Why?", "answer": "So."}]',
    ],
)
def test_pairs_are_found_in_what_models_write(answer):
    assert parse_pairs(answer) == PAIRS


@pytest.mark.parametrize(
    "answer", ["", "No.", "[1, 2]", '{"question": "Who?"}', "{" * 2000, "[" * 10**5]
)
def test_answer_without_pairs_has_none(answer):
    assert parse_pairs(answer) == []


def test_line_ends_inside_answers_are_forgiven():
    answer = '[{"question": "Who?", "answer": "Ann,\nand Bo."}]'
    assert parse_pairs(answer) == [("Who?", "Ann,\nand Bo.")]


def command(server, books, out, *more):
    return [
        *(sys.executable, "-m", "beacon_jax.data.synthesize"),
        *(f"--sources={books}", f"--out={out}", f"--endpoint={server.url}"),
        *("--model=m", "--segment_tokens=100", "--max_tokens=800", *more),
    ]


def test_command_interrupted_by_ctrl_c_goes_on_where_it_was(books, tmp_path):
    reached = threading.Event()

    def behave(number, text):
        if number >= 3:
            reached.set()
        time.sleep(0.3)

    out = tmp_path / "qa.jsonl"
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    with ChatServer(behave).running() as server:
        line = command(server, books, out, "--concurrency=1")
        first = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        try:
            assert reached.wait(40)
            first.send_signal(signal.SIGINT)
            shown = first.communicate(timeout=30)[0].decode()
        finally:
            first.kill()
        assert first.returncode == 1, shown
        assert "not finished (interrupted): the same command asks the rest" in shown
        asked = len(server.bodies)
        assert 4 <= asked < 12 and sum(map(len, read(out))) == 2 * 4 * asked
        server.behave = lambda number, text: None
        second = subprocess.run(
            line, capture_output=True, text=True, timeout=60, env=environment
        )
        assert second.returncode == 0, second.stderr
        assert f"12 segments to ask about, {asked} of them answered" in second.stdout
        assert len(server.bodies) == 12 and set(server.served.values()) == {1}
    assert out.read_bytes() == undisturbed(books, tmp_path)
    assert KEY not in shown + second.stdout + second.stderr


def test_command_reports_a_mistake_in_one_line(tmp_path):
    with ChatServer().running() as server:
        done = subprocess.run(
            command(server, tmp_path / "none.jsonl", tmp_path / "qa.jsonl"),
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "none.jsonl" in done.stderr
