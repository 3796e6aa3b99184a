"""Completions and conversations over HTTP, by the client that people use."""

import json

import httpx
import numpy as np
import openai
import pytest

from beacon_jax.inference.chat import Chat


@pytest.fixture(scope="module")
def ai(server_url):
    with openai.OpenAI(base_url=f"{server_url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def memory(server_url, text):
    """The id of a memory of the text at x8."""
    made = httpx.post(
        f"{server_url}/v1/memories", json={"text": text, "ratio": 8}, timeout=120
    )
    return made.json()["id"]


@pytest.fixture(scope="module")
def here(model, text):
    """The same memory, made here."""
    return model.compress(text, ratio=8)


def test_the_model_is_listed(ai):
    (listed,) = ai.models.list().data
    assert listed.id == "tiny"
    assert ai.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        ai.models.retrieve("gpt")


def test_a_completion_behind_a_memory_is_that_of_the_model(ai, memory, here, model):
    made = ai.completions.create(
        model="tiny",
        prompt="The key of door 3 is",
        max_tokens=20,
        temperature=0,
        extra_body={"memory": memory},
    )
    want = model.complete("The key of door 3 is", memory=here, max_new_tokens=20)
    assert made.choices[0].text == want.text
    assert made.choices[0].finish_reason == "length"
    assert made.usage.completion_tokens == 20
    assert made.usage.prompt_tokens == here.lengths[0] + 9
    assert made.usage.prompt_tokens_details.cached_tokens == here.lengths[0]
    held = made.usage.memory
    assert held["tokens"] == want.memory.lengths[0]
    assert held["slots"] == want.memory.entries[0]
    assert held["bytes"] == want.memory.used_nbytes
    times = made.timings
    assert 0 <= times["queue_seconds"] <= times["first_token_seconds"]


def test_a_stream_has_the_same_text_and_its_usage_in_the_last_chunk(ai, memory):
    asked = dict(
        model="tiny",
        prompt="The key",
        max_tokens=30,
        seed=7,
        n=2,
        extra_body={"memory": memory},
    )
    whole = ai.completions.create(**asked)
    texts, finishes, usage = ["", ""], {}, None
    with ai.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    finishes[choice.index] = choice.finish_reason
            usage = chunk.usage or usage
    assert texts == [choice.text for choice in whole.choices]
    assert finishes == {0: "length", 1: "length"}
    assert usage.completion_tokens == whole.usage.completion_tokens == 60


def test_prompts_in_one_request_are_answered_each_as_alone(ai, model):
    prompts = ["The key", [5, 6, 7], "door 4"]
    for prompt in ("The key", [5, 6, 7], ["The key", "door 4"], [[5, 6], [7]]):
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        rows = prompt if several else [prompt]
        made = ai.completions.create(
            model="tiny", prompt=prompt, max_tokens=7, temperature=0
        )
        assert [c.index for c in made.choices] == list(range(len(rows)))
        for row, choice in zip(rows, made.choices, strict=True):
            want = model.complete(row, max_new_tokens=7, ratio="auto")
            assert choice.text == want.text
    assert prompts


def test_the_seed_decides_what_is_drawn(ai, model):
    draw = lambda seed, n=1: [
        c.text
        for c in ai.completions.create(
            model="tiny", prompt="door", max_tokens=12, seed=seed, n=n
        ).choices
    ]
    assert draw(5) == draw(5) != draw(6)
    assert draw(5, 3)[1:] == [draw(6)[0], draw(7)[0]]
    want = model.complete(
        "door", max_new_tokens=12, ratio="auto", seed=5, temperature=1.0
    )
    assert draw(5) == [want.text]
    assert draw(None) != draw(None)


def test_stop_strings_end_an_answer_in_front_of_them(ai, model):
    free = ai.completions.create(
        model="tiny", prompt="The key", max_tokens=40, temperature=0
    )
    end = free.choices[0].text[10:12]
    for stop in (end, [end, "\x00"]):
        made = ai.completions.create(
            model="tiny", prompt="The key", max_tokens=40, temperature=0, stop=stop
        )
        text = free.choices[0].text
        assert made.choices[0].text == text[: text.index(end)]
        assert made.choices[0].finish_reason == "stop"


def test_logprobs_of_answer_and_prompt_are_told(ai):
    asked = dict(model="tiny", prompt="The key of door", max_tokens=3, temperature=0)
    made = ai.completions.create(**asked, logprobs=4, echo=True)
    told = made.choices[0].logprobs
    assert "".join(told.tokens) == made.choices[0].text
    assert made.choices[0].text.startswith("The key of door")
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    for word, own, top in zip(
        told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True
    ):
        assert top[word] == pytest.approx(own)
        assert len(top) in (4, 5)
    # Greedy: what was drawn is the most likely of all.
    for own, top in zip(told.token_logprobs[-3:], told.top_logprobs[-3:], strict=True):
        assert own == pytest.approx(max(top.values()))
    only = ai.completions.create(**{**asked, "max_tokens": 0}, logprobs=0, echo=True)
    assert only.choices[0].text == "The key of door"
    assert only.choices[0].logprobs.token_logprobs[1:] == pytest.approx(
        told.token_logprobs[1:-3], abs=1e-4
    )
    echoed = ai.completions.create(**asked, echo=True)
    assert echoed.choices[0].text == made.choices[0].text


def test_a_conversation_is_answered_in_the_chat_template(ai, model):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "The key?"}]},
    ]
    made = ai.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=15,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    chat = Chat(model, system="Be short.", max_new_tokens=15, ratio="auto")
    assert made.choices[0].message.content == chat.say("The key?").text
    told = made.choices[0].logprobs.content
    assert "".join(each.token for each in told) == made.choices[0].message.content
    assert all(len(each.top_logprobs) == 3 for each in told)
    with ai.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=15,
        temperature=0,
        stream=True,
    ) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    text = "".join(delta.content or "" for delta in deltas)
    assert text == made.choices[0].message.content


def test_a_conversation_goes_on_in_its_memory(ai, memory, here, model):
    chat = Chat(model, here, max_new_tokens=10)
    talk = lambda messages, memory: ai.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=10,
        temperature=0,
        store=True,
        extra_body={"memory": memory},
    )
    user = lambda text: {"role": "user", "content": text}
    first = talk([user("Which key?")], memory)
    assert first.choices[0].message.content == chat.say("Which key?").text
    assert first.memory["parent"] == memory
    # The next turn brings its message alone, and feeds no more than that.
    second = talk([user("And door 9?")], first.memory["id"])
    want = chat.say("And door 9?")
    assert second.choices[0].message.content == want.text
    assert second.usage.prompt_tokens_details.cached_tokens > here.lengths[0] + 10
    # So does one that sends the whole conversation, as most clients do.
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    again = talk([user("Which key?"), answer, user("And door 9?")], first.memory["id"])
    assert again.choices[0].message.content == want.text
    assert again.memory["id"] == second.memory["id"]
    # And one whose messages were edited: only what both begin with is not fed again.
    other = {"role": "assistant", "content": "42"}
    edited = [user("Which key?"), other, user("And door 9?")]
    made = ai.chat.completions.create(
        model="tiny",
        messages=edited,
        max_tokens=10,
        temperature=0,
        extra_body={"memory": memory},
    )
    assert made.choices[0].message.content


def test_what_cannot_be_is_refused_by_its_name(client):
    cases = [
        ({"prompt": "x", "foo": 1}, 400, "foo", "no such field"),
        ({"prompt": "x", "max_token": 1}, 400, "max_token", "did you mean max_tokens"),
        ({}, 400, "prompt", "missing"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature", "valid number"),
        ({"prompt": "x", "temperature": -1}, 400, None, "temperature=-1"),
        ({"prompt": "x", "top_p": 3}, 400, None, "top_p=3"),
        ({"prompt": "x", "n": 0}, 400, "n", "greater than"),
        ({"prompt": "x", "tools": [{}]}, 400, "tools", "leave it out"),
        ({"prompt": "x", "logit_bias": {"1": 2}}, 400, "logit_bias", "leave it out"),
        ({"prompt": "x", "frequency_penalty": 1}, 400, "frequency_penalty", "leave"),
        ({"prompt": ""}, 400, None, "prompt='' is empty"),
        ({"prompt": []}, 400, "prompt", "give a text"),
        ({"prompt": [9**9]}, 400, None, "no row in its embedding"),
        ({"prompt": "x", "ratio": 3}, 400, "ratio", "ratio=3 is not one of"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens", "echo=true"),
        ({"prompt": "x", "max_tokens": 9**6}, 413, None, "a row has 1,024"),
        ({"prompt": "x", "model": "gpt"}, 400, "model", "use 'tiny'"),
        ({"prompt": "x", "memory": "mem-1"}, 404, None, "'mem-1' is not there"),
        ({"prompt": "x", "store": True, "n": 2}, 400, None, "store=true keeps one"),
        ([], 400, None, "not an object"),
    ]
    for body, status, param, said in cases:
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == status, (body, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param, body
        assert said in error["message"], (body, error["message"])


def test_what_changes_nothing_is_taken(client):
    body = {
        "prompt": "x",
        "max_tokens": 1,
        "user": "me",
        "metadata": {},
        "frequency_penalty": 0,
        "presence_penalty": None,
        "logit_bias": None,
        "best_of": 1,
        "suffix": None,
    }
    assert client.post("/v1/completions", json=body).status_code == 200


# What Open WebUI's backend sends to an OpenAI connection (routers/openai.py of version
# 0.6, read and written down by hand): the page's fields without their metadata, those
# of the model's settings, and headers of its own. A title is asked for in one piece.
OPEN_WEBUI_HEADERS = {
    "Authorization": "Bearer none",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "A",
    "X-OpenWebUI-User-Role": "admin",
}
OPEN_WEBUI = {
    "stream": True,
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ],
    "stream_options": {"include_usage": True},
    "temperature": 0.8,
    "top_p": 0.9,
    "max_tokens": 20,
    "seed": 4,
    "stop": ["###"],
    "frequency_penalty": 0,
    "presence_penalty": 0,
}
OPEN_WEBUI_TITLE = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Title of: Hello"}],
    "stream": False,
    "max_tokens": 30,
}


def test_requests_of_open_webui_work(client):
    send = lambda body: dict(content=json.dumps(body), headers=OPEN_WEBUI_HEADERS)
    path = "/v1/chat/completions"
    assert client.get("/v1/models", headers=OPEN_WEBUI_HEADERS).json()["data"]
    with client.stream("POST", path, **send(OPEN_WEBUI)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] >= 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    title = client.post(path, **send(OPEN_WEBUI_TITLE))
    assert title.status_code == 200
    assert title.json()["choices"][0]["message"]["role"] == "assistant"


def test_a_client_that_goes_frees_its_row(client, service):
    body = {"prompt": "x", "max_tokens": 900, "stream": True, "ratio": 0}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    from tests.serving.conftest import eventually

    idle = {"waiting": 0, "reading": 0, "answering": 0}
    eventually(lambda: service.engine.state() == idle)
    with pytest.raises(httpx.TimeoutException):
        client.post("/v1/completions", json=body | {"stream": False}, timeout=0.3)
    eventually(lambda: service.engine.state() == idle)


def test_metrics_count_what_was_done(client):
    client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
    text = client.get("/metrics").text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
    )
    name = 'beacon_jax_requests_total{route="/v1/completions",status="200"}'
    assert float(values[name]) >= 1
    assert float(values["beacon_jax_generated_tokens_total"]) >= 3
    assert float(values["beacon_jax_rows"]) == 4
    assert np.isfinite([float(v) for v in values.values()]).all()
