"""RULER's problems under three tokenizers, and the road from a prompt to a score."""

import itertools
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from beacon_jax.data.tokenizer import train_tokenizer
from beacon_jax.evaluation import words
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.reading import Continuations, load_model
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import generation, make_tasks, ruler_qa, ruler_text
from beacon_jax.evaluation.tasks.ruler import OFFLINE, Ruler
from beacon_jax.tokenise import encode

SENTENCES = (
    "A river runs through the old town. ",
    "Who built the bridge over it? ",
    "Nobody remembers the name of the mason! ",
    "The lamps are lit at seven and put out at dawn. ",
    "Boats carry stone, salt and grain to the coast. ",
)
VOCABULARIES = (259, 420, 900)  # the first has one merge: a token is a byte
LENGTH = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in sentences, 25 files, some of them held out."""
    made = tmp_path_factory.mktemp("essays")
    rng = np.random.default_rng(0)
    for i in range(25):
        text = "".join(SENTENCES[k] for k in rng.integers(0, 5, 60))
        (made / f"{i}.txt").write_text(text, encoding="utf-8")
    return str(made)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What tasks use of a model to make examples, for three tokenizers."""
    rng = np.random.default_rng(1)
    text = [" ".join(rng.choice(SENTENCES, 200)), ruler_text.NOISE * 20]
    text += [" ".join(words.words()[::7])]
    return [
        SimpleNamespace(
            tokenizer=train_tokenizer(text, tmp_path_factory.mktemp("tok"), size),
            window=32,
        )
        for size in VOCABULARIES
    ]


@pytest.fixture(params=range(3), ids=[f"vocabulary{v}" for v in VOCABULARIES])
def small(request, models):
    return models[request.param]


def made(model, folder, task, length=LENGTH, samples=3, seed=0):
    settings = RunSettings((length,), samples=samples, text=folder, seed=seed)
    return Ruler(task).examples(model, settings, TaskData(settings, model.tokenizer))


def text_of(model, example):
    return model.tokenizer.decode(example.tokens.tolist())


@pytest.mark.parametrize("task", OFFLINE)
def test_a_prompt_and_its_answer_fill_the_length_to_within_one_unit(
    small, folder, task
):
    units = {"noise": ruler_text.NOISE, "needle": _longest_needle(task)}
    spec = ruler_text.NEEDLES.get(task)
    kind = spec.haystack if spec else {"vt": "noise"}.get(task, "word")
    # A word of an essay, or of a list with its number; coded words come 6 at a time
    # at most: so many ranks gain one at the same n.
    unit = units.get(kind, {"cwe": "1234. " + "x" * 30, "fwe": "abcdef " * 6}.get(task))
    size = len(encode(small.tokenizer, f"{unit or 'remembers'}\n", "bare"))
    for example in made(small, folder, task):
        used = len(example.tokens) + example.info["new_tokens"]
        assert LENGTH - size < used <= LENGTH


def _longest_needle(task):
    value = "0" * 36 if task == "niah_multikey_3" else "x" * 40
    return f"One of the special magic numbers for {value} is: {value}."


@pytest.mark.parametrize("task", OFFLINE)
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    models, folder, task
):
    first, again = (made(models[1], folder, task) for _ in range(2))
    other = made(models[1], folder, task, seed=1)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.tokens.tobytes() == b.tokens.tobytes() and a.info == b.info
        assert a.tokens.tobytes() != c.tokens.tobytes()
    assert len({e.tokens.tobytes() for e in first}) == len(first)
    # More samples go on from fewer.
    more = made(models[1], folder, task, samples=4)[:3]
    assert [e.info["answers"] for e in more] == [e.info["answers"] for e in first]


@pytest.mark.parametrize("task", OFFLINE)
def test_the_references_score_1_and_other_answers_0(models, folder, task):
    scored = Ruler(task)
    for example in made(models[2], folder, task):
        answers = example.info["answers"]
        assert scored.value({"predicted": " ".join(answers), **example.info}) == 1.0
        assert scored.value({"predicted": "I cannot say", **example.info}) == 0.0
        if len(answers) > 1:
            half = {"predicted": answers[-1].upper(), **example.info}
            assert scored.value(half) == pytest.approx(1 / len(answers))


@pytest.mark.parametrize("task", ruler_text.NEEDLES)
def test_needles_lie_at_their_depths_and_nowhere_else(small, folder, task):
    spec = ruler_text.NEEDLES[task]
    for example in made(small, folder, task):
        text = text_of(small, example)
        _, context, question = _three(text, spec)
        answers, depths = example.info["answers"], example.info["depths"]
        assert len(set(answers)) == len(answers) == spec.values * spec.queries
        assert all(text.count(answer) == 1 for answer in answers)
        needle = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.")
        found = needle.findall(context)
        asked = [key for key, value in found if value in answers]
        assert asked and all(key in question for key in asked)
        others = [key for key, value in found if value not in answers]
        assert not any(key in question for key in others)
        if spec.haystack == "essay":
            units = _sentences(context, needle)
        else:
            units = context.split("\n")
        hay = len(units) - len(depths)
        wanted = {int(hay * d / 100) + i for i, d in enumerate(depths)}
        at = {i for i, u in enumerate(units) if needle.search(u)}
        assert wanted <= at if spec.haystack == "needle" else wanted == at
        for answer in answers:
            assert any(answer in units[i] for i in wanted)


def _three(text, spec):
    """Head, context and question with the start of the answer."""
    head, _, rest = text.partition("afterwards.\n")
    context, _, question = rest.rpartition("\nWhat ")
    assert context and ("are all" in question) == (spec.queries * spec.values > 1)
    return head, context, question


def _sentences(context, needle):
    """The sentences of an essay; a needle is one of its own."""
    marked = needle.sub(lambda found: f"\n{found[0]}\n", context)
    lines = re.sub(r"(?<=[.?!]) ", "\n", marked).split("\n")
    return [line for line in lines if line.strip()]


def test_a_chain_gives_all_its_names_one_value_in_order(small, folder):
    for example in made(small, folder, "vt"):
        names = example.info["answers"]
        text = text_of(small, example)
        assert len(names) == example.info["hops"] + 1 == 5
        own = text[text.rindex("Memorize and track") :]
        lines = [line for line in own.split("\n") if line.startswith("VAR")]
        value = lines[0].split(" = ")[1]
        links = [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
        assert lines == [f"VAR {names[0]} = {value}", *links]
        assert f"assigned the value {value} in the text above." in own
        assert text.endswith("they are: ")
        assert not any(name in text[: -len(own)] for name in names)
        # The worked example, where it has room.
        assert text.count("Memorize and track") == 1 + example.info["shots"]


def test_common_words_are_common_and_no_others_are(small, folder):
    for example in made(small, folder, "cwe", 3072):
        info, text = example.info, text_of(small, example)
        own = text[text.rindex("Below is a numbered list") :]
        entries = re.findall(r"(\d+)\. (\S+)", own.partition("\nQuestion")[0])
        assert [int(n) for n, _ in entries] == list(range(1, len(entries) + 1))
        counts = Counter(word for _, word in entries)
        common = counts.most_common(info["common"])
        assert {word for word, _ in common} == set(info["answers"])
        assert {n for _, n in common} == {info["often"]}
        assert set(counts.values()) == {info["often"], 1}
        shown = re.findall(r"\d+\. (\S+)", text[: -len(own)])
        assert not set(shown) & set(info["answers"])


def test_the_three_asked_for_words_are_the_most_frequent_after_the_dots(small, folder):
    for example in made(small, folder, "fwe"):
        text = text_of(small, example).split("appeared coded words. ", 1)[1]
        counts = Counter(text.partition("\nQuestion")[0].split(" "))
        (dots, _), *top = counts.most_common(5)
        assert dots == "..." and {w for w, _ in top[:3]} == set(example.info["answers"])
        assert top[2][1] > top[3][1]
        assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in top)


def test_from_4096_tokens_on_the_settings_are_those_of_the_benchmark(models, folder):
    (vt,) = made(models[2], folder, "vt", 4096, samples=1)
    assert (vt.info["hops"], vt.info["shots"]) == (4, 1)
    (cwe,) = made(models[2], folder, "cwe", 8192, samples=1)
    assert [cwe.info[k] for k in ("common", "often", "shots")] == [10, 30, 1]
    assert cwe.info["new_tokens"] == 120
    text = text_of(models[2], cwe)
    own = text[text.rindex("Below is a numbered list") :].partition("\nQuestion")[0]
    assert set(Counter(re.findall(r"\d+\. (\S+)", own)).values()) == {30, 3}
    for task in ruler_text.NEEDLES:
        (one,) = made(models[2], folder, task, 4096, samples=1)
        assert one.info["new_tokens"] == 128


@pytest.mark.parametrize("task", OFFLINE)
def test_a_length_without_room_is_an_error_that_names_one_with_room(
    small, folder, task, caplog
):
    with pytest.raises(ValueError, match=f"--lengths has 160: ruler_{task}") as error:
        made(small, folder, task, 160)
    enough = int(re.search(r"use (\d+) or more", str(error.value))[1])
    assert enough % small.window == 0
    assert len(made(small, folder, task, enough)) == 3
    assert task == "fwe" or "asks for less than RULER" in caplog.text


def test_essays_go_round_and_sentences_are_words_where_there_are_none():
    essays = ruler_text.Essays(["One two. Three", 'four?" Five!'])
    assert essays.starts.tolist() == [0, 2, 4]
    assert essays.take(2, 6) == [
        ["Three", 'four?"'],
        ["Five!"],
        ["One", "two."],
        ["Three"],
    ]
    assert ruler_text.Essays(["a b c " * 40]).starts.tolist() == list(range(120))
    with pytest.raises(ValueError, match="--haystack has no words"):
        ruler_text.Essays([" "])


ARTICLE = {
    "title": "t",
    "paragraphs": [
        {
            "context": f"Paragraph {i} about the town of Number{i}.",
            "qas": [
                {"question": f"Which town, {i}?", "answers": [{"text": f"Number{i}"}]},
                {"question": "Never?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(12)
    ],
}
HOTPOT_ROW = {
    "question": "Who?",
    "answer": "Ada",
    "supporting_facts": [["T1", 0], ["T3", 1]],
    "context": [[f"T{i}", [f"Text {i}.", " More."]] for i in range(10)],
}


def data_folder(tmp_path):
    """SQuAD and HotpotQA as they are published, each with broken entries."""
    (tmp_path / "ruler").mkdir()
    squad = {"version": "v2.0", "data": [ARTICLE, {"title": "no paragraphs"}]}
    (tmp_path / "ruler" / "dev-v2.0.json").write_text(json.dumps(squad))
    rows = [HOTPOT_ROW, {"question": 3}, HOTPOT_ROW | {"supporting_facts": [["Z", 0]]}]
    name = "hotpot_dev_distractor_v1.json"
    (tmp_path / "ruler" / name).write_text(json.dumps(rows))
    return str(tmp_path)


@pytest.mark.parametrize("task, least", [("qa_1", 640), ("qa_2", 640)])
def test_questions_are_asked_over_their_documents_and_others(
    models, folder, tmp_path, task, least
):
    settings = RunSettings(
        (least, 1024), samples=4, text=folder, data=data_folder(tmp_path)
    )
    inputs = TaskData(settings, models[2].tokenizer)
    found = Ruler(task).examples(models[2], settings, inputs)
    count = 4 if task == "qa_1" else 1  # a question is asked once
    assert [e.length for e in found] == [least] * count + [1024] * count
    for example in found:
        text = text_of(models[2], example)
        assert len(example.tokens) + 32 <= example.length
        assert text.endswith(" Answer:") and example.info["documents"] > 1
        answer, question = example.info["answers"][0], text.rpartition("Question: ")[2]
        if task == "qa_1":
            assert re.search(rf"Document \d+:\nParagraph \d+ about .* {answer}\.", text)
            assert question == f"Which town, {answer.removeprefix('Number')}? Answer:"
        else:
            assert "T1\nText 1. More." in text and "T3\nText 3. More." in text
    assert [row[1:] for row in inputs.skipped] == (
        [(2, "KeyError: 'paragraphs'")]
        if task == "qa_1"
        else [
            (2, "no answer, supporting_facts, context"),
            (3, "ValueError: no supporting fact in its context"),
        ]
    )
    value = Ruler(task).value
    assert value({"predicted": "it is ADA?", "answers": ["Bob", "Ada"]}) == 1.0


def test_a_missing_data_set_is_named_with_its_place(models, folder, tmp_path):
    settings = RunSettings((1024,), text=folder, data=str(tmp_path))
    inputs = TaskData(settings, models[2].tokenizer)
    for task, name in (("qa_1", "dev-v2.0"), ("qa_2", "hotpot_dev_distractor_v1")):
        with pytest.raises(FileNotFoundError, match=f"no ruler/{name}.json") as error:
            Ruler(task).examples(models[2], settings, inputs)
        assert ".io" in str(error.value)


def test_documents_are_repeated_when_they_run_out(models):
    question = ruler_qa.Question("q", ["a"], [0], [1])
    problem = ruler_qa.document_problem(
        np.random.default_rng(0), ["one", "two", "three"], question
    )
    text = problem.build(7).text
    assert text.count("Document ") == 7
    assert sorted(Counter(re.findall("one|two|three", text)).values()) == [2, 2, 3]


def test_the_runner_asks_scores_and_reports(
    model_folder, folder, tmp_path, monkeypatch
):
    settings = RunSettings((512,), samples=2, text=folder, batch_size=2)
    model = load_model(model_folder, (4,))
    tasks = make_tasks(["ruler_niah_single_1", "ruler_vt"])
    inputs = TaskData(settings, model.tokenizer)
    right = " ".join(
        answer
        for task in tasks
        for example in task.examples(model, settings, inputs)
        for answer in example.info["answers"]
    )

    def scripted(model, memory, logits, new_tokens, ratio, stop=()):
        assert stop == ()
        text = f"they are {right}" if ratio else "nothing"
        return Continuations(
            [text] * len(logits), [np.zeros(1, np.int32)] * len(logits), memory
        )

    monkeypatch.setattr(generation, "answer", scripted)
    methods = make_methods(["beacon", "window"], [4])
    metrics, text = evaluate(model, tasks, methods, settings, tmp_path / "out")
    found = {(m["task"], m["method"]): m for m in metrics if m["metric"] == "match"}
    for task in tasks:
        assert found[task.name, "beacon_x4"]["value"] == 1.0
        assert found[task.name, "window"]["value"] == 0.0
    assert "## RULER niah_single_1" in text and "## RULER vt" in text
    mean = [m for m in metrics if m["task"] == "RULER" and m["method"] == "beacon_x4"]
    assert [(m["metric"], m["value"], m["count"]) for m in mean] == [
        ("mean of 2/13", 1.0, 4)
    ]
