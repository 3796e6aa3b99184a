"""The generated tasks: what all of them promise, under three tokenizers."""

import shutil
from typing import Any

import numpy as np
import pytest

from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks, world
from beacon_jax.evaluation.tasks.babilong import Qa1, only_label, sentences
from beacon_jax.evaluation.tasks.records import JsonKV, Lines
from tests.evaluation.offline import examples, text_of

ANSWERED = ("needle", "needle_release", "multi_needle", "json_kv", "lines")
STORIES = ("babilong_qa1", "babilong_qa2", "babilong_qa3")
EVERY = (*ANSWERED, *STORIES, "mqar", "perplexity_release")


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_gives_the_same_bytes_and_another_gives_others(name, wanted):
    a, b, c = (examples(name, wanted, seed=seed, samples=2) for seed in (0, 0, 7))
    bytes_of = lambda found: [(e.id, e.info, e.tokens.tobytes()) for e in found]
    assert bytes_of(a) == bytes_of(b)
    assert [e.tokens.tobytes() for e in a] != [e.tokens.tobytes() for e in c]
    assert len({e.id for e in a}) == len(a)


@pytest.mark.parametrize("name", [*ANSWERED, *STORIES])
def test_one_more_unit_of_text_would_not_fit(name, wanted, monkeypatch):
    """The size that was chosen is the largest, by the prompts that were built."""
    seen, fit = [], prompts.fit

    def watched(build, room, **named):
        n = fit(build, room, **named)
        seen.append((len(build(n)), len(build(n + 1)), room))
        return n

    monkeypatch.setattr(prompts, "fit", watched)
    task: Any = make_tasks([name])[0]
    found = examples(name, wanted)
    assert len(seen) == len(found) == 6
    for example, (size, more, room) in zip(found, seen, strict=True):
        assert len(example.tokens) == size <= room < more
        turns = example.info.get("turns", [])
        used = size + sum(map(len, turns)) + (1 + len(turns)) * task.new_tokens
        assert used <= example.length
        # A token or two of haystack; a pair, a line or a sentence of the others.
        unit = 2 if "needle" in name else 100 if name == "json_kv" else 60
        assert example.length - used <= 2 * unit


@pytest.mark.parametrize("name", ANSWERED)
def test_answers_are_in_the_prompt_once_and_differ(name, wanted):
    for example in examples(name, wanted):
        text = text_of(wanted[0], example)
        answers = example.info["answers"]
        assert [text.count(a) for a in answers] == [1] * len(answers)
        assert len(set(answers)) == len(answers)


@pytest.mark.parametrize("name", [*ANSWERED, *STORIES])
def test_the_right_answer_is_worth_one_and_anothers_nothing(name, wanted):
    task: Any = make_tasks([name])[0]
    found = [e.info for e in examples(name, wanted)]
    many = name == "multi_needle"
    said = lambda info: [task.lead + a for a in info["answers"]]
    given = lambda info: said(info) if many else said(info)[0]
    if name == "needle_release":
        given = lambda info: task.needle
    for info in found:
        others = [o for o in found if o["answers"] != info["answers"]]
        assert task.value(info | {"predicted": given(info)}) == pytest.approx(1)
        for other in others[:2]:
            assert task.value(info | {"predicted": given(other)}) == 0
        nothing = ["", "", ""] if many else ""
        assert task.value(info | {"predicted": nothing}) == 0
    assert others or name in ("needle", "needle_release")


def test_a_length_without_room_says_what_is_needed(wanted):
    with pytest.raises(ValueError, match=r"--lengths.*use at least \d+ tokens more"):
        examples("needle", wanted, lengths=(64,))


@pytest.mark.parametrize("name", ["json_kv", "lines"])
def test_records_are_where_their_depth_says(name, wanted):
    sign = {"json_kv": '": "', "lines": ": REGISTER_CONTENT is <"}[name]
    for example in examples(name, wanted):
        text = text_of(wanted[0], example)
        count, depth = example.info["records"], example.info["depth"]
        assert text.count(sign) == count >= 3
        before = text.index(example.info["answers"][0])
        assert text[:before].count(sign) - 1 == round(depth * (count - 1))


def test_right_records_are_worth_one_and_wrong_ones_nothing():
    pair = {"answers": ["72a5e0bb-e717-4f74-bc94-5ba586467914"]}
    assert JsonKV().value(pair | {"predicted": pair["answers"][0] + '", "'}) == 1
    assert JsonKV().value(pair | {"predicted": pair["answers"][0][:-1]}) == 0
    line = {"answers": ["38295"]}
    given = {"38295>": 1, " is <38295>, not 1": 1, "3829": 0, "382950": 0, "1 38295": 0}
    for text, worth in given.items():
        assert Lines().value(line | {"predicted": text}) == worth


def replay(facts):
    """(person -> place, thing -> its places in order) by reading the sentences."""
    where, held, trail = {}, {}, {}
    for fact in facts:
        person, rest = fact.rstrip(".").split(" ", 1)
        last = rest.split()[-1]
        if last in world.PLACES:
            where[person] = last
            for thing, holder in held.items():
                if holder == person:
                    trail[thing].append(last)
        elif any(rest.startswith(verb) for verb in world.TAKE):
            held[last] = person
            assert trail.setdefault(last, [where[person]])[-1] == where[person]
        else:
            assert held.pop(last) == person
    return where, trail


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("more", [0, 2, 20])
def test_a_story_answers_its_question(kind, more):
    count = world.FACTS[kind][0] + more
    for seed in range(20):
        story = world.tell(kind, np.random.default_rng(seed), count)
        where, trail = replay(story.facts)
        asked = story.question.rstrip("?").split()
        if kind == 1:
            right = where[asked[-1]]
        elif kind == 2:
            right = trail[asked[-1]][-1]
        else:
            places = trail[asked[asked.index("before") - 1]]
            assert places.count(asked[-1]) == 1
            right = places[places.index(asked[-1]) - 1]
        assert story.answer == right and len(story.facts) == count


@pytest.mark.parametrize("name", STORIES)
def test_facts_stand_in_their_order_among_sentences_that_name_nobody(name, wanted):
    kind = STORIES.index(name) + 1
    for example in examples(name, wanted):
        text = text_of(wanted[0], example).split("Question:")[0]
        people = [s for s in sentences(text) if s.split()[0] in world.PEOPLE]
        assert len(people) == example.info["facts"] >= world.FACTS[kind][0]
        where, trail = replay(people)
        answer = example.info["answers"][0]
        assert answer in where.values() or any(answer in t for t in trail.values())
        assert text.index(people[0]) < len(text) / 2 < text.rindex(people[-1])


def test_only_the_right_place_in_the_first_sentence_counts():
    where = "Where was the milk before the office?"
    given = {
        " kitchen.": True,
        " office was next, it was in the kitchen": True,  # the question names it
        " kitchen. Or the garden.": True,
        " kitchen or garden.": False,
        " garden. No, the kitchen.": False,
        "": False,
    }
    for text, right in given.items():
        assert only_label(text, where, "kitchen") == right
        info = {"question": where, "answers": ["kitchen"], "predicted": text}
        assert Qa1().value(info) == right


@pytest.mark.parametrize("name", ["needle", "multi_needle", "lines", "babilong_qa2",
                                  "mqar", "perplexity_release"])  # fmt: skip
def test_a_run_that_stopped_ends_with_the_same_bytes(
    name, model_folder, small, tmp_path, long_model
):
    task, methods = make_tasks([name]), make_methods(["beacon", "window"], [4])
    evaluate(long_model, task, methods, small, tmp_path / "a")
    files = lambda out: {
        f.name: f.read_bytes() for f in (out / "predictions").iterdir()
    }
    whole = files(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "predictions" / f"{name}.beacon_x4.jsonl"
    lines = whole[file.name].splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:1]) + lines[1][:20])
    (tmp_path / "b" / "predictions" / f"{name}.window.jsonl").unlink()
    evaluate(long_model, task, methods, small, tmp_path / "b")
    assert files(tmp_path / "b") == whole
    report = (tmp_path / "b" / "report.md").read_text(encoding="utf-8")
    assert report.count("beacon_x4") >= 4 and task[0].name in report
