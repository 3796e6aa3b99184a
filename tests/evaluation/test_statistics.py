"""Intervals, and the floors that are checked against numbers."""

import json

import numpy as np
import pytest

from beacon_jax.evaluation.floors import check_floors, read_floors
from beacon_jax.evaluation.statistics import mean_interval, ratio_interval, wilson


def test_wilson_equals_published_values_and_stays_inside_0_and_1():
    # Newcombe 1998, table I: 81 of 263 -> .2553, .3662; 0 of 20 -> 0, .1611
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson(20, 20)
    assert high == 1.0 and low == pytest.approx(1 - 0.1611, abs=5e-5)
    with pytest.raises(ValueError, match="hits=3 of count=2"):
        wilson(3, 2)


def test_bootstrap_of_a_mean_is_as_wide_as_the_normal_interval_and_repeats():
    values = np.random.default_rng(0).normal(2.0, 1.5, 400)
    mean, low, high = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.1)
    assert mean_interval(values) == (mean, low, high)
    assert mean_interval(values, seed=1) != (mean, low, high)


def test_a_paired_ratio_has_no_width_when_the_pairs_are_proportional():
    below = np.random.default_rng(0).uniform(0.5, 1.0, 50)
    assert ratio_interval(0.4 * below, below) == pytest.approx((0.4, 0.4, 0.4))
    assert all(np.isnan(ratio_interval(below, -below)))


FLOOR = {"name": "x2", "task": "t", "metric": "m", "method": "beacon_x2", "min": 0.8}


def metric(value, length=256, depth=None, count=128):
    keys = {"task": "t", "metric": "m", "method": "beacon_x2"}
    return keys | {"length": length, "depth": depth, "value": value, "count": count}


@pytest.mark.parametrize(
    "metrics, reached",
    [
        ([metric(0.8)], True),
        ([metric(0.79)], False),
        ([metric(0.9, length=512)], False),  # measured elsewhere only
        ([metric(0.9, depth=0.5)], False),
        ([metric(0.1, length=512), metric(0.1, depth=0.5), metric(0.9)], True),
        ([metric(None)], False),
        ([], False),
    ],
)
def test_a_floor_counts_at_its_length_over_all_depths(metrics, reached):
    ((name, ok, _),) = check_floors({"floors": [FLOOR]}, metrics, 256, None)
    assert name == "x2 at 256" and ok is reached


def test_too_few_rows_miss_a_floor():
    spec = {"floors": [FLOOR | {"rows": 128}]}
    ((_, ok, text),) = check_floors(spec, [metric(0.9, count=127)], 256, None)
    assert not ok and "at least 128 wanted" in text


@pytest.mark.parametrize(
    "summary, reached, text",
    [
        ({"base_hash_before": "a", "base_hash_after": "a"}, True, "a before and after"),
        ({"base_hash_before": "a", "base_hash_after": "b"}, False, "a before, b after"),
        ({"base_hash_before": "a"}, False, "has no base_hash_before"),
        (None, False, "name the training run's --summary"),
    ],
)
def test_the_base_must_be_known_to_be_unchanged(tmp_path, summary, reached, text):
    file = None
    if summary is not None:
        file = str(tmp_path / "summary.json")
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    spec = {"floors": [], "base_hash_unchanged": True}
    ((_, ok, found),) = check_floors(spec, [], 256, file)
    assert ok is reached and text in found


def test_the_quickstart_has_the_five_floors_of_the_issue():
    spec = read_floors("configs/quickstart_floors.json")
    found = {(f["metric"], f["method"], f["min"], f["rows"]) for f in spec["floors"]}
    assert found == {
        ("accuracy", "beacon_x2", 0.85, 128),
        ("accuracy", "beacon_x4", 0.75, 128),
        ("below_window", "beacon_x4", 0.08, 128),
        ("below_window", "full", 0.10, 128),
    }
    assert spec["base_hash_unchanged"] is True
    assert read_floors("quickstart") == spec


def test_bad_floors_are_errors_that_say_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="configs/none_floors.json"):
        read_floors("none")
    file = tmp_path / "floors.json"
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_floors(str(file))
    for wrong, message in (
        (7, "has 7: give objects"),
        (FLOOR | {"min": "0.8"}, r"floors\[0\].min is '0.8', not a number"),
        (FLOOR | {"rows": -1}, r"floors\[0\].rows is -1, not a whole number from 0"),
    ):
        file.write_text(json.dumps({"floors": [wrong]}))
        with pytest.raises(ValueError, match=message):
            read_floors(str(file))
    file.write_text(json.dumps({"floors": [FLOOR | {"minimum": 1}]}))
    with pytest.raises(ValueError, match="minimum"):
        read_floors(str(file))
