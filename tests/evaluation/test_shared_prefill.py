"""Memories that methods make of one full prefill are those that each makes alone."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from beacon_jax.evaluation import peak, prefill, reading
from beacon_jax.evaluation.baselines import make_methods, shortened
from beacon_jax.evaluation.methods import remember_prompts
from beacon_jax.evaluation.prefill import Prefill
from beacon_jax.evaluation.reading import answer_losses, load_model, read
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.hf.checkpoint import save_hf
from beacon_jax.inference.compressors import retention
from beacon_jax.inference.compressors.retention import Retention
from tests.evaluation.conftest import WINDOW

pytestmark = pytest.mark.optimized

# All that keep something of what full attention made, and some that do not.
METHODS = [
    "full",
    "snapkv",
    "expected-attention",
    "kvzip",
    "attention-matching",
    "mean-pool",
    "streaming",
    "random",
    "snapkv_aware",
    "selective",
    "int8",
    "window",
]
LENGTH = 5 * WINDOW


@pytest.fixture(scope="module")
def plain_folder(model_folder, tmp_path_factory):
    """The model's folder without its beacons."""
    folder = tmp_path_factory.mktemp("plain")
    model = load_model(model_folder, ())
    params = dict(model.variables["params"])
    config = dataclasses.replace(model.config, beacon=None)
    save_hf(folder / "hf", config, {"params": _without_beacons(params)})
    for file in Path(model_folder).iterdir():
        if not (folder / "hf" / file.name).exists():
            shutil.copy(file, folder / "hf")
    return str(folder / "hf")


def _without_beacons(tree):
    if not isinstance(tree, dict):
        return np.asarray(tree)
    return {k: _without_beacons(v) for k, v in tree.items() if "beacon" not in k}


@pytest.fixture(
    scope="module",
    params=[
        ("beacons", "float32"),
        ("beacons", "bfloat16"),
        ("none", "float32"),
        ("none", "bfloat16"),
    ],
    ids="-".join,
)
def made(request, model_folder, plain_folder):
    """A model with beacons or without, in some dtype."""
    kind, dtype = request.param
    if kind == "beacons":
        return load_model(model_folder, (), dtype=dtype)
    return load_model(plain_folder, (), window=WINDOW, dtype=dtype)


@pytest.fixture(scope="module")
def scores(model, tmp_path_factory):
    """A folder of retention for the model."""
    c, folder = model.config, tmp_path_factory.mktemp("retention") / "scores"
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(c.num_layers, c.num_kv_heads, c.head_dim))
    sample = retention.sample_of(model.variables)
    Retention(weights.astype(np.float32), 0.5, 0.0, sample).save(folder)
    return f"retention:{folder}"


def prompts(*sizes):
    rng = np.random.default_rng(3)
    return [rng.integers(5, 300, n).astype(np.int32) for n in sizes]


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.slow
# Ragged: whole windows and not, a past of nothing, and each row's last window open.
def test_a_shared_prefill_leaves_the_bits_of_a_reading_alone(made, scores):
    rows, shared = prompts(LENGTH - 9, 70, 20, 3 * WINDOW), Prefill()
    for method in make_methods([*METHODS, scores], [2, 4]):
        found = []
        for given in (shared, None):
            sized = method.sized(LENGTH, given)
            memory, rest, kept = remember_prompts(made, sized, rows)
            logits, after = read(made, rest, 0, memory)
            losses = answer_losses(made, after, logits, prompts(*[5] * len(rows)), 0)
            found.append((bits(memory.state), bits(after.state), losses, kept))
        assert found[0] == found[1], method.name


@pytest.mark.slow
def test_predictions_of_cells_together_are_those_of_each_alone(
    model, scores, settings, tmp_path
):
    tasks = make_tasks(["passkey"])
    names = ["full", "snapkv", "streaming", "kvzip", "mean-pool", scores]
    cells = make_methods(names, [2, 4])
    settings = dataclasses.replace(settings, lengths=(128,), samples=3, batch_size=2)
    evaluate(model, tasks, cells, settings, tmp_path / "all")
    for cell in cells:
        evaluate(model, tasks, [cell], settings, tmp_path / cell.name)
        file = Path("predictions") / f"passkey.{cell.name}.jsonl"
        together, alone = (tmp_path / x / file for x in ("all", cell.name))
        assert together.read_bytes() == alone.read_bytes()


def test_rows_are_read_once_whatever_the_methods_and_ratios(model, monkeypatch):
    reads, once = [], reading.read

    def counted(model, rows, ratio, *args, **options):
        reads.append(len(rows))
        return once(model, rows, ratio, *args, **options)

    monkeypatch.setattr(reading, "read", counted)
    asked, inform = [], shortened.self_information
    monkeypatch.setattr(
        shortened, "self_information", lambda *x: asked.append(1) or inform(*x)
    )
    shared, rows = Prefill(), prompts(LENGTH - 9, 70)
    names = ["full", "snapkv", "random", "kvzip", "snapkv_aware", "snapkv_aware_recent"]
    for method in make_methods(names, [2, 4]):
        remember_prompts(model, method.sized(LENGTH, shared), rows)
    assert len(reads) == 2  # the past, and the question of snapkv_aware
    for method in make_methods(["selective", "selective_recent"], [2, 4]):
        remember_prompts(model, method.sized(LENGTH, shared), rows)
    assert len(asked) == 1 and len(reads) == 2 + 4  # and the tokens that each keeps


def test_without_room_for_a_second_memory_nothing_is_kept_or_copied(model, monkeypatch):
    monkeypatch.setattr(prefill, "free_slots", lambda *_: 2 * LENGTH)
    shared, rows = Prefill(), prompts(2 * WINDOW)
    monkeypatch.setattr(prefill.jnp, "copy", None)
    first = shared.copy(model, rows, LENGTH)
    assert shared.copy(model, rows, LENGTH) is not first


def test_the_peak_is_that_of_a_method_alone(model, monkeypatch):
    use = {"now": 100, "peak": 100}

    class Fake(peak.Meter):
        def begin(self, held):
            self.base = use["now"] - held
            self.restart()

        def restart(self):
            use["peak"] = use["now"]

        def highest(self):
            return use["peak"] - self.base

    def take(most, stays=0):
        use["peak"] = max(use["peak"], use["now"] + most)
        use["now"] += stays

    monkeypatch.setattr(prefill, "Meter", Fake)
    shared, rows = Prefill(), prompts(2 * WINDOW)
    size = reading.read(model, rows, 0, longest=LENGTH)[1].nbytes
    once = reading.read
    monkeypatch.setattr(
        reading, "read", lambda *a, **o: take(3 * size, size) or once(*a, **o)
    )
    shared.begin()
    shared(model, rows, LENGTH)
    take(size)  # its question and answer
    assert shared.peak() == 3 * size
    for _ in range(2):  # another reads a copy, asks once, and answers
        shared.begin()
        shared.copy(model, rows, LENGTH)
        take(size, size)
        shared.once(model, rows, "x", lambda: take(5 * size) or 0)
        take(size, -size)
        assert shared.peak() == 6 * size
    shared.begin()  # one that starts from nothing pays for nothing of this
    take(size // 2)
    assert shared.peak() == size // 2


@pytest.mark.skipif(not peak.CLEAR.exists(), reason="Linux counts it")
def test_linux_counts_the_peak_anew():
    meter = peak.Meter()
    meter.begin(0)
    big = np.ones(2**25)  # 256 MiB
    assert meter.highest() > 200 * 2**20
    del big
    meter.restart()
    assert meter.highest() < 100 * 2**20


def test_a_device_that_counts_since_the_program_began_tells_what_rises(monkeypatch):
    stats = {"bytes_in_use": 10, "peak_bytes_in_use": 50}
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    meter = peak.Meter()
    meter.begin(0)
    assert meter.highest() == 0
    stats["peak_bytes_in_use"] = 70
    assert meter.highest() == 60
    meter.restart()
    assert meter.highest() == 0
