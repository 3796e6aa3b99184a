"""Eight virtual CPU devices, and compiled programs that go with their file."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

from beacon_jax import runtime

runtime.prepare()  # two threads per device, before a test starts the backend


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_file_only():
    """XLA maps memory for every CPU program (32,000 mappings after test_properties, 700
    once cleared). Beyond Linux's 65,530 per process the next program aborts it."""
    yield
    jax.clear_caches()
    gc.collect()
