"""A server on the tiny model, in this process, for the tests of a module."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import beacon_jax
from beacon_jax.inference.model import Model
from beacon_jax.serving.listen import Server
from beacon_jax.serving.service import Limits, Service
from beacon_jax.serving.store import Store

LIMITS = Limits(rows=4, slots=1024, ratio=8, queue=64, seconds=5.0)
# The turns of a conversation in plain words; the tiny model's tokenizer has none.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="package")
def model() -> Model:
    """The tiny model, with a chat template."""
    loaded = beacon_jax.load("tiny-beacon")
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


@contextmanager
def served(
    model: Model, folder: Path | None = None, limits: Limits = LIMITS
) -> Iterator[Service]:
    """Serves a model at `service.address`, until the block ends."""
    service = Service(model, "tiny", Store(model, folder, 2**30), limits)
    server = Server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: service.ready.is_set() or service.failed is not None, 240)
    assert service.failed is None, service.failed
    service.address = server.address  # type: ignore[attr-defined]
    service.server = server  # type: ignore[attr-defined]
    try:
        yield service
    finally:
        server.stop()
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="package")
def service(model, tmp_path_factory) -> Iterator[Service]:
    """A server with a store."""
    with served(model, tmp_path_factory.mktemp("store")) as service:
        yield service


@pytest.fixture(scope="package")
def server_url(service) -> str:
    """The address of the server."""
    return service.address


@pytest.fixture
def client(server_url) -> Iterator[httpx.Client]:
    """An HTTP client of the server."""
    with httpx.Client(base_url=server_url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def text() -> str:
    """A text of a few hundred tokens."""
    numbers = [f"The key of door {i} is {(i * 7919) % 1000}. " for i in range(60)]
    return "".join(numbers)


def eventually(check: Callable[[], bool], seconds: float = 30) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.02)
