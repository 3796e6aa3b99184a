"""Budgets, the adaptive ratio, batches of ragged rows, sharded evaluation."""

import dataclasses

import numpy as np
import pytest

from beacon_jax.evaluation import prompts
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Beacon, remember
from beacon_jax.evaluation.reading import answer, answer_losses, read
from beacon_jax.evaluation.runner import batches
from beacon_jax.evaluation.tasks.base import Instance


def rows(model, *sizes):
    rng = np.random.default_rng(3)
    return [rng.integers(5, 300, n).astype(np.int32) for n in sizes]


def test_a_method_that_keeps_other_bytes_than_its_ratio_is_caught(model):
    class Greedy(Beacon):
        family = "greedy"

        def remember(self, model, past, following):
            memory = super().remember(model, past, following)
            more = lambda x: np.concatenate([x, x[-1:]])
            rows = [
                dataclasses.replace(row, spans=more(row.spans), ratios=more(row.ratios))
                for row in memory.rows
            ]
            return dataclasses.replace(memory, rows=tuple(rows))

    past = rows(model, 64, 32)
    memory, kept = remember(model, Beacon(4), past, past)
    assert kept == [16 * memory.slot_nbytes, 8 * memory.slot_nbytes]
    with pytest.raises(AssertionError, match="greedy_x4 keeps .* of 64 tokens"):
        remember(model, Greedy(4), past, past)


def test_adapt_takes_the_smallest_ratio_with_positions_for_the_text(model):
    # 512 positions, W 32, ratios 2 and 4: x2 holds 480 * 2 + 32 = 992 tokens.
    (method,) = make_methods(["beacon"], ["adapt"])
    assert method.name == "beacon_adapt"
    assert method.resolve(model, 64).ratio == 4  # 64 + 1024 > 992
    short = [e for e in (1, 64, 4000)]
    assert [method.resolve(model, n).live_ratio for n in short] == [4, 4, 4]
    past = rows(model, 64)
    a = remember(model, method.resolve(model, 64), past, past)[1]
    assert a == remember(model, Beacon(4), past, past)[1]


def test_a_batch_has_one_length_and_one_ratio(model):
    class Odd(Beacon):
        def resolve(self, model, tokens):
            return Beacon(2 if tokens < 50 else 4)

    sizes = [(64, 40), (64, 45), (64, 60), (64, 61), (64, 62), (96, 63)]
    examples = [
        Instance(str(i), n, np.zeros(t, np.int32)) for i, (n, t) in enumerate(sizes)
    ]
    found = [
        (method.ratio, [e.id for e in batch])
        for method, batch in batches(examples, 2, model, Odd(2))
    ]
    assert found == [(2, ["0", "1"]), (4, ["2", "3"]), (4, ["4"]), (4, ["5"])]


@pytest.mark.slow
def test_answers_of_ragged_rows_are_those_of_the_rows_alone(model):
    past, last = rows(model, 64, 0, 32), rows(model, 9, 32, 1)
    references = rows(model, 5, 40, 1)

    def ask(*which):
        pick = lambda x: [x[i] for i in which]
        memory, _ = remember(model, Beacon(4), pick(past), pick(last))
        logits, memory = read(model, pick(last), 4, memory)
        losses = answer_losses(model, memory, logits, pick(references), 4)
        answers = answer(model, memory, logits, 12, 4)
        return losses, [t.tolist() for t in answers.tokens], answers.texts

    together = ask(0, 1, 2)
    for i in range(3):
        alone = ask(i)
        assert together[0][i] == pytest.approx(alone[0][0], abs=1e-4)
        assert [x[i] for x in together[1:]] == [x[0] for x in alone[1:]]


def test_fit_is_the_most_that_has_room():
    build = lambda n: np.zeros(7 + 3 * n, np.int32)
    for room in range(7, 60):
        n = prompts.fit(build, room)
        assert len(build(n)) <= room < len(build(n + 1))
    with pytest.raises(ValueError, match="leaves lines 6 tokens .* needs 7"):
        prompts.fit(build, 6, name="lines")


def test_a_chat_template_wraps_the_question_unless_told_not_to(model, monkeypatch):
    text, template = "memory slot", "{{ messages[0].content }}#"
    plain = prompts.encode(model, text, " x", "auto")
    monkeypatch.setattr(model.tokenizer, "chat_template", template, raising=False)
    decode = lambda ids: model.tokenizer.decode(ids.tolist())
    assert decode(prompts.encode(model, text, " x", "auto")) == "memory slot# x"
    assert decode(prompts.encode(model, text, " x", "none")) == decode(plain)
    for broken in ("{% for %}", "{{ 1 / 0 }}"):
        monkeypatch.setattr(model.tokenizer, "chat_template", broken, raising=False)
        with pytest.raises(ValueError, match="the tokenizer's chat template"):
            prompts.encode(model, text)


def test_malformed_rows_are_skipped_and_counted(model, tmp_path):
    (tmp_path / "set").mkdir()
    file = tmp_path / "set" / "a.jsonl"
    good = '{"text": "x", "answers": ["y"]}'
    bad = ["{", '["x"]', '{"text": "x"}', '{"text": 3, "answers": []}', "\\xff"]
    file.write_text("\n".join([good, *bad, good]) + "\n")
    inputs = TaskData(RunSettings(data=str(tmp_path)), model.tokenizer)
    found = inputs.rows("set/a", {"text": str, "answers": list}, "nowhere")
    assert found == [{"text": "x", "answers": ["y"]}] * 2
    assert inputs.skipped == [
        ("a.jsonl", 2, "not JSON"),
        ("a.jsonl", 3, "not an object"),
        ("a.jsonl", 4, "no answers"),
        ("a.jsonl", 5, "text of a wrong type"),
        ("a.jsonl", 6, "not JSON"),
    ]
    with pytest.raises(FileNotFoundError, match=r"has no set/b\.jsonl .* from there"):
        inputs.rows("set/b", {}, "there")
    with pytest.raises(FileNotFoundError, match="--data is not given: put set/b"):
        TaskData(RunSettings(), model.tokenizer).rows("set/b", {}, "there")
