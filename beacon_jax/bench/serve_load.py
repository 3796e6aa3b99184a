"""Measures a server under load: many clients at once, against one alone.

python -m beacon_jax.bench.serve_load [--clients=64] [--seconds=600] [--out=FILE]
python -m beacon_jax.bench.serve_load --url=http://127.0.0.1:8000 [--pid=PID]

Starts `beacon-jax serve` on the tiny model, unless --url names a server that runs. What
client i asks for the j-th time follows from the seed, i and j alone: questions to
memories that all share, streamed or whole; conversations; new memories, which several
may want at once, with what is appended to them, and deleted; streams that are left.

After the load, the first requests of the same sequences are asked by one client alone,
and by all clients of a server with --rows=1. So throughput is compared on equal work of
an equal mix. Figures are JSON: requests, statuses, tokens per second, times to the
first token and between tokens, and what the server's process holds of RAM.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from absl import app, flags

from beacon_jax.bench.records import provenance, write_json

MOST_CLIENTS, MOST_SECONDS = 512, 3600
PATIENCE = 120.0  # seconds for one request
AGAIN = 5.0  # most seconds that a client waits when the server is busy
DOCUMENT = "The key of door {0} is {1}. The door {0} leads to room {2}. "
KINDS = {  # of requests, and how often of a hundred
    "stream": 40,
    "whole": 20,
    "chat": 8,
    "memory": 12,
    "leave": 10,
    "store": 5,
    "list": 5,
}


@dataclasses.dataclass
class Figures:
    """What the requests of a phase came to.

    Attributes:
      tokens: of answers that came to their end.
      read: tokens of prompts and memories' texts.
      first, between: seconds to the first token, and from one to the next.
    """

    requests: int = 0
    tokens: int = 0
    read: int = 0
    left: int = 0
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    statuses: Counter[str] = dataclasses.field(default_factory=Counter)
    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def told(self) -> dict[str, Any]:
        """Returns them as JSON."""
        errors = {x: n for x, n in self.statuses.items() if not x.startswith("2")}
        return {
            "seconds": round(self.seconds, 2),
            "requests": self.requests,
            "requests_per_second": round(self.requests / self.seconds, 2),
            "by_kind": dict(self.kinds),
            "answers": dict(self.statuses),
            "errors": errors,
            "left_by_the_client": self.left,
            "generated_tokens": self.tokens,
            "generated_tokens_per_second": round(self.tokens / self.seconds, 1),
            "prompt_tokens_per_second": round(self.read / self.seconds, 1),
            "first_token_seconds": spread(self.first),
            "between_tokens_seconds": spread(self.between),
            "request_seconds": spread(self.whole),
        }


def spread(values: list[float]) -> dict[str, float] | None:
    """Returns the percentiles of what was measured; None: nothing was."""
    if not values:
        return None
    found = np.percentile(values, [50, 95, 99])
    named = zip(("p50", "p95", "p99"), found.tolist(), strict=True)
    return {name: round(x, 4) for name, x in named} | {"max": round(max(values), 4)}


# --- one client --------------------------------------------------------------------


class Client:
    """Asks one request after the other, those of its number."""

    def __init__(self, http: httpx.AsyncClient, figures: Figures, shared: list[str]):
        self.http, self.figures, self.shared = http, figures, shared

    async def ask(self, rng: random.Random) -> None:
        """Asks the next request of a sequence."""
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        new = rng.choice([8, 16, 32, 64])
        asked = {
            "memory": rng.choice(self.shared),
            "max_tokens": new,
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(2**31),
        }
        asked["prompt"] = f"Which door has the key {rng.randrange(1000)}?"
        begin = time.perf_counter()
        await getattr(self, f"_{kind}")(asked, rng)
        self.figures.kinds[kind] += 1
        self.figures.whole.append(time.perf_counter() - begin)

    async def _send(self, method: str, path: str, **options: Any) -> Any:
        """Sends a request, again if the server is busy; None: an error."""
        for _ in range(20):
            self.figures.requests += 1
            try:
                answer = await self.http.request(method, path, **options)
            except httpx.HTTPError as error:
                self.figures.statuses[type(error).__name__] += 1
                return None
            self.figures.statuses[str(answer.status_code)] += 1
            if answer.status_code != 429:
                return answer.json() if answer.is_success else None
            await self._wait(answer)
        return None

    async def _wait(self, answer: httpx.Response) -> None:
        wait = float(answer.headers.get("retry-after", 1))
        await asyncio.sleep(min(wait, AGAIN) * random.uniform(0.2, 1))

    async def _whole(self, asked: dict[str, Any], rng: random.Random) -> None:
        self._count(await self._send("POST", "/v1/completions", json=asked))

    def _count(self, answer: Any) -> None:
        if answer is not None:
            usage = answer["usage"]
            self.figures.tokens += usage["completion_tokens"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            self.figures.read += usage["prompt_tokens"] - cached

    async def _chat(self, asked: dict[str, Any], rng: random.Random) -> None:
        turn = {"role": "user", "content": asked.pop("prompt")}
        asked |= {"messages": [turn], "memory": None}
        self._count(await self._send("POST", "/v1/chat/completions", json=asked))

    async def _stream(self, asked: dict[str, Any], rng: random.Random) -> None:
        await self._streamed(asked, None)

    async def _leave(self, asked: dict[str, Any], rng: random.Random) -> None:
        await self._streamed(asked | {"max_tokens": 200}, rng.randrange(1, 4))

    async def _streamed(self, asked: dict[str, Any], leave: int | None) -> None:
        """Reads a stream, or leaves it after some events."""
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        for _ in range(20):
            self.figures.requests += 1
            begin, first, events = time.perf_counter(), None, 0
            try:
                async with self.http.stream(
                    "POST", "/v1/completions", json=asked
                ) as answer:
                    self.figures.statuses[str(answer.status_code)] += 1
                    async for data in _events(answer):
                        if "error" in data:
                            self.figures.statuses[data["error"]["code"]] += 1
                            return
                        now = time.perf_counter()
                        if first is None:
                            first = now
                            self.figures.first.append(now - begin)
                        if data.get("usage"):
                            self._count(data)
                            tokens = data["usage"]["completion_tokens"]
                            if tokens > 1:
                                gap = (now - first) / (tokens - 1)
                                self.figures.between.append(gap)
                        events += 1
                        if events == leave:
                            self.figures.left += 1
                            return
            except httpx.HTTPError as error:
                self.figures.statuses[type(error).__name__] += 1
                return
            if answer.status_code != 429:
                return
            await self._wait(answer)

    async def _memory(self, asked: dict[str, Any], rng: random.Random) -> None:
        # Some are wanted by several clients at once, and stay. The others are one
        # client's own, which it deletes: nobody asks for what another has deleted.
        common = rng.random() < 0.5
        number = rng.randrange(20) if common else rng.randrange(1000, 10**9)
        made = await self._made(document(1000 + number, 400))
        if made is None:
            return
        path = f"/v1/memories/{made['id']}"
        asked["memory"] = made["id"]
        answer = await self._send("POST", "/v1/completions", json=asked)
        self._count(answer)
        more = {"text": document(rng.randrange(10**6), 60)}
        if rng.random() < 0.5:
            more = await self._send("POST", f"{path}/append", json=more)
            if more is not None:
                await self._send("DELETE", f"/v1/memories/{more['id']}")
        if not common:
            await self._send("DELETE", path)

    async def _made(self, text: str) -> Any:
        made = await self._send("POST", "/v1/memories", json={"text": text})
        if made is not None:
            self.figures.read += made["tokens"]
        return made

    async def _store(self, asked: dict[str, Any], rng: random.Random) -> None:
        asked |= {"store": True}
        answer = await self._send("POST", "/v1/completions", json=asked)
        self._count(answer)
        if answer is not None and (kept := answer.get("memory")):
            await self._send("DELETE", f"/v1/memories/{kept['id']}")

    async def _list(self, asked: dict[str, Any], rng: random.Random) -> None:
        await self._send("GET", "/v1/memories")


async def _events(answer: httpx.Response) -> AsyncIterator[Any]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line[6:])


def document(number: int, words: int) -> str:
    """Writes a text of about so many words."""
    rng = random.Random(number)
    count = words // len(DOCUMENT.split())
    doors = (rng.sample(range(1000), 3) for _ in range(count))
    return "".join(DOCUMENT.format(*door) for door in doors)


# --- phases ------------------------------------------------------------------------


async def load(url: str, clients: int, seconds: float, seed: int) -> Figures:
    """Asks for some seconds; requests that have begun are waited for."""
    figures = Figures()
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as http:
        await _choose_kinds(http)
        shared = []
        for number in range(6):  # what all clients ask, of several sizes
            made = await http.post(
                "/v1/memories", json={"text": document(number, 150 * (1 + number))}
            )
            made.raise_for_status()
            shared.append(made.json()["id"])
        begin = time.perf_counter()

        async def client(number: int) -> None:
            asking, turn = Client(http, figures, shared), 0
            while time.perf_counter() < begin + seconds:
                await asking.ask(random.Random(f"{seed} {number} {turn}"))
                turn += 1

        await asyncio.gather(*(client(number) for number in range(clients)))
        figures.seconds = time.perf_counter() - begin
    return figures


async def _choose_kinds(http: httpx.AsyncClient) -> None:
    """Leaves conversations out if the model has no chat template."""
    told = (await http.get("/v1/models")).raise_for_status().json()["data"][0]
    if not told["chat"]:
        KINDS.pop("chat", None)


class Watch:
    """Reads what a process holds of RAM, once a second."""

    def __init__(self, pid: int | None):
        self.pid, self.found = pid, []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while self.pid is not None:
            with contextlib.suppress(OSError):
                self.found.append(rss(self.pid))
            if self._ended.wait(1):
                return

    def told(self) -> dict[str, float] | None:
        """Returns MiB at the start, in the middle and at the end, and growth."""
        if not self.found:
            return None
        mib = [x / 2**20 for x in self.found]
        middle, end = mib[len(mib) // 2], mib[-1]
        return {
            "start_mib": round(mib[0], 1),
            "middle_mib": round(middle, 1),
            "end_mib": round(end, 1),
            "most_mib": round(max(mib), 1),
            "growth_second_half_mib": round(end - middle, 1),
        }


def rss(pid: int) -> int:
    """Returns the bytes of RAM that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def server(model: str, rows: int, clients: int) -> Iterator[tuple[str, int]]:
    """Runs a server; yields its address and its process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "beacon_jax", "serve", f"--model={model}"]
        given = ["--port=0", f"--rows={rows}", "--slots=1024", f"--queue={4 * clients}"]
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *given, f"--store={folder}/store"], stdout=file, stderr=file
            )
        try:
            url = _wait(process, log)
            yield url, process.pid
        finally:
            died = process.poll()
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        said = log.read_text()
        if died is not None or "Traceback" in said:
            print(f"server: exit code {died}\n{said[-5000:]}", file=sys.stderr)


def _wait(process: subprocess.Popen[Any], log: Path) -> str:
    """Waits until a server answers; returns its address."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"open (http://\S+)", log.read_text()):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{found[1]}/ready").status_code == 200:
                    return found[1]
        time.sleep(0.2)
    sys.exit(f"error: the server did not start:\n{log.read_text()}")


def measured(
    url: str, pid: int | None, clients: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Measures one phase."""
    with Watch(pid) as watch:
        figures = asyncio.run(load(url, clients, seconds, seed))
    return {"clients": clients} | figures.told() | {"rss": watch.told()}


def main(argv: list[str]) -> None:
    del argv
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    o = flags.FLAGS
    clients = min(o.clients, MOST_CLIENTS)
    seconds = min(o.seconds, MOST_SECONDS)
    alone = min(max(seconds / 4, 10), 120)  # of the phases to compare with
    told: dict[str, Any] = provenance() | {"model": o.url or o.model, "rows": o.rows}
    if o.url:
        told["load"] = measured(o.url, o.pid, clients, seconds, o.seed)
        told["one_client"] = measured(o.url, o.pid, 1, alone, o.seed)
    else:
        with server(o.model, o.rows, clients) as (url, pid):
            measured(url, pid, 4, 5, o.seed + 1)  # what is compiled late, is now
            told["load"] = measured(url, pid, clients, seconds, o.seed)
            told["one_client"] = measured(url, pid, 1, alone, o.seed)
        with server(o.model, 1, clients) as (url, pid):
            measured(url, pid, 4, 5, o.seed + 1)
            told["one_row"] = measured(url, pid, clients, alone, o.seed)
    name = "generated_tokens_per_second"
    for other in ("one_client", "one_row"):
        if other in told and told[other][name]:
            times = told["load"][name] / told[other][name]
            told[f"tokens_per_second_against_{other}"] = round(times, 2)
    print(json.dumps(told, indent=1))
    if o.out:
        write_json(Path(o.out), told)
    if errors := {x for x in told["load"]["errors"] if x not in ("404", "409", "429")}:
        sys.exit(f"error: answers that should not be: {', '.join(sorted(errors))}")


if __name__ == "__main__":
    flags.DEFINE_integer("clients", 64, f"At once, up to {MOST_CLIENTS}.")
    flags.DEFINE_float("seconds", 600, f"Of the load, up to {MOST_SECONDS}.")
    flags.DEFINE_string("model", "tiny-beacon", "Of the server that is started.")
    flags.DEFINE_integer("rows", 32, "Of the server that is started.")
    flags.DEFINE_string("url", None, "Of a server that runs; none is started.")
    flags.DEFINE_integer("pid", None, "Of its process, to watch its RAM.")
    flags.DEFINE_integer("seed", 0, "Of the requests.")
    flags.DEFINE_string("out", None, "File for the figures.")
    app.run(main)
