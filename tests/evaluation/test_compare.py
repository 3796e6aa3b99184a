"""Runs side by side: the command with several seeds, and reports of finished runs."""

import json

import numpy as np
import pytest

from beacon_jax.evaluation import compare


def run(folder, value, seed=0, method="beacon_x4", beacon="b" * 64):
    """The folder of a finished run of one task."""
    folder.mkdir(parents=True)
    metric = {
        "task": "passkey",
        "metric": "accuracy",
        "method": method,
        "ratio": 4,
        "length": 256,
        "depth": None,
        "value": value,
        "low": 0.0,
        "high": 1.0,
        "count": 10,
        "kv_bytes": 64.0,
    }
    details = [metric | {"depth": 0.5}, metric | {"metric": "answer_loss"}]
    content = {
        "model": {"path": "models/tiny", "beacon_hash": beacon},
        "settings": {"seed": seed},
        "versions": {"commit": "abc"},
        "metrics": [metric, *details],
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def cells(text, method):
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in text.splitlines()]
    return [row for row in rows if row and row[0] == method]


def test_runs_of_several_seeds_are_their_mean_and_standard_deviation(tmp_path):
    values = (0.5, 0.75, 0.9)
    folders = [run(tmp_path / f"a_seed{i}", v, i) for i, v in enumerate(values)]
    text = compare.write(folders, tmp_path / "out")
    mean, spread = np.mean(values), np.std(values, ddof=1)
    want = f"{mean:.3f} ± {spread:.3f} (3)"
    assert cells(text, "beacon_x4") == [["beacon_x4", want]]
    assert (tmp_path / "out" / "report.md").read_text() == text


def test_different_runs_are_rows_of_their_own_named_by_their_folders(tmp_path):
    folders = [run(tmp_path / "one", 0.5), run(tmp_path / "two", 0.25)]
    text = compare.write(folders, tmp_path / "out")
    assert cells(text, "one: beacon_x4")[0][1] == "0.500"
    assert cells(text, "two: beacon_x4")[0][1] == "0.250"


def test_folders_of_one_name_are_seeds_in_one_place_only(tmp_path):
    folders = [run(tmp_path / x / "run", v) for x, v in (("a", 0.5), ("b", 0.25))]
    text = compare.write(folders, tmp_path / "out")
    assert cells(text, "a/run: beacon_x4")[0][1] == "0.500"
    assert cells(text, "b/run: beacon_x4")[0][1] == "0.250"


def test_a_folder_of_seeds_stands_for_them(tmp_path):
    seeds = [run(tmp_path / "a" / f"seed{i}", v, i) for i, v in enumerate((0.5, 1.0))]
    together = compare.write([tmp_path / "a"], tmp_path / "one")
    assert together == compare.write(seeds, tmp_path / "both")
    assert "0.750 ± 0.354 (2)" in together


def test_a_folder_without_a_finished_run_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"names .*empty, which has no metrics\.json"):
        compare.write([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(ValueError, match="--report needs the folders"):
        compare.write([], tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {}}, "run.metrics is {}, not a list"),
        ({"metrics": [{"task": "t"}]}, r"run.metrics\[0\].metric is missing"),
        ({"model": None}, "run.model is None, not an object"),
        ({"settings": {"seed": "0"}}, "run.settings.seed is '0', not a whole number"),
    ],
)
def test_a_damaged_report_is_named(tmp_path, change, message):
    file = run(tmp_path / "a", 0.5) / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"metrics.json is damaged: {message}"):
        compare.write([tmp_path / "a"], tmp_path / "out")
