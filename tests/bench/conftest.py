"""One run of every part, which most tests look at."""

import dataclasses
from pathlib import Path

import jax
import pytest

from beacon_jax.bench import runner
from beacon_jax.model import presets
from tests.bench.nano import NANO, options


@pytest.fixture(autouse=True, scope="session")
def nano():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "nano", NANO)
        yield


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    rows: list


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """One run of all parts."""
    out = tmp_path_factory.mktemp("bench")
    given = options(f"--out={out}")
    return Run(out, runner.run_all(given, list(runner.PARTS)))


@pytest.fixture
def device():
    return jax.devices()[0]
