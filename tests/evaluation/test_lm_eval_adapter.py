"""`BeaconLM`: what lm_eval asks and gets; in lm_eval itself where it is installed."""

import copy
import dataclasses
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import beacon_jax
from beacon_jax.evaluation import likelihood
from beacon_jax.hf.adapter import write_adapter
from beacon_jax.tokenise import encode

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


class Request:
    def __init__(self, *args):
        self.args = args


class Hook:
    """Stands for lm_eval's cache: what it is told."""

    def __init__(self):
        self.told = []

    def add_partial(self, kind, args, result):
        self.told.append((kind, args, result))


def stand_ins():
    """The two parts of lm_eval that the adapter uses when it is imported."""
    api = types.ModuleType("lm_eval.api.model")

    class LM:
        def __init__(self):
            self.cache_hook = Hook()

    api.__dict__["LM"] = LM
    registry = types.ModuleType("lm_eval.api.registry")
    registry.__dict__["register_model"] = lambda name: lambda cls: cls
    return {m.__name__: m for m in (api, registry)}


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_LM_EVAL:
            for name, module in stand_ins().items():
                patch.setitem(sys.modules, name, module)
        name = "beacon_jax.evaluation.lm_eval"
        patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(name)
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(model_folder):
    return beacon_jax.load(model_folder)


@pytest.fixture
def lm(adapter, model):
    made = adapter.BeaconLM(model, ratio=2, batch_size=1, max_length=30)
    made.set_cache_hook(Hook()) if HAS_LM_EVAL else None
    return made


def test_beacons_of_another_folder_are_those_that_load_takes(
    adapter, model_folder, tmp_path
):
    write_adapter(Path(model_folder), tmp_path / "adapter")
    options = {"beacons": str(tmp_path / "adapter"), "allow_other_base": False}
    made = adapter.BeaconLM(str(model_folder), ratio=2, **options)
    expected = beacon_jax.load(model_folder, beacons=options["beacons"])
    assert made.model.identity == expected.identity


TEXT = "window beacon memory slot ratio digit river stone " * 12


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "beacon_jax.evaluation.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r'pip install "beacon_jax\[lm-eval\]"'):
        importlib.import_module("beacon_jax.evaluation.lm_eval")


def test_loglikelihoods_are_the_scores_of_the_shortened_pairs(lm, model):
    asked = [(TEXT, " river"), ("window", " beacon memory"), ("", "stone")]
    found = lm.loglikelihood([Request(*a) for a in asked], disable_tqdm=True)
    pairs = [likelihood.encode_pair(model.tokenizer, *a) for a in asked]
    room = 31 - len(pairs[0].continuation)
    assert len(pairs[0].context) > room
    pairs[0] = pairs[0]._replace(context=pairs[0].context[-room:])
    scores = likelihood.score(model, pairs, ratio=2, batch_size=1)
    assert found == [tuple(s) for s in scores]
    told = {args: result for _, args, result in lm.cache_hook.told}
    assert told == dict(zip(asked, found, strict=True))


def test_a_whole_text_is_the_sum_of_its_pieces(lm, model):
    tokens = model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    pairs = likelihood.rolling_pairs(np.asarray(tokens), 0, 30)
    assert len(pairs) > 1
    scores = likelihood.score(model, pairs, ratio=2, batch_size=1)
    expected = sum(s.loglikelihood for s in scores)
    found = lm.loglikelihood_rolling([Request(TEXT), Request("")], disable_tqdm=True)
    assert found == [pytest.approx(expected, rel=1e-5), 0.0]


def test_texts_are_generated_as_the_model_generates_them(lm, model):
    options = {"until": ["e"], "max_gen_toks": 6, "do_sample": False}
    asked = [
        Request("window beacon", options),
        Request(TEXT, options),
        Request("river", options),
        Request("", {"max_gen_toks": 2, "temperature": 0.7, "top_p": 0.9}),
    ]
    texts = lm.generate_until(asked, disable_tqdm=True)
    assert not any("e" in texts[i] for i in (0, 2))
    plain = model.generate("river", ratio=2, max_new_tokens=6, stop="e")
    assert texts[2] == plain
    shortened = encode(model.tokenizer, TEXT, "start")[-24:]
    expected = model.generate(shortened, ratio=2, max_new_tokens=6, stop="e")
    assert texts[1] == expected
    assert lm.generate_until(asked, disable_tqdm=True) == texts  # sampling is seeded
    assert len(lm.cache_hook.told) == 8


def test_what_does_not_fit_shortens_the_answer_first_and_is_said(lm, model, capsys):
    context = encode(model.tokenizer, TEXT, "start")
    words = model.tokenizer.decode(context[:12])
    assert len(encode(model.tokenizer, words, "start")) == 12
    (found,) = lm.generate_until([Request(words, {"max_gen_toks": 40})], True)
    assert found == model.generate(words, ratio=2, max_new_tokens=18)
    assert lm.shortened == {"contexts": 0, "tokens": 0, "answers": 1}
    err = capsys.readouterr().err
    assert "max_length=30: of 1 requests 0 contexts were cut, by 0 tokens" in err
    lm.generate_until([Request(words, {"max_gen_toks": 4})], disable_tqdm=True)
    assert "max_length" not in capsys.readouterr().err  # each call says its own
    lm.loglikelihood([Request(TEXT, " a")], disable_tqdm=True)
    assert lm.shortened["contexts"] == 1 and lm.shortened["tokens"] > 0
    with pytest.raises(ValueError, match="max_length=30 is less than the"):
        lm.loglikelihood([Request("a", TEXT)], disable_tqdm=True)


@pytest.mark.parametrize(
    ("length", "asked", "most", "expected"),
    [
        (10, 20, 40, (10, 20, 0, False)),
        (22, 20, 40, (22, 18, 0, True)),
        (30, 20, 40, (24, 16, 6, True)),
        (39, 20, 40, (24, 16, 15, True)),
        (180, 256, 12, (6, 6, 174, True)),
        (100, 4, 40, (36, 4, 64, False)),
    ],
)
def test_a_budget_is_divided(length, asked, most, expected):
    cut = likelihood.divide(np.arange(length, dtype=np.int32), asked, most)
    assert (len(cut.context), cut.new, cut.lost, cut.short) == expected
    assert cut.context[-1] == length - 1


def test_a_budget_without_room_is_an_error():
    with pytest.raises(ValueError, match="max_length=1 has no room"):
        likelihood.divide(np.arange(3, dtype=np.int32), 4, 1)


def test_a_token_beyond_the_embedding_is_named_before_anything_is_fed(
    adapter, model, monkeypatch
):
    tokenizer = copy.deepcopy(model.tokenizer)
    rows = model.config.vocab_size
    tokenizer.add_tokens([f"<extra{i}>" for i in range(rows - len(tokenizer))])
    tokenizer.add_tokens(["<tool>"])
    lm = adapter.BeaconLM(dataclasses.replace(model, tokenizer=tokenizer), ratio=2)
    monkeypatch.setattr(likelihood, "_score", None)
    monkeypatch.setattr(type(model), "complete", None)
    said = rf"1 has .* the model has 0 to {rows - 1}: {rows} \('<tool>'\) has no row"
    for call, *good in (
        (lm.loglikelihood, "river", " stone"),
        (lm.loglikelihood_rolling, "river"),
        (lm.generate_until, "river", {"max_gen_toks": 2}),
    ):
        bad = [f"river <tool> {good[0]}", *good[1:]]
        with pytest.raises(ValueError, match=said):
            call([Request(*good), Request(*bad)], disable_tqdm=True)


def test_a_whole_text_that_brings_its_bos_has_no_second_one(lm, model, monkeypatch):
    seen, zero = [], likelihood.Score(0.0, True)

    def score(pairs, quiet):
        seen.extend(pairs)
        return [zero] * len(pairs)

    monkeypatch.setattr(lm, "_score", score)
    bos = model.tokenizer.bos_token
    lm.loglikelihood_rolling([Request(f"{bos}river stone")], disable_tqdm=True)
    (pair,) = seen
    assert pair.context.tolist() == [model.tokenizer.bos_token_id]
    bare = encode(model.tokenizer, "river stone", "bare")
    assert pair.continuation.tolist() == bare.tolist()


def test_an_option_of_generation_that_is_unknown_is_named(adapter):
    read = adapter.generation_options
    assert read({"until": "\n\n"}, 7)["stop"] == ("\n\n",)
    assert read({}, 7)["max_new_tokens"] == 7
    assert read({"do_sample": True}, 7)["temperature"] == 1.0
    assert read({"do_sample": False, "temperature": 0.5}, 7)["temperature"] == 0.0
    with pytest.raises(ValueError, match=r"\['num_beams'\]"):
        read({"num_beams": 4}, 7)


def test_a_conversation_is_written_by_the_tokenizers_template(lm, monkeypatch):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    turns = [{"role": "user", "content": "river"}]
    assert lm.apply_chat_template(turns) == "<user>river<assistant>"
    turns.append({"role": "assistant", "content": "sto"})
    begun = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert begun == "<user>river<assistant>sto"
    assert lm.chat_template(True) == template and lm.chat_template(False) is None
    assert "/" not in lm.tokenizer_name
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{% for %}")
    with pytest.raises(ValueError, match="chat template.* is no jinja template"):
        lm.apply_chat_template(turns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"truncation": "right"}, "truncation='right'"),
        ({"ratio": 3}, "ratio=3"),
        ({"max_length": -5}, "max_length=-5"),
    ],
)
def test_a_wrong_argument_is_named(adapter, model, options, message):
    with pytest.raises(ValueError, match=message):
        adapter.BeaconLM(model, **options)


CHOICE = """task: beacon_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
GENERATE = """task: beacon_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm_eval is an extra of 700 MB")
def test_lm_eval_runs_its_tasks(adapter, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm = adapter.BeaconLM(model, ratio=2, batch_size=4)
    rows, hits = [], 0
    for i in range(5):
        question = " ".join(TEXT.split()[i : i + 30])
        choices = ["river", "stone", "slot"]
        pairs = [
            likelihood.encode_pair(model.tokenizer, question, f" {c}") for c in choices
        ]
        scores = [s.loglikelihood for s in likelihood.score(model, pairs, ratio=2)]
        hits += int(np.argmax(scores)) == i % 3
        said = model.generate(question, ratio=2, max_new_tokens=4, stop=".")
        row = {"question": question, "choices": choices, "answer": i % 3}
        rows.append(row | {"said": said if i else "never"})
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE)):
        yaml = text.replace("FILE", str(file))
        (tmp_path / f"{name}.yaml").write_text(yaml)
    lm_eval = importlib.import_module("lm_eval")
    tasks = importlib.import_module("lm_eval.tasks")
    found = lm_eval.simple_evaluate(
        model=lm,
        tasks=["beacon_choice", "beacon_generate"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path)),
    )["results"]
    assert found["beacon_choice"]["acc,none"] == pytest.approx(hits / 5)
    assert found["beacon_generate"]["exact_match,none"] == pytest.approx(4 / 5)
