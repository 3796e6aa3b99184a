"""The pool of threads of CPU devices, launches in flight, compiled programs on disk."""

import os
import stat
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beacon_jax import runtime
from beacon_jax.runtime import LaunchLimit, cache_folder, enable_compilation_cache

# --- threads of CPU devices ------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch):
    """A process of a two-core machine that has not imported jax yet."""
    for name in ("PJRT_NPROC", "NPROC", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.delitem(sys.modules, "jax._src.xla_bridge")
    runtime._warn_once.cache_clear()
    return monkeypatch


def pool():
    runtime.prepare()
    return os.environ.get("PJRT_NPROC")


def test_these_tests_have_two_threads_per_device():
    threads = os.environ.get("PJRT_NPROC") or len(os.sched_getaffinity(0))
    assert int(threads) >= 2 * jax.device_count()


def test_one_device_needs_nothing(fresh):
    assert pool() is None
    fresh.setenv("JAX_NUM_CPU_DEVICES", "1")
    assert pool() is None


def test_devices_of_the_environment_get_two_threads_each(fresh):
    fresh.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=3")
    assert pool() == "6"
    fresh.delenv("PJRT_NPROC")
    fresh.setenv("JAX_NUM_CPU_DEVICES", "2")  # jax asks this one first
    assert pool() == "4"


def test_several_devices_wait_for_each_other_on_a_busy_machine(fresh):
    runtime.prepare()
    assert "XLA_FLAGS" not in os.environ
    fresh.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    for _ in range(2):
        runtime.prepare()
        assert os.environ["XLA_FLAGS"] == (
            "--xla_force_host_platform_device_count=2 "
            "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        )
    own = "--xla_cpu_collective_call_terminate_timeout_seconds=5"
    fresh.setenv("XLA_FLAGS", own)
    fresh.setenv("JAX_NUM_CPU_DEVICES", "2")
    runtime.prepare()
    assert os.environ["XLA_FLAGS"] == own


def test_devices_of_jax_config_count_once_jax_is_imported(fresh):
    fresh.setenv("JAX_NUM_CPU_DEVICES", "2")
    config = types.SimpleNamespace(jax_num_cpu_devices=4)
    fresh.setitem(sys.modules, "jax", types.SimpleNamespace(config=config))
    assert pool() == "8"


def test_a_pool_that_is_large_enough_stays(fresh):
    fresh.setenv("JAX_NUM_CPU_DEVICES", "2")
    fresh.setenv("PJRT_NPROC", "5")
    assert pool() == "5"
    fresh.delenv("PJRT_NPROC")
    fresh.setattr(os, "sched_getaffinity", lambda _: set(range(4)), raising=False)
    assert pool() is None  # as many as cores: already enough


def test_a_pool_that_is_too_small_is_raised_with_one_warning(fresh):
    fresh.setenv("JAX_NUM_CPU_DEVICES", "2")
    fresh.setenv("PJRT_NPROC", "3")
    with pytest.warns(RuntimeWarning, match=r"PJRT_NPROC=3 is too small.*now 4") as all:
        assert pool() == "4"
        fresh.setenv("PJRT_NPROC", "3")
        assert pool() == "4"
    assert len(all) == 1


STARTED = """
import jax, warnings
jax.config.update("jax_num_cpu_devices", 3)
jax.devices()
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import beacon_jax
    from beacon_jax.model.partition import make_partition
    make_partition("tensor:2")
assert jax.device_count() == 3
print([str(w.message) for w in found if w.category is RuntimeWarning])
"""


def test_a_program_that_started_jax_before_is_warned_once():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "2"}
    found = subprocess.run(
        [sys.executable, "-c", STARTED],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count("jax runs 3 CPU devices on 3 threads") == 1
    assert found.stdout.count("Set PJRT_NPROC=6 in the environment") == 1


# --- launches in flight ----------------------------------------------------------


class Launch:
    """Stands for an array of a launch that ends when it is waited for."""

    def __init__(self, waited, *, ready=False):
        self.is_ready = lambda: ready
        self.is_deleted = lambda: False
        self.block_until_ready = lambda: waited.append(self)


def test_launches_wait_for_the_one_of_so_many_before(monkeypatch):
    monkeypatch.setattr(runtime, "_on_cpu_devices", lambda x: True)
    limit, waited = LaunchLimit(3), []
    launches = [Launch(waited) for _ in range(5)]
    for launch in launches:
        limit(launch)
    assert waited == launches[:2]


def test_launches_that_are_done_are_let_go(monkeypatch):
    monkeypatch.setattr(runtime, "_on_cpu_devices", lambda x: True)
    limit, waited = LaunchLimit(3), []
    for _ in range(9):
        limit(Launch(waited, ready=True))
    assert not waited and len(limit._ahead) == 1


def test_only_arrays_on_several_cpu_devices_count():
    limit = LaunchLimit()
    limit(jnp.ones(2))
    limit(np.ones(2))
    jax.jit(lambda x: limit(x))(jnp.ones(2))
    assert not limit._ahead
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    limit(jax.device_put(jnp.ones(2), NamedSharding(mesh, PartitionSpec("data"))))
    assert len(limit._ahead) == 1


def stress(*options):
    """The exit status and the output of `make stress`, one round."""
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "beacon_jax.bench.stress_collectives",
            "--rounds=1",
            *options,
        ],
        capture_output=True,
        text=True,
    )
    return found.returncode, found.stdout + found.stderr


def test_the_stress_script_ends_a_program_that_makes_no_progress():
    status, output = stress("--patience=0.1")
    assert status == 1, output
    assert "0 of 30,000 launches on 2 devices" in output
    assert "no progress for" in output and "1 of 1 rounds hung" in output


@pytest.mark.slow
def test_the_stress_script_ends_well():
    status, output = stress("--launches=200")
    assert status == 0, output
    assert "200 of 200 launches on 2 devices" in output


# --- compiled programs -----------------------------------------------------------


@pytest.fixture
def no_cache(monkeypatch, tmp_path):
    """A user without a cache; what was set before comes back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_the_cache_is_the_users_alone_by_default(no_cache, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "beacon_jax" / "xla"
    assert enable_compilation_cache() == str(folder)
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/beacon_jax/xla")


def test_a_cache_that_jax_has_already_is_kept(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert enable_compilation_cache() == str(tmp_path / "mine")
    assert not (tmp_path / "cache").exists()
    assert enable_compilation_cache("off") is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_or_a_url_can_be_given(no_cache, tmp_path):
    assert enable_compilation_cache(str(tmp_path / "a/b")) == str(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    assert enable_compilation_cache("gs://bucket/xla") == "gs://bucket/xla"


def test_a_folder_that_cannot_be_written_is_an_error_if_asked_for(
    no_cache, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "xla")
    with pytest.raises(ValueError, match=r"compilation_cache='.*file/xla' cannot be"):
        enable_compilation_cache(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert enable_compilation_cache() is None
    assert "programs are compiled in every run" in caplog.text


PROGRAM = """
import jax, jax.numpy as jnp
from beacon_jax import runtime
runtime.MIN_COMPILE_SECONDS = 0.0
jax.jit(lambda x: x - 1)(1.0)  # compiled before: no reason to miss the next one
runtime.enable_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((4, 4)))
print(sum(name.endswith("/cache_hits") for name in hits))
"""


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    assert [int(r.stdout) > 0 for r in runs] == [False, True], runs[1].stderr
    assert [*(tmp_path / "beacon_jax" / "xla").glob("*-cache")]
