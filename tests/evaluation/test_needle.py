"""Needles in haystacks: where they are, what an answer is worth, the heat map."""

import dataclasses

import numpy as np
import pytest

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.haystack import Haystack
from beacon_jax.evaluation.tasks.needle import Needle, NeedleRelease
from tests.evaluation.offline import PROSE, examples, text_of


@pytest.mark.parametrize("task", [Needle(), NeedleRelease()])
def test_the_needle_is_at_its_depth_and_the_rest_is_haystack(task, wanted):
    model, settings, inputs = wanted
    source = task.source(model, settings, inputs)
    for example in examples(task.name, wanted, depths=5, samples=5):
        text = text_of(model, example)
        before, after = text.split(task.needle)
        hay = before[before.index(task.announcement) + len(task.announcement) :]
        hay = hay[hay.index("<user>") + 6 :] if "<user>" in hay else hay
        rest = after[: after.index(task.question)]
        assert hay + rest in source.text
        count = lambda part: len(model.tokenizer(part)["input_ids"])
        front, total = count(hay), count(hay + rest)
        depth = example.info["depth"]
        assert example.info["placed"] == pytest.approx(front / total, abs=0.011)
        if depth in (0.0, 1.0):
            assert [hay, rest][int(depth)] == "" and example.info["placed"] == depth
        elif task.aligned:
            # At the last sentence's end in front of the depth, if one is near.
            assert depth - 1 / 20 - 2 / total <= front / total <= depth + 2 / total
            gap = total * (depth - front / total)
            assert hay.endswith(".") or gap < 2
        else:
            assert abs(front - depth * total) <= 2


def test_a_needle_moves_back_to_a_sentence_then_a_line_then_not_at_all(wanted):
    tokenizer = wanted[0].tokenizer
    for text, end in (
        ("one two. three four " * 60, ". three"),
        ("one two\nthree four " * 60, "\nthree"),
        ("one two three four " * 60, None),
    ):
        source = Haystack([text], tokenizer, 100)
        for depth in (0.31, 0.5, 0.83):
            exact, tokens = source.place(0, 100, depth, aligned=False)
            assert tokens == int(100 * depth)
            assert source.take(0, tokens) == source.text[:exact]
            moved, fewer = source.place(0, 100, depth, aligned=True)
            assert 0 <= tokens - fewer <= 5 and moved <= exact
            if end is None:
                assert moved == exact
            else:
                mark = source.text.rfind(end, 0, exact - 1 + len(end)) + 1
                back = tokens - len(tokenizer(source.text[:mark])["input_ids"])
                assert moved == (mark if back <= 5 else exact)


def test_the_haystack_goes_round_and_leaves_out_documents_with_the_needle(wanted):
    tokenizer = wanted[0].tokenizer
    source = Haystack(
        ["b b. B b", "", "We saw Dolores Park", "a a"], tokenizer, 50, "Dolores Park"
    )
    assert source.text.startswith("b b. B b\n\na a\n\nb b. B b\n\na a")
    assert source.starts.tolist() == [0, 5]
    for start in source.starts.tolist():
        taken = source.take(start, 50)
        assert len(tokenizer(taken)["input_ids"]) == pytest.approx(50, abs=1)
    with pytest.raises(ValueError, match="--haystack has 1 documents"):
        Haystack(["We saw Dolores Park"], tokenizer, 50, "Dolores Park")


def test_facts_found_are_counted_and_rouge_wants_the_whole_sentence():
    official, release = Needle(), NeedleRelease()
    given = {
        "Eat a sandwich and sit in Dolores Park on a sunny day.": 1.0,
        "sit in dolores park when it is SUNNY DAY": 2 / 3,
        "Go to the beach": 0.0,
        "": 0.0,
    }
    for text, worth in given.items():
        assert official.value({"predicted": text}) == pytest.approx(worth)
    whole = release.needle.strip()
    for text, worth in {whole: 1.0, f"\n{whole}\nMore": 1.0, "x": 0.0, "": 0.0}.items():
        assert release.value({"predicted": text}) == pytest.approx(worth)
    short = release.value({"predicted": "Sitting in Dolores Park and eating a hamburg"})
    assert 0.2 < short < 0.7  # right, but not the sentence
    assert release.value({"predicted": f"x\n{whole}"}) == 0.0  # the first line counts


def test_both_scores_are_kept_apart_and_the_heat_map_is_drawn(
    long_model, small, tmp_path
):
    task, methods = make_tasks(["needle"]), make_methods(["full", "window"], [])
    settings = dataclasses.replace(small, lengths=small.lengths[-1:], limit=2)
    metrics, text = evaluate(long_model, task, methods, settings, tmp_path)
    names = {(m["metric"], m["depth"], m.get("detail", False)) for m in metrics}
    assert ("keyword_recall", None, False) in names
    assert ("keyword_recall", 1.0, False) in names
    assert ("rouge_l_recall", None, True) in names
    assert (tmp_path / "needle.png").stat().st_size > 5000
    assert "](needle.png)" in text and "rouge_l_recall" in text
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    overview = report.split("## Overview")[1].split("##")[0]
    assert "keyword_recall" in overview and "rouge_l_recall" not in overview


def test_every_sentence_is_a_possible_start(wanted):
    source = Haystack([PROSE], wanted[0].tokenizer, 50)
    starts = {source.text[s : s + 4] for s in source.starts.tolist()}
    assert starts == {"The ", "Rain", "Nobo"}
    assert np.all(np.diff(source.starts) > 0)
