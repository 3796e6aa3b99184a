"""Methods that are timed in turn, another library among them."""

import importlib

import numpy as np
import pytest

from beacon_jax.bench import (
    device,
    report,
    runner,
    serving,
    timing,
    torch_model,
)
from beacon_jax.inference.decode import BLOCK
from tests.bench.nano import NANO, options, settings


@pytest.mark.parametrize("window", [32, 64, 1024, 2048])
def test_measured_places_stand_for_the_whole_window(window):
    shares = serving.places(window)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[window - BLOCK] == BLOCK / window  # where it is compressed
    mean = sum(place * share for place, share in shares.items())
    assert mean == pytest.approx((window - BLOCK) / 2, abs=BLOCK)


def test_a_window_shorter_than_two_blocks_is_one_block():
    assert serving.places(8) == {0: 1.0} == serving.places(BLOCK + 8)


def test_things_are_timed_in_turn_and_a_long_one_is_not_warmed_up(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def sampler(name, lasts):
        def sample():
            order.append(name)
            clock[0] += lasts
            return 0.5

        return sample

    found = timing.alternately(
        {"a": sampler("a", 1.0), "b": sampler("b", 99.0)}, repeats=2
    )
    assert order == ["a", "b", "a", "b", "a"]
    assert found["a"].repeats == found["b"].repeats == 2
    assert found["b"].median_s == 0.5  # what the sample says


def test_a_method_that_fails_costs_the_others_nothing():
    def refuse():
        raise NotImplementedError("not here")

    good = serving.Sampler(serving._EAGER, lambda: 3.0)
    group = serving.InTurn({"bad": refuse, "good": lambda: good}, repeats=2)
    assert group.measure("good")[0].median_s == 3.0
    with pytest.raises(NotImplementedError, match="not here"):
        group.measure("bad")


@pytest.mark.slow
def test_without_torch_its_rows_say_what_to_install(tmp_path, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(torch_model.importlib, "import_module", without)
    parts = "--parts=prefill,decode"
    given = options("--against=torch", parts, f"--out={tmp_path}", "--repeats=1")
    rows = {
        (r["key"]["part"], r["key"].get("method")): r
        for r in runner.run_all(given, given.parts)
    }
    for part in ("prefill", "decode"):
        row = rows[part, "torch"]
        assert row["status"] == "refused" and "beacon_jax[bench]" in row["reason"]
        assert rows[part, "x2"]["status"] == rows[part, "full"]["status"] == "ok"


def test_a_window_of_ones_own_is_part_of_the_row():
    made = settings("--window=4")
    assert made.config.beacon.window == 4
    assert made.key("prefill")["window"] == 4
    assert "window" not in settings().key("prefill")


@pytest.mark.parametrize(
    "argument, message",
    [("--window=0", "--window=0 must"), ("--against=numpy", "--against has")],
)
def test_a_wrong_option_ends_with_its_name(argument, message):
    with pytest.raises(ValueError, match=message):
        settings(argument)


def test_torch_computes_the_same_tokens_and_stands_in_the_tables(tmp_path):
    pytest.importorskip("torch")
    variables = device.random_variables(NANO, "float32")
    s = settings("--dtype=float32")
    _, fresh, run = serving._full(s, variables, 21, serving.FULL)
    theirs = torch_model.TorchModel(NANO, variables, "float32")
    tokens = serving._tokens(s, 21)
    np.testing.assert_array_equal(run(fresh())[0], theirs.first_token(tokens))
    cache = theirs.cache(2, 5)
    theirs.decode(cache, 2, 3)
    assert cache.get_seq_length() == 5
    given = options("--against=torch", "--parts=prefill,decode", f"--out={tmp_path}")
    rows = runner.run_all(given, given.parts)
    assert all(row["status"] == "ok" for row in rows)
    text = "\n".join(report.sections(rows))
    assert text.count("against torch") == 2
