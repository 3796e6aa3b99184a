"""lm_eval's own clients of OpenAI's protocol give the scores of our adapter."""

import importlib
import importlib.util
import json

import pytest

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
pytestmark = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm_eval is an extra of 700 MB")


@pytest.fixture
def lm_eval(monkeypatch):
    """(Instance, the module of clients), which want a key in the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    return instance, importlib.import_module("lm_eval.models.openai_completions")


@pytest.fixture
def options(model, server_url):
    folder = str(model.path)
    return dict(model="tiny", tokenizer=folder, batch_size=2, max_length=900)


def test_local_completions_score_and_answer_as_the_adapter(
    lm_eval, options, model, server_url, text
):
    instance, clients = lm_eval
    adapter = importlib.import_module("beacon_jax.evaluation.lm_eval")
    ask = lambda kind, rows: [instance(kind, {}, row, i) for i, row in enumerate(rows)]
    pairs = [
        (text[:400] + "The key of door 4 is", " 676"),
        (text[:300] + "The key of door 5 is", " 595 or so"),
        ("A", " b c"),
        ("", " and then"),
    ]
    settings = {"until": ["\n", "."], "max_gen_toks": 12, "temperature": 0.0}
    prompts = [(text[:n] + "The key", settings) for n in (0, 50, 300)]
    theirs = clients.LocalCompletionsAPI(
        base_url=f"{server_url}/v1/completions",
        tokenizer_backend="huggingface",
        **options,
    )
    ours = adapter.BeaconLM(model, ratio="auto")
    found = theirs.loglikelihood(ask("loglikelihood", pairs))
    want = ours.loglikelihood(ask("loglikelihood", pairs))
    for (score, greedy), (expected, best) in zip(found, want, strict=True):
        assert score == pytest.approx(expected, abs=1e-3)
        assert bool(greedy) == bool(best)
    requests = ask("generate_until", prompts)
    assert theirs.generate_until(requests) == ours.generate_until(requests)
    rows = ask("loglikelihood_rolling", [(text[:600],)])
    (score,), (expected,) = (lm.loglikelihood_rolling(rows) for lm in (theirs, ours))
    assert score == pytest.approx(expected, abs=1e-2)


def test_local_chat_completions_answer_as_a_chat(lm_eval, options, model, server_url):
    from beacon_jax.inference.chat import Chat

    instance, clients = lm_eval
    written = importlib.import_module("lm_eval.models.api_models").JsonChatStr
    client = clients.LocalChatCompletion(
        base_url=f"{server_url}/v1/chat/completions",
        **(options | {"batch_size": 1}),
        eos_string="<none>",
    )
    for said in ("The key?", "Door 7?"):
        messages = [{"role": "user", "content": said}]
        settings = {"until": [], "max_gen_toks": 9, "temperature": 0.0}
        row = (written(json.dumps(messages)), settings)
        (found,) = client.generate_until([instance("generate_until", {}, row, 0)])
        chat = Chat(model, max_new_tokens=9, ratio="auto", stop="<none>")
        assert found == chat.say(said).text
