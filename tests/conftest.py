"""What every test process starts with: eight virtual CPU devices, cheap compilation,
and programs that all processes share. Shapes and types that signatures of the core, the
decoder and attention state are checked at every call.

Compiling is most of what the tests cost. So programs are kept in `.cache/xla` of the
checkout: the other worker, a subprocess, and the next run find them there. And XLA does
little optimising, which takes a third off. A module that asserts bits or recorded
numbers has `pytestmark = pytest.mark.optimized`: `make test-all` compiles it as users
compile, `make test` like all others (its tests must pass either way).
"""

import gc
import os
import shutil
import signal
import threading
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

from beacon_jax import runtime

runtime.prepare()  # two threads per device, before a test starts the backend
# Before the first import of them. Subprocesses run unchecked, as users do.
CHECKED = [
    "attention",
    "core",
    *(
        f"model.{name}"
        for name in (
            "beacon",
            "buffers",
            "decoder",
            "layout",
            "net",
            "quantize",
            "rotary",
            "scatter",
        )
    ),
]
install_import_hook([f"beacon_jax.{room}" for room in CHECKED], "beartype.beartype")


ROOT = Path(__file__).parents[1]
LAST_CHECK = [0.0]
CACHE_BYTES = 2 * 2**30
# Linux allows 65,530 memory mappings per process. XLA makes some for every CPU program,
# a gradient on a mesh 1,500; beyond the limit the next program aborts the process.
MAX_MAPS = 40_000
CHECK_SECONDS = 1.0  # counting 30,000 maps takes 35 ms


# Cases, mostly of parametrized tests, that took more than five seconds each. `make
# test` leaves them to `make test-all`. They are 40 % of its time, but most of that is
# programs which others compile then: 16 minutes in place of 17.5.
SLOW_CASES = frozenset((ROOT / "tests" / "slow_cases.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid in SLOW_CASES:
            item.add_marker("slow")


def pytest_configure(config):
    """Starts the checkout's cache anew when it has grown too large."""
    cache = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    worker = hasattr(config, "workerinput")  # one process of a run looks after it
    if worker or ROOT not in cache.parents or not cache.is_dir():
        return
    if sum(file.stat().st_size for file in cache.iterdir()) > CACHE_BYTES:
        shutil.rmtree(cache)


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """Optimised ones where the module asks for it."""
    marked = request.node.get_closest_marker("optimized") is not None
    optimized = marked and request.config.option.markexpr != "not slow"
    before = jax.config.read("jax_disable_most_optimizations")
    if optimized and before:  # no part of the key of programs in this process
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    if optimized and before:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def room():
    """Room for the programs of the next test; those of this one may go."""
    yield
    if time.monotonic() - LAST_CHECK[0] < CHECK_SECONDS:
        return
    if maps() > MAX_MAPS:
        jax.clear_caches()
        gc.collect()
    LAST_CHECK[0] = time.monotonic()


@pytest.fixture(autouse=True)
def interrupts():
    """A command that ran in this process has an answer of its own to Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    signal.signal(signal.SIGINT, before)
    signal.set_wakeup_fd(wakeup)


def maps() -> int:
    """Memory mappings of this process; 0 where the system does not tell."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0
