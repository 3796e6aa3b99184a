"""Associative recall in token space: pairs, positions, teacher-forced queries."""

import numpy as np
import pytest

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import TaskData
from beacon_jax.evaluation.tasks.mqar import QUERIES, Mqar
from beacon_jax.hf.reader import open_hf
from beacon_jax.inference.verify import numpy_logits
from tests.evaluation.offline import examples


def test_positions_are_those_of_the_asked_values(wanted):
    model, _, _ = wanted
    for length in (128, 640, 1024):
        for example in examples("mqar", wanted, lengths=(length,)):
            tokens, positions = example.tokens, example.info["positions"]
            queries = len(positions)
            assert len(tokens) == length and queries == min(
                QUERIES, example.info["pairs"]
            )
            keys = tokens[length - 2 * queries :: 2]
            values = tokens[length - 2 * queries + 1 :: 2]
            assert np.array_equal(tokens[positions], values)
            assert np.array_equal(tokens[np.asarray(positions) - 1], keys)
            # Only the memory can answer: the first query's own window has no pair.
            start = (length - 2 * queries) // model.window * model.window
            assert max(positions) < start


def test_keys_and_values_are_unique_and_of_disjoint_ranges(wanted):
    model, settings, inputs = wanted
    found = Mqar().source(model, settings, inputs)
    assert found.keys.max() < found.values.min() <= found.values.max()
    assert found.values.max() < found.fillers.min()
    special = set(model.tokenizer.all_special_ids)
    assert not special & {*found.keys, *found.values, *found.fillers}
    for example in examples("mqar", wanted, lengths=(640,)):
        pairs, queries = example.info["pairs"], len(example.info["positions"])
        context = example.tokens[: len(example.tokens) - 2 * queries]
        for kind in (found.keys, found.values):
            here = context[np.isin(context, kind)]
            assert len(here) == len(set(here.tolist())) == pairs
        at = np.flatnonzero(np.isin(context, found.keys))
        assert np.isin(context[at + 1], found.values).all()


def test_values_fall_on_every_place_of_a_unit(wanted):
    places = [
        position % 8
        for e in examples("mqar", wanted, lengths=(1024,), samples=40)
        for position in e.info["positions"]
    ]
    assert np.bincount(places, minlength=8).min() > len(places) / 8 / 4


def test_a_length_without_a_pair_says_what_is_needed(wanted):
    with pytest.raises(ValueError, match="--lengths has 32.*use at least 80"):
        examples("mqar", wanted, lengths=(32,))


def test_queries_are_answered_in_view_of_the_right_values_before(
    long_model, small, long_inputs
):
    task = Mqar()
    found = task.examples(long_model, small, long_inputs)[:2]
    answers = task.run(long_model, make_methods(["full"], [])[0], found)
    reader = open_hf(long_model.path)
    for example, answer in zip(found, answers, strict=True):
        queries = len(example.info["positions"])
        logits = numpy_logits(long_model.config, reader, example.tokens[:-1])
        at = np.arange(len(example.tokens) - 2 * queries, len(example.tokens), 2)
        rows, right = logits[at].astype(np.float64), example.tokens[at + 1]
        assert answer["hits"] == (rows.argmax(1) == right).astype(int).tolist()
        norm = np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1)) + rows.max(1)
        losses = norm - rows[np.arange(queries), right]
        assert answer["answer_loss"] == pytest.approx(losses.mean(), abs=1e-4)
        assert len(answer["hits"]) == queries == QUERIES


def test_accuracy_by_place_is_counted_and_drawn(tmp_path):
    base = {
        "length": 64,
        "kv_bytes": 8,
        "answer_loss": 1.0,
        "positions": [8, 13, 15, 21],
    }
    rows = [
        base | {"method": "beacon_x4", "ratio": 4, "hits": [0, 1, 1, 0]},
        base | {"method": "beacon_x4", "ratio": 4, "hits": [1, 1, 1, 0]},
        base | {"method": "beacon_x2", "ratio": 2, "hits": [0, 0, 1, 0]},
        base | {"method": "full", "ratio": None, "hits": [1, 1, 1, 1]},
    ]
    metrics = Mqar().score(rows)
    at = {
        (m["method"], m["place"]): (m["value"], m["count"])
        for m in metrics
        if m["metric"] == "accuracy_at"
    }
    assert at == {
        ("beacon_x4", 0): (0.5, 2),
        ("beacon_x4", 1): (0.5, 4),
        ("beacon_x4", 3): (1.0, 2),
        ("beacon_x2", 0): (0.0, 1),
        ("beacon_x2", 1): (1 / 3, 3),
    }
    value = {m["method"]: m["value"] for m in metrics if m["metric"] == "accuracy"}
    assert value == {"beacon_x4": 0.625, "beacon_x2": 0.25, "full": 1.0}
    text = Mqar().report(metrics, tmp_path)
    assert "](mqar_positions.png)" in text and "0.62" in text
    assert (tmp_path / "mqar_positions.png").stat().st_size > 5000


def test_too_few_different_tokens_are_an_error(wanted):
    model, settings, inputs = wanted
    short = TaskData(settings, model.tokenizer)
    short.__dict__["stream"] = inputs.stream[:10]
    with pytest.raises(ValueError, match="different tokens, and 24 are needed"):
        Mqar().examples(model, settings, short)
