"""A server of two processes, whose devices hold one model."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serving.conftest import eventually


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def processes(tmp_path):
    """Starts the command twice; yields the address and both processes."""
    port, meeting = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "beacon_jax.serve", "--model=tiny-beacon"),
        *("--mesh=tensor:2", "--slots=512", "--rows=3", f"--port={port}"),
        *("--distributed", "--control=127.0.0.1", f"--store={tmp_path / 'store'}"),
    ]
    started = []
    for number in range(2):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{meeting}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
        log = (tmp_path / f"{number}.log").open("w")
        started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    address = f"http://127.0.0.1:{port}"

    def ready():
        assert [p.poll() for p in started] == [None, None], logs(tmp_path)
        try:
            return httpx.get(f"{address}/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(ready, 280)
        yield address, started
    finally:
        for process in started:
            process.kill()
            process.wait()


def logs(folder):
    return "\n".join(file.read_text()[-3000:] for file in folder.glob("*.log"))


@pytest.mark.slow
def test_two_processes_answer_as_one(processes, model, text, tmp_path):
    address, started = processes
    here = model.compress(text, ratio=8)
    with httpx.Client(base_url=address, timeout=200) as client:
        post = lambda path, **body: client.post(path, json=body)
        made = post("/v1/memories", text=text, ratio=8).json()
        assert made["slots"] == here.entries[0]
        prompts = ["The key", "door 5", "A", "The key of door 17 is"]

        def ask(prompt):
            body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
            answer = post("/v1/completions", **body, memory=made["id"]).json()
            return answer["choices"][0]["text"]

        def read(number):
            body = {"text": text[number:], "ratio": 4}
            return post("/v1/memories", **body).status_code

        # Texts are read, and one is given up, while answers grow.
        with ThreadPoolExecutor(8) as pool:
            read_too = [pool.submit(read, number) for number in (1, 2)]
            with pytest.raises(httpx.TimeoutException):
                gone = {"text": text[3:], "ratio": 2}
                httpx.post(f"{address}/v1/memories", json=gone, timeout=0.05)
            answers = list(pool.map(ask, prompts * 2))
            assert [x.result() for x in read_too] == [201, 201]
        for prompt, answer in zip(prompts * 2, answers, strict=True):
            want = model.complete(prompt, memory=here, max_new_tokens=20)
            assert answer == want.text
        kept = post(
            "/v1/completions", prompt="x", max_tokens=5, store=True, memory=made["id"]
        )
        more = post(
            f"/v1/memories/{kept.json()['memory']['id']}/append", text="And on."
        )
        assert more.status_code == 201, more.text
        method = post("/v1/memories", text=text, ratio=4, method="snapkv")
        assert method.status_code == 201, method.text
        refused = post("/v1/memories", text=text, max_slots=3)
        assert refused.status_code == 400, refused.text
        assert ask("door 5") == answers[1]
    started[0].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in started] == [0, 0], logs(tmp_path)
