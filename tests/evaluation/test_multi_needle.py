"""Three needles in three turns: one memory goes on, or is made anew each time."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.methods import Full
from beacon_jax.evaluation.reading import answer, read
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.multi_needle import MultiNeedle
from tests.evaluation.offline import examples, text_of


class Watched(Full):
    """Full attention that notes what it is asked to remember."""

    def __init__(self, question_aware):
        super().__init__()
        self.question_aware, self.seen = question_aware, []

    def remember(self, model, past, following):
        joined = zip(past, following, strict=True)
        self.seen.append([np.concatenate(pair) for pair in joined])
        return super().remember(model, past, following)


@pytest.fixture(scope="module")
def batch(long_model, small, long_inputs):
    task = MultiNeedle()
    return task, task.examples(long_model, small, long_inputs)[-2:]


@pytest.mark.parametrize("ratio", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_each_turn_goes_on_from_the_answers_before(long_model, batch, ratio):
    """Every answer is that to the whole conversation so far, read at once: with full
    attention, and with beacons."""
    task, found = batch
    beacon = make_methods(["beacon"], [4])[0]
    method = beacon if ratio else Watched(False)
    answers = task.run(long_model, method, found)
    if isinstance(method, Watched):
        assert len(method.seen) == 1  # compressed once
    for example, told in zip(found, answers, strict=True):
        turns = [example.tokens, *map(np.int32, example.info["turns"])]
        assert len(turns) == len(told["predicted"]) == len(told["seconds"]) == 3
        said = turns[0]
        for turn, text in enumerate(told["predicted"]):
            # Twice: the shapes of the batch.
            logits, memory = read(long_model, [said, said], ratio)
            alone = answer(long_model, memory, logits, task.new_tokens, ratio)
            assert alone.texts[0] == text
            if turn < 2:
                said = np.concatenate([said, alone.tokens[0], turns[turn + 1]])


def test_a_method_that_sees_the_question_compresses_for_every_turn(long_model, batch):
    task, found = batch
    once, thrice = Watched(False), Watched(True)
    plain = task.run(long_model, once, found)
    again = task.run(long_model, thrice, found)
    assert len(thrice.seen) == 3
    assert [a["predicted"] for a in again] == [a["predicted"] for a in plain]
    for i, example in enumerate(found):
        first, second, third = (len(call[i]) for call in thrice.seen)
        turns = example.info["turns"]
        assert first == len(example.tokens)
        assert third <= example.length - task.new_tokens
        assert np.array_equal(thrice.seen[1][i][-len(turns[0]) :], turns[0])
        assert np.array_equal(thrice.seen[2][i][-len(turns[1]) :], turns[1])
        assert np.array_equal(thrice.seen[2][i][:second], thrice.seen[1][i])


def test_needles_lie_in_thirds_and_the_turns_fit(wanted):
    for example in examples("multi_needle", wanted):
        text = text_of(wanted[0], example)
        answers, depths = example.info["answers"], example.info["depths"]
        places = [text.index(f"number is: {a}.") for a in answers]
        assert np.argsort(places).tolist() == np.argsort(depths).tolist()
        assert sorted(int(3 * d) for d in depths) == [0, 1, 2]
        turns = [wanted[0].tokenizer.decode(t) for t in example.info["turns"]]
        for turn, number in zip(turns, answers[1:], strict=True):
            city = turn.split("special magic ")[1].split(" number")[0]
            assert f"The special magic {city} number is: {number}." in text
            assert turn.endswith(f"The special magic {city} number is:")


def test_a_chat_template_gives_the_turns_between_answers():
    class Chat(SimpleNamespace):
        def apply_chat_template(self, turns, **_):
            said = "".join(f"[{t['role']}]{t['content']}[end]" for t in turns)
            return said + "[assistant]"

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    model = SimpleNamespace(tokenizer=Chat(chat_template="x"))
    turn = MultiNeedle._turn(model, "auto", "Q2?", "It is")  # type: ignore[arg-type]
    assert "".join(map(chr, turn)) == "[end][user]Q2?[end][assistant]It is"
    turn = MultiNeedle._turn(model, "none", "Q2?", "It is")  # type: ignore[arg-type]
    assert "".join(map(chr, turn)) == "\n\nQ2?\nIt is"


def test_short_texts_have_fewer_turns(wanted):
    model, settings, _ = wanted
    task = MultiNeedle()
    turns = [task.turns(model, settings.chat, n) for n in range(100, 1600, 50)]
    assert turns == sorted(turns) and set(turns) == {1, 2, 3}
    length = 100 + 50 * turns.index(2)
    assert {
        len(e.info["answers"])
        for e in examples("multi_needle", wanted, lengths=(length,))
    } == {2}


def test_turns_are_scored_one_by_one_and_together(long_model, small, tmp_path):
    task = MultiNeedle()
    given = {"answers": ["123", "456", "789"], "kv_bytes": 8, "answer_loss": 1.0}
    given |= {"method": "full", "ratio": None, "length": 64}
    rows = [
        given | {"predicted": p} for p in ([" 123.", "4", "7 789"], [" 123", "", ""])
    ]
    found = {m["metric"]: m for m in task.score(rows)}
    assert found["accuracy"]["value"] == pytest.approx(0.5)
    values = [found[f"accuracy_turn{i}"]["value"] for i in (1, 2, 3)]
    assert values == [1.0, 0.0, 0.5]
    assert found["accuracy_turn1"]["detail"] and "detail" not in found["accuracy"]
    text = task.report(list(found.values()), tmp_path)
    assert "| turn 1 |" in " ".join(text.split()) and "0.50 [0.33, 0.67]" in text

    settings = dataclasses.replace(small, lengths=small.lengths[-1:])
    beacon = make_methods(["beacon"], [4])
    evaluate(long_model, make_tasks(["multi_needle"]), beacon, settings, tmp_path)
    lines = (tmp_path / "timings" / "multi_needle.beacon_x4.jsonl").read_text()
    assert {len(json.loads(line)["seconds"]) for line in lines.splitlines()} == {3}
    lines = (tmp_path / "predictions" / "multi_needle.beacon_x4.jsonl").read_text()
    assert "seconds" not in lines
