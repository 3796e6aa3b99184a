"""The command as a process: killed, ended, beside another one, and on a full disk."""

import concurrent.futures
import contextlib
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import beacon_jax
from beacon_jax import paths
from beacon_jax.inference.memory import Memory
from tests.serving.conftest import LIMITS, eventually, served
from tests.serving.raw import logged, post, refused, still_serves

MEMORIES, COMPLETIONS = "/v1/memories", "/v1/completions"
LIMIT = 40  # seconds in which a server has ended


class Process:
    """A server in a process of its own."""

    def __init__(self, store: Path, *flags: str):
        """Starts it, and waits until it answers."""
        command = [sys.executable, "-m", "beacon_jax", "serve", "--model=tiny-beacon"]
        given = [f"--store={store}", "--port=0", "--slots=1024", "--rows=4", *flags]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*command, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._address()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _address(self) -> str:
        said = lambda: re.search(r"open (http://\S+)", "".join(self.lines))
        eventually(lambda: bool(said()) or self.process.poll() is not None, 120)
        found = said()
        assert found is not None, self.lines
        return found[1]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def ready(self) -> "Process":
        """Waits until its programs are compiled."""

        def check() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/ready").status_code == 200
            return False

        eventually(check, 120)
        return self

    def remember(self, text: str, **fields) -> httpx.Response:
        """Makes a memory."""
        return self.client.post(MEMORIES, json={"text": text, "ratio": 8} | fields)

    def ask(self, **fields) -> httpx.Response:
        """Asks, greedy."""
        asked = {"prompt": "hello", "max_tokens": 6, "temperature": 0}
        return self.client.post(COMPLETIONS, json=asked | fields)

    def all(self) -> list[dict]:
        """Lists the memories."""
        return self.client.get(MEMORIES).json()["data"]

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Waits for the end; returns exit code and all that was said."""
        self.process.wait(LIMIT)
        self._reader.join(10)
        self.client.close()
        return self.process.returncode, "".join(self.lines)


@contextlib.contextmanager
def serving(store: Path, *flags: str) -> Iterator[Process]:
    """Runs a server until the block ends."""
    process = Process(store, *flags).ready()
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait(10)


@pytest.fixture(scope="module")
def tiny():
    """The model that the processes serve."""
    return beacon_jax.load("tiny-beacon")


def check_files(store: Path, model) -> int:
    """Asserts that all memories that are there are whole; counts them."""
    found = list(store.glob("mem-*.json"))
    for file in found:
        about = json.loads(file.read_text())
        memory = Memory.load(file.with_suffix(".beacon"), model)
        assert int(memory.lengths[0]) == about["tokens"]
    return len(found)


# --- killed ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_a_server_that_is_killed_at_any_moment_has_all_finished_memories(
    tmp_path, tiny, text
):
    rng, finished = random.Random(7), {}
    for kill in range(10):
        with serving(tmp_path) as server:
            for name, wanted in finished.items():
                assert (
                    server.client.get(f"{MEMORIES}/{name}").json()["status"] == "ready"
                )
                assert server.ask(memory=name).json()["choices"] == wanted
            made = server.remember(f"Kill {kill}. {text}").json()["id"]
            finished[made] = server.ask(memory=made).json()["choices"]

            def load(number: int, server=server, kill=kill, made=made) -> None:
                with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
                    for turn in range(1000):
                        kind = (number + turn) % 4
                        if kind == 0:  # compressing
                            server.remember(f"{kill} {number} {turn} {text * 2}")
                        elif kind == 1:  # decoding
                            server.ask(memory=made, max_tokens=200)
                        elif kind == 2:  # writing: small ones, one after the other
                            server.remember(f"{kill} {number} {turn}")
                        else:
                            server.ask(memory=made, store=True)

            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                running = [pool.submit(load, number) for number in range(6)]
                time.sleep(rng.uniform(0.05, 2.5))
                server.signal(signal.SIGKILL)
                for each in running:
                    each.result()
        check_files(tmp_path, tiny)
    with serving(tmp_path) as server:
        listed = server.all()
        assert {x["id"] for x in listed} >= set(finished)
        for about in listed[:40]:
            assert server.ask(memory=about["id"]).status_code == 200


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_two_servers_on_one_folder_make_and_delete_the_same_memories(
    tmp_path, tiny, text
):
    with serving(tmp_path) as first, serving(tmp_path) as second:
        statuses = []
        end = time.monotonic() + 25

        def load(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                server = rng.choice([first, second])
                made = server.remember(f"{rng.randrange(3)} {text[:600]}")
                statuses.append(made.status_code)
                if made.status_code >= 300:
                    continue
                name, other = made.json()["id"], rng.choice([first, second])
                kind = rng.randrange(4)
                if kind == 0:
                    answer = other.ask(memory=name)
                elif kind == 1:
                    answer = other.client.get(MEMORIES)
                elif kind == 2:
                    answer = other.client.post(f"{MEMORIES}/{name}/fork")
                    if answer.status_code == 201:
                        other.client.delete(f"{MEMORIES}/{answer.json()['id']}")
                else:
                    answer = other.client.delete(f"{MEMORIES}/{name}")
                statuses.append(answer.status_code)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(load, range(8)))
        # 409: somebody deleted it while it was made.
        assert set(statuses) <= {200, 201, 404, 409, 429}, set(statuses)
        name = first.remember(text).json()["id"]
        assert (
            second.ask(memory=name).json()["choices"]
            == first.ask(memory=name).json()["choices"]
        )
        assert second.client.delete(f"{MEMORIES}/{name}").status_code == 200
        assert first.client.get(f"{MEMORIES}/{name}").status_code == 404
        assert first.ask(memory=name).status_code == 404
        for server in (first, second):
            server.signal(signal.SIGTERM)
        for server in (first, second):
            code, said = server.end()
            assert code == 0 and "Traceback" not in said, said
    check_files(tmp_path, tiny)
    assert not list(tmp_path.glob(".*partial"))


# --- ended -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_answers_end_and_the_server_after_them(tmp_path, number):
    with serving(tmp_path) as server:
        asked = {"prompt": "hello", "max_tokens": 900, "temperature": 0, "stream": True}
        whole = server.ask(max_tokens=900, stream=False).json()["choices"][0]["text"]
        idle = httpx.Client(base_url=server.url)
        assert idle.get("/health").status_code == 200  # and is left open
        got = []
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            server.client.stream("POST", COMPLETIONS, json=asked) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    got.append(line[6:])
                    if len(got) == 2:
                        server.signal(number)
        begin = time.monotonic()
        code, said = server.end()
        assert got[-1] == "[DONE]", (code, said, got[-1])
        texts = [json.loads(x)["choices"][0]["text"] for x in got[:-1]]
        assert "".join(texts) == whole
        assert code == 0, said
        assert "Traceback" not in said, said
        assert time.monotonic() - begin < 20


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path, number):
    with serving(tmp_path, "--rows=1") as server:
        asked = {"prompt": "hello", "max_tokens": 900, "n": 100, "stream": True}
        with (
            contextlib.suppress(httpx.TransportError),
            server.client.stream("POST", COMPLETIONS, json=asked) as answer,
        ):
            for count, _ in enumerate(answer.iter_lines()):
                if count == 5:
                    server.signal(number)
                    time.sleep(0.5)
                    assert server.process.poll() is None
                    server.signal(number)
                    begin = time.monotonic()
                    server.process.wait(10)
                    assert time.monotonic() - begin < 3
        code, said = server.end()
        assert code == 128 + number
        assert "Traceback" not in said, said


@pytest.mark.slow
def test_a_signal_gives_memories_in_the_making_up(tmp_path, tiny, text):
    with serving(tmp_path) as server:
        for number in range(20):
            made = server.remember(f"{number} {text * 3}", background=True)
            assert made.status_code == 202
        server.signal(signal.SIGTERM)
        code, said = server.end()
        assert code == 0 and "Traceback" not in said, said
    check_files(tmp_path, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_programs_are_compiled_ends_the_server(tmp_path, number):
    server = Process(tmp_path)
    eventually(lambda: server.client.get("/health").status_code == 200)
    server.signal(number)
    code, said = server.end()
    assert code == 0 and "Traceback" not in said, said


# --- the folder --------------------------------------------------------------------


def full(*given, **options):
    """What writes to a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["pack", "json", "gone"])
def test_a_folder_that_takes_no_more_is_an_error_and_no_death(
    model, tmp_path, what, monkeypatch, text
):
    store = tmp_path / "store"
    with served(model, store, LIMITS) as service, logged() as log:
        first = post(service, MEMORIES, json.dumps({"text": text}).encode()).json["id"]
        if what == "pack":
            monkeypatch.setattr(Memory, "save", full)
        elif what == "json":
            monkeypatch.setattr(paths, "write_whole", full)
        else:
            for file in store.iterdir():
                file.unlink()
            store.rmdir()
            store.write_text("a file")  # where the folder was
        body = {"prompt": "a", "max_tokens": 1, "store": True}
        asked = [
            (MEMORIES, {"text": text + "!"}),
            (COMPLETIONS, body),
            *([] if what == "gone" else [(f"{MEMORIES}/{first}/fork", {})]),
        ]
        for path, fields in asked:
            answer = post(service, path, json.dumps(fields).encode())
            assert answer.status == 507, answer
            refused(answer, "folder of the store", "delete memories")
        streamed = body | {"stream": True}
        answer = post(service, COMPLETIONS, json.dumps(streamed).encode())
        assert answer.status == 200 and b"store_full" in answer.body
        streamed = {"text": text + "?", "stream": True}
        answer = post(service, MEMORIES, json.dumps(streamed).encode())
        assert answer.status == 200 and b"store_full" in answer.body
        monkeypatch.undo()
        if what == "gone":
            store.unlink()  # it is made again
        made = post(service, MEMORIES, json.dumps({"text": text + "!"}).encode())
        assert made.status == 201, made
        still_serves(service)
        assert not log.bad, log.bad[0]
        assert check_files(store, model) >= 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount")
    if done.returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def test_a_full_disk_is_an_error_until_there_is_room(model, small_disk, text):
    with served(model, small_disk / "store", LIMITS) as service, logged() as log:
        made, answer = [], None
        for number in range(60):
            body = json.dumps({"text": f"{number} {text}"}).encode()
            answer = post(service, MEMORIES, body)
            if answer.status == 507:
                break
            assert answer.status == 201
            made.append(answer.json["id"])
        assert answer is not None and answer.status == 507 and made
        assert check_files(small_disk / "store", model) == len(made)
        assert not list((small_disk / "store").glob(".*partial"))
        for name in made[:3]:
            service.store.delete(name)
        body = json.dumps({"text": f"60 {text}"}).encode()
        assert post(service, MEMORIES, body).status == 201
        still_serves(service)
        assert not log.bad, log.bad[0]
