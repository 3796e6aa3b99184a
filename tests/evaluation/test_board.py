"""The board: what --board stands for, its mean, its table and figure."""

import json

import pytest
from absl import flags

from beacon_jax.cli import evaluate as command
from beacon_jax.evaluation import board, groups
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.report import interval
from beacon_jax.evaluation.tasks import GROUPS, make_tasks

SIX = GROUPS["board"]


def chosen(*given):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["evaluate", "--out=x", *given])
    if values.board:
        command.choose_board(values)
    return {name: getattr(values, name) for name in command.BOARD}


def test_the_board_sets_what_is_not_given():
    found = chosen("--board")
    assert found == command.BOARD
    assert found["ratios"] == ["2", "4", "8"] and found["lengths"] == ["4096"]
    assert found["samples"] == 25 and found["methods"][0] == "full"
    assert chosen()["tasks"] == command.DEFAULTS["tasks"]


def test_what_is_given_stays_as_it_is():
    given = {"methods": ["full", "snapkv"], "lengths": ["2048"], "samples": 3}
    found = chosen("--board", "--methods=full,snapkv", "--lengths=2048", "--samples=3")
    assert found == command.BOARD | given
    # Also where it is what would be chosen without --board.
    assert chosen("--board", "--samples=128")["samples"] == 128


def test_beacons_of_an_adapter_take_part():
    found = chosen("--board", "--beacons=folder")
    assert found["methods"] == [*command.BOARD["methods"], "beacon"]
    found = chosen("--board", "--beacons=folder", "--methods=beacon")
    assert found["methods"] == ["beacon"]


def test_the_methods_of_the_board_are_known():
    methods = make_methods(command.BOARD["methods"], [2, 4, 8])
    assert len(methods) == 2 + 3 * 6
    assert [task.name for task in make_tasks(["board"])] == list(SIX)
    assert len(set(SIX)) == 6


def metric(task, method, value, ratio=None):
    return {"task": task, "metric": "match", "method": method, "ratio": ratio} | {
        "length": 4096,
        "depth": None,
        "count": 25,
        "kv_bytes": 2.0**20,
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
    }


def test_the_mean_is_of_six_tasks_or_there_is_none():
    scores = (0.2, 0.4, 0.4, 0.6, 0.6, 0.8)
    metrics = [metric(t, "full", x) for t, x in zip(SIX, scores, strict=True)]
    (found,) = groups.means(metrics)
    assert (found["task"], found["metric"]) == (groups.BOARD, "mean of 6")
    assert found["value"] == pytest.approx(0.5)
    assert found["count"] == 150
    # Six independent halves of 0.1: 0.1 / sqrt(6).
    assert found["high"] - found["value"] == pytest.approx(0.1 / 6**0.5)
    (found,) = groups.means(metrics[:5])
    assert (found["task"], found["metric"]) == ("RULER", "mean of 5/13")
    others = [t for t in GROUPS["ruler_all"] if t not in SIX]
    metrics.append(metric(others[0], "full", 1.0))
    names = [(m["task"], m["metric"]) for m in groups.means(metrics)]
    assert names == [(groups.BOARD, "mean of 6"), ("RULER", "mean of 7/13")]


def test_the_table_has_a_row_per_method_and_ratio_the_best_on_top(tmp_path):
    cells = [("full", None, 0.9), ("kvzip_x2", 2, 0.4)]
    cells += [("snapkv_x4", 4, 0.3), ("snapkv_x2", 2, 0.7)]
    metrics = [metric(t, name, x, ratio) for name, ratio, x in cells for t in SIX]
    times = [
        {"task": t, "method": "snapkv_x2", "length": 4096, "rows": 4}
        | {"seconds": [s], "peak_bytes": n * 2**20, "batches": 7, "compile_seconds": 0}
        for t, s, n in ((SIX[0], 8.0, 300), (SIX[1], 4.0, 500))
    ]
    means = groups.means(metrics)
    text = board.write([*metrics, *means], times, tmp_path)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert [row[:2] for row in rows[2:]] == [
        ["full", "–"],
        ["snapkv", "0.5"],
        ["kvzip", "0.5"],
        ["snapkv", "0.75"],
    ]
    assert rows[3][2] == interval(means[3], 3) and rows[3][3:9] == ["0.70"] * 6
    assert rows[3][9:] == ["1.0", "1.5", "500 / 4", "150"]
    assert rows[2][10:12] == ["–", "–"]
    assert (tmp_path / "board.md").read_text(encoding="utf-8") == text
    assert (tmp_path / "board.png").stat().st_size > 5000
    assert board.write(metrics[:5], times, tmp_path) == ""


@pytest.mark.slow
def test_a_board_that_stopped_goes_on_and_ends_with_the_same_bytes(
    long_model, small, tmp_path, capsys
):
    def run(out, **given):
        values = flags.FlagValues()
        command.define_flags(values)
        values(["evaluate", "--board", f"--model={long_model.path}", f"--out={out}"])
        options = {"samples": 2, "batch_size": 1, "lengths": ["1024"]}
        options |= {"methods": ["full", "snapkv", "beacon"], "ratios": ["4"]}
        for name, value in (options | {"text": small.text} | given).items():
            setattr(values, name, value)
        assert command.run(values) == ""
        return capsys.readouterr().out

    text = run(tmp_path / "whole")
    assert f"## {groups.BOARD}" in text
    run(tmp_path / "part", methods=["full"])  # as if it had stopped
    cut = tmp_path / "part" / "predictions" / f"{SIX[1]}.full.jsonl"
    cut.write_bytes(cut.read_bytes()[:-9])
    run(tmp_path / "part")
    for file in (tmp_path / "whole" / "predictions").iterdir():
        again = tmp_path / "part" / "predictions" / file.name
        assert file.read_bytes() == again.read_bytes()
    found = json.loads((tmp_path / "part" / "metrics.json").read_text())["metrics"]
    means = [m for m in found if m["task"] == groups.BOARD]
    assert [m["method"] for m in means] == ["full", "snapkv_x4", "beacon_x4"]
    lines = (tmp_path / "part" / "timings" / f"{SIX[0]}.full.jsonl").read_text()
    assert all("peak_bytes" in json.loads(x) for x in lines.splitlines())
