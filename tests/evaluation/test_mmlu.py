"""MMLU on files in the release's form, with losses that are known."""

import json

import numpy as np
import pytest

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.reading import load_model
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks, mmlu
from beacon_jax.evaluation.tasks.mmlu import Mmlu


def row(subject, answer, **changes):
    return {
        "query": f" Which of {subject}? ",
        "subject": subject,
        "choices": ["one", "two", "three", "four"],
        "answer": answer,
    } | changes


@pytest.fixture
def settings(tmp_path):
    folder = tmp_path / "data" / "mmlu"
    folder.mkdir(parents=True)
    rows = [
        row("astronomy", 0),
        row("astronomy", 1),
        row("astronomy", "C"),
        row("virology", 3),
        row("world_religions", 4),
        row("sociology", 0, choices=["one"]),
        row("sociology", 0, query=None),
    ]
    shown = [row("astronomy", i % 4, query=f"Shown {i}?") for i in range(7)]
    for name, found in (("test", rows), ("dev", shown)):
        text = "".join(json.dumps(r) + "\n" for r in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return RunSettings(data=str(tmp_path / "data"), max_length=1024, batch_size=4)


@pytest.fixture(scope="module")
def small(model_folder):
    return load_model(model_folder, ())


def test_questions_are_written_as_in_the_release(settings, small):
    inputs = TaskData(settings, small.tokenizer)
    found = Mmlu().examples(small, settings, inputs)
    (virology,) = (e for e in found if e.info["subject"] == "virology")
    assert small.tokenizer.decode(virology.tokens.tolist()) == (
        "The following are multiple choice questions (with answers) about virology."
        "\n\nWhich of virology?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    )
    assert [row[1:] for row in inputs.skipped] == [
        (5, "answer 4"),
        (6, "1 choices"),
        (7, "no query"),
    ]
    answers = {e.id: e.info["answers"] for e in found}
    assert answers == {"0": ["A"], "1": ["B"], "2": ["C"], "3": ["D"]}


def test_five_examples_of_the_subject_stand_in_front(settings, small):
    (task,) = make_tasks(["mmlu_5shot"])
    found = task.examples(small, settings, TaskData(settings, small.tokenizer))
    for example in found:
        text = small.tokenizer.decode(example.tokens.tolist())
        shown = text.count("Shown ")
        assert shown == (5 if example.info["subject"] == "astronomy" else 0)
        if shown:
            assert "Shown 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n" in text


def test_every_subject_of_the_set_has_a_category():
    counts = [len(text.split()) for text in mmlu.CATEGORIES.values()]
    assert counts == [18, 12, 13]  # and 14 others: 57
    assert len(mmlu.CATEGORY) == sum(counts)


def prediction(subject, right):
    return {
        "method": "full",
        "ratio": None,
        "length": 1024,
        "kv_bytes": 0,
        "answers": ["A"],
        "predicted": "A" if right else "B",
        "answer_loss": 1.0,
        "subject": subject,
    }


def test_the_number_is_the_mean_over_subjects():
    found = [prediction("astronomy", i < 3) for i in range(4)]
    found += [prediction("virology", False)]
    found += [prediction("machine_learning", True)]
    metrics = {m["metric"]: m["value"] for m in Mmlu().score(found)}
    assert metrics["accuracy"] == pytest.approx((0.75 + 0.0 + 1.0) / 3)
    assert metrics["accuracy, STEM"] == pytest.approx((0.75 + 1.0) / 2)
    assert metrics["accuracy, others"] == 0.0
    assert "accuracy, humanities" not in metrics


def test_the_answer_is_the_letter_with_the_lowest_loss(
    settings, small, tmp_path, monkeypatch
):
    tokenizer = small.tokenizer
    seen = []

    def losses(model, memory, logits, references, ratio):
        letters = [tokenizer.decode(r.tolist()) for r in references]
        seen.extend(letters)
        return [{" A": 1.0, " B": 2.0, " C": 0.5, " D": 3.0}[x] for x in letters]

    monkeypatch.setattr(mmlu, "answer_losses", losses)
    metrics, text = evaluate(
        small, [Mmlu()], make_methods(["window"], []), settings, tmp_path / "out"
    )
    assert set(seen) == {" A", " B", " C", " D"}
    found = {m["metric"]: m["value"] for m in metrics}
    assert found["accuracy"] == pytest.approx((1 / 3 + 0) / 2)
    assert found["answer_loss"] == pytest.approx(np.mean([1.0, 2.0, 0.5, 3.0]))
    assert "## MMLU" in text and "accuracy, STEM" in text
    lines = (tmp_path / "out" / "predictions" / "mmlu.window.jsonl").read_text()
    assert all(json.loads(line)["predicted"] == "C" for line in lines.splitlines())


def test_losses_of_the_letters_are_those_of_the_model(settings, small):
    task, (window,) = Mmlu(), make_methods(["window"], [])
    examples = task.examples(small, settings, TaskData(settings, small.tokenizer))
    for one in task.run(small, window, examples[:2]):
        assert one["predicted"] == "ABCD"[int(np.argmin(one["losses"]))]
        assert len(set(one["losses"])) == 4 and min(one["losses"]) > 0.0
