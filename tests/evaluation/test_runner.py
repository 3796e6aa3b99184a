"""The runner and the command: resumption, reports, floors, bad input."""

import dataclasses
import json
import shutil

import pytest
from absl import flags

from beacon_jax.cli import evaluate as command
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.runner import (
    evaluate,
    integers,
    limit,
    prepare_folder,
    repair,
)
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.base import Instance

TASKS = make_tasks(["perplexity", "passkey"])
METHODS = make_methods(["beacon", "full", "window"], [4])
NAMES = ("beacon_x4", "full", "window")


@pytest.fixture(scope="module")
def finished(model, settings, tmp_path_factory):
    """(folder, metrics) of an uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    metrics, _ = evaluate(model, TASKS, METHODS, settings, out)
    return out, metrics


def files(out):
    return {p.name: p.read_bytes() for p in (out / "predictions").iterdir()}


def test_an_interrupted_run_ends_with_the_same_bytes(
    model, settings, finished, tmp_path
):
    done, metrics = finished
    whole = files(done)
    out = tmp_path / "out"
    shutil.copytree(done, out)
    folder = out / "predictions"
    # Stopped in a line, in a batch (4 rows each), between batches, before a file.
    lines = whole["passkey.beacon_x4.jsonl"].splitlines(keepends=True)
    (folder / "passkey.beacon_x4.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:9])
    lines = whole["perplexity.full.jsonl"].splitlines(keepends=True)
    (folder / "perplexity.full.jsonl").write_bytes(b"".join(lines[:4]))
    (folder / "passkey.window.jsonl").unlink()
    assert files(out) != whole
    again, _ = evaluate(model, TASKS, METHODS, settings, out)
    assert files(out) == whole and again == metrics
    for name in (
        "metrics.json",
        "passkey.png",
        "perplexity.png",
        "scores_by_length.png",
    ):
        assert (out / name).read_bytes() == (done / name).read_bytes()
    texts = [(f / "report.md").read_text().split("## Time") for f in (out, done)]
    assert len(texts[0]) == 2 and texts[0][0] == texts[1][0]


def test_a_finished_run_computes_nothing(
    model, settings, finished, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    for task in TASKS:
        monkeypatch.setattr(task, "run", None)
    assert evaluate(model, TASKS, METHODS, settings, out)[0] == finished[1]


def test_every_example_has_one_line_in_order(finished, settings):
    found = files(finished[0])
    ids = [f"{n}/{i}" for n in settings.lengths for i in range(settings.samples)]
    assert set(found) - {"run.json"} == {
        f"{task}.{name}.jsonl" for task in ("perplexity", "passkey") for name in NAMES
    }
    for name, data in found.items():
        if name != "run.json":
            assert [json.loads(line)["id"] for line in data.splitlines()] == ids


def test_the_report_has_every_row_and_the_figures(finished, settings):
    out, metrics = finished
    report = (out / "report.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.splitlines()
        if line.startswith("|")
    ]
    for length in settings.lengths:
        for name in NAMES:  # once per task
            assert sum(row[:2] == [str(length), name] for row in rows) == 2
    for figure in ("passkey.png", "perplexity.png"):
        assert f"({figure})" in report and (out / figure).stat().st_size > 5000
    saved = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert saved["metrics"] == metrics
    assert saved["settings"]["lengths"] == [96, 128]
    assert saved["versions"]["jax"] and saved["hardware"]["device"]
    assert len(saved["model"]["base_hash"]) >= 16


def test_predictions_of_other_settings_are_not_mixed_in(
    model, settings, finished, tmp_path
):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    other = dataclasses.replace(settings, seed=5)
    with pytest.raises(ValueError, match=r"seed=0 there, 5 now.*--overwrite"):
        evaluate(model, TASKS[:1], METHODS[-1:], other, out)
    evaluate(model, TASKS[:1], METHODS[-1:], other, out, overwrite=True)
    assert set(files(out)) == {"run.json", "perplexity.window.jsonl"}


def test_foreign_lines_are_an_error_and_stay(model, settings, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    file = out / "predictions" / "passkey.full.jsonl"
    file.write_text('{"id": "7/7"}\n')
    with pytest.raises(ValueError, match="does not hold the first examples"):
        evaluate(model, TASKS, METHODS, settings, out)
    assert file.read_text() == '{"id": "7/7"}\n'


def test_a_folder_has_predictions_of_one_set_of_weights(tmp_path):
    run = {"model": {"window": 8, "path": "x"}, "settings": {"seed": 0}}
    name = "weights of retention"
    for weights in ({}, {name: "a"}, {}, {name: "a"}):
        prepare_folder(tmp_path, run, weights, overwrite=False)
    with pytest.raises(ValueError, match="weights of retention='a' there, 'b' now"):
        prepare_folder(tmp_path, run, {name: "b"}, overwrite=False)
    prepare_folder(tmp_path, run, {name: "b"}, overwrite=True)
    with pytest.raises(ValueError, match="seed=0 there, 1 now"):
        other = run | {"settings": {"seed": 1}}
        prepare_folder(tmp_path, other, {name: "b"}, overwrite=False)


def test_a_limit_keeps_the_first_of_each_length():
    found = [Instance(f"{n}/{i}", n, None) for n in (1, 2) for i in range(3)]  # type: ignore[arg-type]
    assert [e.id for e in limit(found, 2)] == ["1/0", "1/1", "2/0", "2/1"]
    assert limit(found, None) == found


def test_lengths_that_the_window_does_not_divide_are_errors(model, settings, tmp_path):
    for length in (100, 32):
        other = dataclasses.replace(settings, lengths=(length,))
        with pytest.raises(ValueError, match=f"--lengths has {length}.*for example"):
            evaluate(model, TASKS, METHODS, other, tmp_path)
    with pytest.raises(ValueError, match=r"--ratios has \['x'\]"):
        integers("ratios", ["2", "x"])


def run_command(**options):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["evaluate", f"--model={options['model']}", f"--out={options['out']}"])
    for name, value in options.items():
        setattr(values, name, value)
    return command.run(values)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "--text=nowhere does not exist; name a file, folder"),
        ("haystack", "--haystack=nowhere does not exist"),
        ("data", "--data=nowhere is no folder"),
        ("summary", "--summary=nowhere is no file"),
    ],
)
def test_a_flag_that_names_nothing_is_told_before_the_model_is_loaded(
    name, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(reading, "load_model", None)
    with pytest.raises(FileNotFoundError, match=message):
        run_command(model="x", out=str(tmp_path), **{name: "nowhere"})


def test_the_command_fails_by_naming_the_floors_that_were_missed(
    model_folder, text_folder, tmp_path, capsys
):
    floors = {
        "floors": [
            {"name": "easy", "task": "passkey", "metric": "accuracy"}
            | {"method": "window", "min": 0.0},
            {"name": "hard", "task": "passkey", "metric": "accuracy"}
            | {"method": "window", "min": 1.1},
        ]
    }
    (tmp_path / "floors.json").write_text(json.dumps(floors))
    options = {
        "model": model_folder,
        "out": str(tmp_path / "out"),
        "tasks": ["passkey"],
        "methods": ["window"],
        "lengths": ["128"],
        "samples": 4,
        "text": text_folder,
    }
    assert run_command(**options) == ""
    assert "## Passkey accuracy" in capsys.readouterr().out
    assert run_command(**options, floors=str(tmp_path / "floors.json")) == "hard at 128"
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "## Floors" in report and "MISSED" in report and "reached" in report
    lines = [json.dumps({"step": i, "loss": 3.0 / i}) for i in (50, 100)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run_command(**options, summary=str(tmp_path / "summary.json"))
    assert "(training_loss.png)" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "training_loss.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="--out=.*seed=0 there, 1"):
        run_command(**options, seeds=["1"])


@pytest.mark.parametrize(
    "content",
    [b'{"id": "b"}\nmine', b"[]\nmine", b"[" * 99_999 + b"\nmine", b"\xff\nm"],
)
def test_a_file_that_is_none_of_the_run_is_not_cut(tmp_path, content):
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the first examples of this"):
        repair(file, ["a", "b"])
    assert file.read_bytes() == content
    file.write_bytes(b'{"id": "a"}\n{"id"')
    assert repair(file, ["a", "b"]) == 1
    assert file.read_bytes() == b'{"id": "a"}\n'
