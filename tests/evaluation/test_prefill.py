"""One full prefill of a batch serves all methods that start from it."""

import json

import numpy as np
import pytest

from beacon_jax.evaluation import prefill, reading
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.inference import compressors

FROM_FULL = [
    "full",
    "snapkv",
    "snapkv_recent",
    "random",
    "strided",
    "mean-pool",
    "expected-attention",
    "kvzip",
    "attention-matching",
]


@pytest.fixture
def full_reads(monkeypatch):
    """The rows of each reading without compression."""
    found, read = [], reading.read

    def counted(model, rows, ratio, *args, **options):
        if ratio == 0 and not args:
            found.append(len(rows))
        return read(model, rows, ratio, *args, **options)

    monkeypatch.setattr(reading, "read", counted)
    return found


def predictions(out):
    return {file.name: file.read_bytes() for file in out.rglob("predictions/*.jsonl")}


@pytest.mark.slow
def test_methods_predict_together_what_each_predicts_alone(
    model, settings, full_reads, tmp_path
):
    tasks = make_tasks(["perplexity"])
    evaluate(model, tasks, make_methods(FROM_FULL, [2, 4]), settings, tmp_path / "all")
    together = len(full_reads)
    alone = {}
    for name in FROM_FULL:
        out = tmp_path / name
        evaluate(model, tasks, make_methods([name], [2, 4]), settings, out)
        alone |= predictions(out)
    assert predictions(tmp_path / "all") == alone
    batches = len(settings.lengths) * -(-settings.samples // settings.batch_size)
    assert together == batches
    assert len(full_reads) - together == batches * len(FROM_FULL)


def test_the_model_is_asked_once_for_all_ratios(model, settings, monkeypatch, tmp_path):
    asked, observe = [], compressors.KVzip.observe

    def counted(self, piece):
        asked.append(len(piece.stop))
        return observe(self, piece)

    monkeypatch.setattr(compressors.KVzip, "observe", counted)
    methods = make_methods(["kvzip", "kvzip_recent"], [2, 4])
    evaluate(model, make_tasks(["perplexity"]), methods, settings, tmp_path)
    batches = len(settings.lengths) * -(-settings.samples // settings.batch_size)
    assert len(asked) == batches


def test_shared_seconds_count_for_every_method(model, settings, monkeypatch, tmp_path):
    class Slow(prefill.Stopwatch):
        def read(self):
            return 100.0, 0.0

    monkeypatch.setattr(prefill, "Stopwatch", Slow)
    methods = make_methods(["full", "strided", "window"], [4])
    evaluate(model, make_tasks(["perplexity"]), methods, settings, tmp_path)
    for name, shares in (("full", False), ("strided_x4", True), ("window", False)):
        file = tmp_path / "timings" / f"perplexity.{name}.jsonl"
        seconds = [json.loads(line)["seconds"][0] for line in file.open()]
        assert all((s > 100) == shares for s in seconds)


def test_other_texts_and_sizes_are_read_anew(model, full_reads):
    shared = prefill.Prefill()
    w = model.window
    rows = [np.arange(w, dtype=np.int32) % 7, np.arange(w, dtype=np.int32) % 5]
    first = shared(model, rows, 4 * w)
    assert shared(model, rows, 4 * w) is first
    assert shared(model, rows[::-1], 4 * w) is not first
    assert shared(model, rows, 2 * w).capacity < first.capacity
    assert len(full_reads) == 3
