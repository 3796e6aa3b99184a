"""Evaluation's ids: answers behind their questions, one bos, no eos, known tokens."""

import copy
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from beacon_jax.evaluation import likelihood, prompts
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.baselines.text import TextCompressor
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.runner import evaluate
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.base import Instance
from beacon_jax.evaluation.tasks.generation import GenerationTask
from beacon_jax.evaluation.tasks.mmlu import LETTERS, Mmlu
from beacon_jax.tokenise import encode, front
from tests.evaluation.conftest import VOCAB
from tests.text_tokenizers import ADDED, BOS, EOS, KINDS, TEXT, make

every_kind = pytest.mark.parametrize("kind", KINDS)
every_addition = pytest.mark.parametrize("added", ADDED)
TEMPLATE = "{{ bos_token }}{% for m in messages %}({{ m.content }}){% endfor %}"


def stand_in(kind, added="nothing", template=None) -> Any:
    tokenizer = copy.copy(make(kind, added))
    tokenizer.chat_template = template
    return SimpleNamespace(tokenizer=tokenizer)


@every_kind
@every_addition
def test_prompts_have_one_bos_and_no_eos(kind, added):
    model = stand_in(kind, added)
    bos, eos = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    plain = prompts.encode(model, TEXT, "Answer: ", "auto").tolist()
    assert plain.count(bos) == len(front(model.tokenizer)) and eos not in plain
    assert plain == encode(model.tokenizer, f"{TEXT}Answer: ", "start").tolist()
    asked = prompts.encode(stand_in(kind, added, TEMPLATE), TEXT, "", "auto").tolist()
    assert asked[0] == bos and asked.count(bos) == 1 and eos not in asked
    cut = prompts.cut_middle(model.tokenizer, TEXT, 1000)
    assert cut == TEXT


def test_an_answer_begins_without_thoughts_where_the_template_can_leave_them_out():
    """As Qwen3's does, whose answers of a few tokens were thoughts alone."""
    thought = (
        "{% if enable_thinking is defined and not enable_thinking %}[-]{% endif %}"
    )
    asked = prompts.encode(stand_in("gpt-2", template=TEMPLATE + thought), "x", "The ")
    plain = prompts.encode(stand_in("gpt-2", template=TEMPLATE), "x", "[-]The ")
    assert asked.tolist() == plain.tolist()


@every_kind
@every_addition
def test_letters_and_answers_have_the_ids_of_the_whole_text(kind, added):
    model, question = stand_in(kind, added), "who argued? Answer:"
    tokens = encode(model.tokenizer, question, "start")
    whole = encode(model.tokenizer, f"{question} A", "start").tolist()
    # Some take the space for a token's end: then the text has no border there.
    same = whole[: len(tokens)] == tokens.tolist()
    example = Instance("0", 64, tokens, {"space": True, "answers": ["A"]})
    letters = [ids.tolist() for ids in Mmlu().further(model, example)]
    assert len(letters) == len(LETTERS)
    (answer,) = GenerationTask().further(model, example)
    assert letters[0] == answer.tolist()
    if same:
        assert letters[0] == whole[len(tokens) :]
    # In a template that ends with a special token.
    tokens = encode(model.tokenizer, f"{question}{EOS}", "bare")
    whole = encode(model.tokenizer, f"{question}{EOS}A", "bare").tolist()
    example = Instance("0", 64, tokens, {"space": False, "answers": ["A"]})
    assert Mmlu().further(model, example)[0].tolist() == whole[len(tokens) :]


@every_kind
@every_addition
def test_pairs_are_the_whole_text_without_what_is_added_behind(kind, added):
    tokenizer = make(kind, added)
    for context, continuation in ((TEXT, " stone"), ("The ar", "gument"), (BOS, "A")):
        pair = likelihood.encode_pair(tokenizer, context, continuation)
        whole = encode(tokenizer, context + continuation, "start").tolist()
        assert np.concatenate(pair).tolist() == whole
        assert len(pair.context) and len(pair.continuation)
        assert tokenizer.eos_token_id not in whole
        assert whole.count(tokenizer.bos_token_id) <= 1
    pair = likelihood.encode_pair(tokenizer, "", f"{BOS}A")
    assert pair.context.tolist() == [tokenizer.bos_token_id]
    assert tokenizer.bos_token_id not in pair.continuation


def test_a_continuation_without_a_token_is_named():
    with pytest.raises(ValueError, match="makes no token of the continuation ' '"):
        likelihood.encode_pair(make("t5"), "", " ")


# --- tokens beyond the embedding ---------------------------------------------------


@pytest.fixture(scope="module")
def longer(model):
    """The tiny model; its tokenizer has a token more than its embedding rows."""
    tokenizer = copy.deepcopy(model.tokenizer)
    missing = VOCAB - len(tokenizer)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(missing)])
    tokenizer.add_tokens(["<tool>"])
    assert tokenizer.convert_tokens_to_ids("<tool>") == VOCAB
    return dataclasses.replace(model, tokenizer=tokenizer)


SAID = rf"the model has 0 to {VOCAB - 1}: {VOCAB} \('<tool>'\) has no row"


def asked_of(tmp_path, topics, context="river stone "):
    folder = tmp_path / "data/longeval"
    folder.mkdir(parents=True)
    row = {"context": context * 9, "question": "Which?", "topics": topics}
    file = folder / "topic_retrieval.jsonl"
    file.write_text(json.dumps(row | {"num_topics": 1}) + "\n")
    return RunSettings(data=str(tmp_path / "data"), max_length=256)


@pytest.mark.parametrize("name", ["perplexity", "passkey", "needle", "multi_needle"])
def test_text_of_a_run_is_checked_before_it_begins(longer, tmp_path, name):
    for i in range(30):
        text = "river <tool> stone. Window beacon memory slot. " * 40
        (tmp_path / f"{i}.txt").write_text(text)
    settings = RunSettings(
        lengths=(384,), samples=2, text=str(tmp_path), haystack=str(tmp_path)
    )
    methods = make_methods(["window"], [])
    with pytest.raises(ValueError, match=f"example 384/.* of {name} has .*{SAID}"):
        evaluate(longer, make_tasks([name]), methods, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("topics", "context"), [(["<tool>"], "river "), (["river"], "river <tool> ")]
)
def test_questions_and_answers_are_checked_before_a_run(
    longer, tmp_path, topics, context
):
    settings = asked_of(tmp_path, topics, context)
    tasks, methods = make_tasks(["topic_retrieval"]), make_methods(["window"], [])
    with pytest.raises(ValueError, match=f"example 0 of topic_retrieval has .*{SAID}"):
        evaluate(longer, tasks, methods, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pairs_are_checked_before_they_are_scored(longer):
    good = likelihood.encode_pair(longer.tokenizer, "river", " stone")
    for texts, side in ((("<tool>", " stone"), "context"), (("a", "<tool>"), "cont")):
        bad = likelihood.encode_pair(longer.tokenizer, *texts)
        with pytest.raises(ValueError, match=f"{side}.* of pair 1 has .*{SAID}"):
            likelihood.score(longer, [good, bad], ratio=2)


def test_text_of_a_compressor_is_checked(longer):
    method = TextCompressor(lambda text, budget: "river <tool>", "text_same", 2)
    with pytest.raises(ValueError, match=f"the text of text_same has .*{SAID}"):
        method.shorten(longer, np.arange(1, 40, dtype=np.int32), 20)


def test_a_document_of_perplexity_release_begins_with_one_bos(settings):
    (task,) = make_tasks(["perplexity_release"])
    tokenizer = make("gpt-2", "both")
    model: Any = SimpleNamespace(tokenizer=tokenizer, window=32)
    inputs = TaskData(settings, tokenizer)
    inputs.__dict__["documents"] = [TEXT * 9, BOS + TEXT * 9]
    one = dataclasses.replace(settings, lengths=(96,), samples=2)
    found = task.examples(model, one, inputs)
    assert len({e.info["document"] for e in found}) == 2
    for example in found:
        assert example.tokens[0] == tokenizer.bos_token_id
        assert list(example.tokens).count(tokenizer.bos_token_id) == 1
