"""Every metric against recorded values of the published code (goldens/metrics.json)."""

import json
from pathlib import Path

import pytest

from beacon_jax.evaluation import metrics

GOLDENS = json.loads(
    (Path(__file__).parent / "goldens" / "metrics.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize(
    "name, rows",
    [
        ("qa_f1", [row[:3] for row in GOLDENS["texts"]]),
        ("classification", GOLDENS["classification"]),
        ("count", GOLDENS["count"]),
        ("retrieval", GOLDENS["retrieval"]),
        ("code_sim", GOLDENS["code_sim"]),
    ],
)
def test_scores_equal_the_official_ones(name, rows):
    assert len(rows) >= (60 if name in ("count", "retrieval") else 200)
    assert 0.0 in [row[-1] for row in rows] and max(row[-1] for row in rows) > 0.9
    score = getattr(metrics, name)
    wrong = [r for r in rows if abs(score(*r[:-1]) - r[-1]) > 1e-9]
    assert not wrong


def test_rouge_l_is_that_of_the_package():
    assert GOLDENS["made_with"]["rouge"] == "1.0.1"
    for prediction, reference, _, f, recall in GOLDENS["texts"]:
        found = metrics.rouge_l(prediction, reference)
        assert found == pytest.approx((f, recall), abs=1e-9), (prediction, reference)
        assert metrics.rouge_l_f(prediction, reference) == found[0]
        assert metrics.rouge_l_recall(prediction, reference) == found[1]


def test_answers_are_normalised_as_in_squad():
    for text, want in GOLDENS["normalize"]:
        assert metrics.normalize_answer(text) == want


def test_the_table_has_cases_that_the_loop_of_classification_decides():
    def without_quirk(prediction, reference, classes):
        named = [c for c in classes if c in prediction]
        named = [c for c in named if c not in reference or c == reference]
        return 1.0 / len(named) if reference in named else 0.0

    rows = GOLDENS["classification"]
    assert sum(abs(without_quirk(*r[:-1]) - r[-1]) > 0.01 for r in rows) >= 10


def test_a_long_sentence_is_no_error():
    # `rouge` recurses once per word and gives up at about 1,000 of them.
    text = " ".join(f"w{i}" for i in range(3000))
    assert metrics.rouge_l(text, text) == pytest.approx((1.0, 1.0), abs=1e-8)


def test_strings_are_matched_in_any_case_and_in_part():
    assert metrics.string_match_all("it is ABC, then d", ["abc", "D", "x"]) == 2 / 3
    assert metrics.string_match_part("it is ABC", ["x", "abc"]) == 1.0
    assert metrics.string_match_part("", ["x"]) == 0.0
    words = ["sandwich|hamburg", "Dolores Park", "sunny day"]
    assert metrics.keyword_recall("a Hamburg in dolores park", words) == 2 / 3
    assert metrics.keyword_recall("", words) == 0.0


def test_the_first_line_and_the_first_integer_are_those_with_anything_in_them():
    assert metrics.first_line("\n\nyes\nno") == "yes"
    assert metrics.first_line("") == ""
    assert metrics.first_integer("No. 071 or 5") == "071"
    assert metrics.first_integer("none") == ""


def test_a_retrieval_reference_without_a_paragraph_is_an_error():
    with pytest.raises(ValueError, match="'7' names no 'Paragraph N'"):
        metrics.retrieval("7", "7")
