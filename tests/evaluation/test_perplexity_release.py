"""Perplexity by the release's protocol, against numpy and by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import TaskData
from beacon_jax.evaluation.methods import Method
from beacon_jax.evaluation.tasks.perplexity_release import (
    PerplexityRelease,
    parts,
    stride,
)
from beacon_jax.hf.reader import open_hf
from beacon_jax.inference.verify import numpy_logits


@pytest.fixture(scope="module")
def short(small):
    return dataclasses.replace(small, lengths=(96,), samples=2)


@pytest.fixture(scope="module")
def found(long_model, short):
    return PerplexityRelease().examples(
        long_model, short, TaskData(short, long_model.tokenizer)
    )


def run(model, method, found):
    task = PerplexityRelease()
    rows = []
    for i in range(0, len(found), 2):
        batch = [found[i], found[min(i + 1, len(found) - 1)]]
        answers = task.run(model, method, batch)[: len(found) - i]
        rows += [
            {"method": method.name, "ratio": method.ratio, "length": e.length}
            | e.info
            | a
            for e, a in zip(batch, answers, strict=False)
        ]
    return rows


def losses_of(model, tokens):
    """Loss of every token but the first, by an independent forward pass."""
    logits = numpy_logits(model.config, open_hf(model.path), tokens[:-1])
    logits = logits.astype(np.float64)
    top = logits.max(-1)
    norm = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return norm - np.take_along_axis(logits, tokens[1:, None], 1)[:, 0]


def test_windows_begin_every_stride_and_score_what_is_new():
    assert [stride(n, 32) for n in (64, 96, 128, 100_000)] == [32, 32, 64, 49_984]
    assert parts(50, 64, 32) == [(0, 50, 0)]
    assert parts(100, 64, 32) == [(0, 64, 0), (32, 96, 64), (64, 100, 96)]
    four = parts(10_000, 64, 32)
    assert four == [(0, 64, 0), (32, 96, 64), (64, 128, 96), (96, 160, 128)]


def test_full_attention_is_the_mean_of_documents_of_windows_in_numpy(
    long_model, short, found
):
    """Brute force over the documents themselves, not over the task's examples."""
    inputs = TaskData(short, long_model.tokenizer)
    documents = [
        np.asarray(long_model.tokenizer(text)["input_ids"], np.int32)
        for text in inputs.documents
    ]
    means = []
    for d in sorted({e.info["document"] for e in found}):
        scored, total, start = 0, 0.0, 0
        tokens = documents[d]
        for start in range(0, 4 * 32, 32):
            window = tokens[start : start + 96]
            losses = losses_of(long_model, window)
            new = start + len(window) - max(scored, start + 1)
            total += losses[-new:].sum()
            scored = start + len(window)
        means.append(total / (scored - 1))
    rows = run(long_model, make_methods(["full"], [])[0], found)
    metrics = {m["metric"]: m for m in PerplexityRelease().score(rows)}
    assert metrics["loss"]["value"] == pytest.approx(np.mean(means), abs=1e-4)
    want = math.exp(np.mean(means))
    assert metrics["perplexity"]["value"] == pytest.approx(want, rel=1e-3)
    assert metrics["loss"]["detail"] and metrics["perplexity"]["count"] == len(means)


def test_reading_on_equals_a_memory_made_anew_for_every_window(long_model, found):
    for name, ratios in (("beacon", [4]), ("full", [])):
        (method,) = make_methods([name], ratios)
        on = run(long_model, method, found)
        other = _plain(method)
        anew = run(long_model, other, found)
        for a, b in zip(on, anew, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
            assert (a["tokens"], a["kv_bytes"]) == (b["tokens"], b["kv_bytes"])


def _plain(method):
    """The same method, as any baseline is: not known to go on from its memory."""

    class Plain(Method):
        family = "plain"

        def remember(self, model, past, following):
            return method.remember(model, past, following)

    made = Plain()
    made.ratio, made.live_ratio = method.ratio, method.live_ratio
    return made


def test_a_beacon_method_with_another_memory_is_measured_with_its_own(
    long_model, found
):
    """int8 beacons are beacons by class, but their bytes and losses differ."""
    beacon, int8 = make_methods(["beacon", "beacon_int8"], [4])
    first = found[:2]
    for a, b in zip(
        run(long_model, beacon, first), run(long_model, int8, first), strict=True
    ):
        assert 0 < b["kv_bytes"] < a["kv_bytes"] / 2
        assert b["loss"] != a["loss"] == pytest.approx(b["loss"], abs=0.05)


def test_a_limit_leaves_windows_of_as_many_documents_as_it_can(long_model, small):
    settings = dataclasses.replace(small, samples=2)
    inputs = TaskData(settings, long_model.tokenizer)
    examples = PerplexityRelease().examples(long_model, settings, inputs)
    for length in settings.lengths:
        here = [e for e in examples if e.length == length]
        assert len({e.info["document"] for e in here[:2]}) == 2 < len(here)


def test_window_only_scores_each_window_alone(long_model, found):
    rows = run(long_model, make_methods(["window"], [])[0], found)
    for example, row in zip(found, rows, strict=True):
        tokens, w = example.tokens, long_model.window
        losses = np.concatenate(
            [
                losses_of(long_model, tokens[i : i + w + 1])
                for i in range(0, len(tokens) - 1, w)
            ]
        )
        want = losses[example.info["scored"] - 1 :]
        assert row["tokens"] == len(want) and row["kv_bytes"] == 0
        assert row["loss"] == pytest.approx(want.mean(), abs=1e-4)


def test_documents_weigh_alike_however_long_they_are():
    rows = [
        {"method": "full", "ratio": None, "length": 64, "kv_bytes": 0} | r
        for r in (
            {"document": 0, "loss": 1.0, "tokens": 300},
            {"document": 0, "loss": 2.0, "tokens": 100},
            {"document": 1, "loss": 3.25, "tokens": 10},
        )
    ]
    metrics = {m["metric"]: m for m in PerplexityRelease().score(rows)}
    assert metrics["loss"]["value"] == pytest.approx((1.25 + 3.25) / 2)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(2.25))
    assert metrics["perplexity"]["tokens"] == 410


def test_the_users_books_are_read_if_there_are_any(long_model, short, tmp_path):
    (tmp_path / "lm").mkdir()
    words = "memory river " * 200
    lines = [json.dumps({"text": t}) for t in (words, "too short", f"stone {words}")]
    (tmp_path / "lm" / "pg19.jsonl").write_text("\n".join([*lines, "{"]) + "\n")
    settings = dataclasses.replace(short, data=str(tmp_path))
    inputs = TaskData(settings, long_model.tokenizer)
    examples = PerplexityRelease().examples(long_model, settings, inputs)
    assert {e.info["document"] for e in examples} == {0, 1}
    assert [reason for _, _, reason in inputs.skipped] == ["not JSON"]
    text = long_model.tokenizer.decode(examples[-1].tokens.tolist())
    assert "memory river memory" in text

    empty = dataclasses.replace(short, data=str(tmp_path / "lm"))
    inputs = TaskData(empty, long_model.tokenizer)
    assert PerplexityRelease().examples(long_model, empty, inputs)
    long = dataclasses.replace(settings, lengths=(32_000,))
    with pytest.raises(
        ValueError, match="no document of 32000 tokens, which perplexity_release"
    ):
        PerplexityRelease().examples(
            long_model, long, TaskData(long, long_model.tokenizer)
        )
