"""Memories as resources: made, listed, continued, kept and deleted."""

import json
import threading

import httpx
import jax
import numpy as np
import pytest

from beacon_jax.inference.memory import Memory
from beacon_jax.serving import programs
from beacon_jax.serving.device import Device
from beacon_jax.serving.engine import TooLong
from beacon_jax.serving.reading import Reading, Source
from beacon_jax.serving.service import Limits
from beacon_jax.serving.store import Full, Store, Unknown, make_id
from beacon_jax.serving.turns import Turns
from tests.serving.conftest import LIMITS, eventually, served


def make(client, **fields):
    answer = client.post("/v1/memories", json=fields)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def events(client, path, **fields):
    with client.stream("POST", path, json=fields) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def test_a_memory_is_that_of_the_model_and_told_in_full(client, model, text):
    made = make(client, text=text, ratio=4, name="doors")
    want = model.compress(text, ratio=4)
    account = want.account()
    assert made["tokens"] == want.lengths[0]
    assert made["slots"] == want.entries[0]
    assert made["bytes"] == account.nbytes
    assert made["full_bytes"] == want.lengths[0] * want.slot_nbytes
    assert made["name"] == "doors" and made["method"] == "beacon"
    assert sum(w["tokens"] for w in made["windows"]) == made["tokens"]
    assert sum(w["slots"] for w in made["windows"]) == made["slots"]
    assert [w["ratio"] for w in made["windows"][1:3]] == [4, 4]
    assert client.get(f"/v1/memories/{made['id']}").json() == made
    listed = client.get("/v1/memories").json()["data"]
    assert [x["tokens"] for x in listed if x["id"] == made["id"]] == [made["tokens"]]


def test_equal_texts_and_settings_are_one_memory(client, service, text):
    first = client.post("/v1/memories", json={"text": text[:900], "ratio": 2})
    again = client.post("/v1/memories", json={"text": text[:900], "ratio": 2})
    other = client.post("/v1/memories", json={"text": text[:900], "ratio": 4})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    assert other.json()["id"] != first.json()["id"]


def test_a_memory_is_read_once_whoever_asks_at_the_same_time(client, model, text):
    found, reading = [], []
    real = type(model).compress

    def compress(self, *given, **options):
        reading.append(1)
        return real(self, *given, **options)

    type(model).compress = compress
    try:
        body = {"text": text[::-1], "ratio": 8}
        url = f"{client.base_url}/v1/memories"
        ask = lambda: found.append(httpx.post(url, json=body, timeout=120).json())
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        type(model).compress = real
    assert len({made["id"] for made in found}) == 1
    assert len(reading) == 1


def test_progress_is_told_as_events(client, model, text):
    told = events(client, "/v1/memories", text=text[10:], ratio=8, stream=True)
    *steps, made = told
    assert made["object"] == "memory" and made["status"] == "ready"
    assert steps and all(step["object"] == "memory.progress" for step in steps)
    tokens = [step["tokens"] for step in steps]
    assert tokens == sorted(tokens) and steps[-1]["total"] == made["tokens"]
    assert {step["id"] for step in steps} == {made["id"]}


def test_a_memory_may_be_made_behind_the_request(client, text):
    answer = client.post(
        "/v1/memories", json={"text": text[5:], "ratio": 8, "background": True}
    )
    assert answer.status_code == 202
    told = answer.json()
    assert told["status"] == "compressing" and told["progress"]["total"] > 100
    path = f"/v1/memories/{told['id']}"
    eventually(lambda: client.get(path).json()["status"] == "ready")


def test_why_a_memory_could_not_be_made_is_told_later(client, text):
    body = {"text": text * 20, "ratio": 2, "background": True}
    told = client.post("/v1/memories", json=body)
    assert told.status_code == 202
    path = f"/v1/memories/{told.json()['id']}"
    eventually(lambda: client.get(path).json()["status"] == "failed")
    error = client.get(path).json()["error"]
    assert "a row of the server has 1,024" in error["message"]


def test_a_file_is_read_as_text(client, text):
    send = lambda data, name="doors.txt", **fields: client.post(
        "/v1/memories", files={"file": (name, data)}, data=fields
    )
    text = text[:700]
    made = send(text.encode(), ratio="8")
    assert made.status_code == 201, made.text
    assert made.json()["name"] == "doors.txt"
    assert made.json()["id"] == make(client, text=text, ratio=8)["id"]
    spans = send(text.encode(), ratio="4", spans="key of door 3 ").json()["spans"]
    assert len(spans) == 1
    refused = send(b"%PDF-1.7 \x00", "a.pdf")
    assert refused.status_code == 415
    assert "is a PDF" in refused.json()["error"]["message"]
    assert send("\u00e4\u00f6 latin".encode("latin-1")).status_code == 415
    none = client.post("/v1/memories", files={"other": ("a", b"")}, data={"text": "x"})
    assert none.status_code == 400


@pytest.mark.slow
def test_methods_without_training_make_memories_too(client, model, text):
    from beacon_jax.inference.compressors import METHODS

    for method in METHODS:
        made = make(client, text=text, ratio=4, method=method)
        want = model.compress(text, ratio=4, method=method)
        assert made["slots"] == want.entries[0], method
        assert made["method"] == method
        body = {"prompt": "The key", "memory": made["id"], "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        alone = model.complete("The key", memory=want, max_new_tokens=16)
        assert answer["choices"][0]["text"] == alone.text, method


def test_nothing_is_compiled_when_a_memory_with_biases_is_asked(client, text):
    made = make(client, text=text[:600], ratio=4, method="attention-matching")
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    body = {"prompt": "The key", "memory": made["id"], "max_tokens": 9}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert client.post("/v1/completions", json=body).status_code == 200
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.slow
def test_spans_and_budgets_are_kept(client, model, text):
    want = model.compress(text, ratio=8, spans="door 7 ")
    assert make(client, text=text, ratio=8, spans="door 7 ")["slots"] == want.entries[0]
    made = make(client, text=text, max_slots=300)
    assert made["slots"] <= 300
    made = make(client, text=text, max_bytes="1MiB")
    assert made["bytes"] <= 2**20
    lists = make(client, text=text, ratio=[2, 8])
    assert [w["ratio"] for w in lists["windows"][1:4]] == [8, 8, 8]


def test_append_makes_another_memory_and_fork_another_name(client, model, text):
    first = make(client, text=text[:1000], ratio=8)
    path = f"/v1/memories/{first['id']}"
    longer = client.post(f"{path}/append", json={"text": text[1000:]}).json()
    want = model.compress(text[1000:], memory=model.compress(text[:1000], ratio=8))
    assert longer["tokens"] == want.lengths[0]
    assert longer["slots"] == want.entries[0]
    assert longer["parent"] == first["id"]
    assert client.get(path).json()["tokens"] == first["tokens"]
    fork = client.post(f"{path}/fork", json={"name": "mine"}).json()
    assert fork["id"] != first["id"] and fork["name"] == "mine"
    ask = {"prompt": "The key", "temperature": 0, "max_tokens": 5}
    texts = {
        client.post("/v1/completions", json=ask | {"memory": name}).json()["choices"][
            0
        ]["text"]
        for name in (first["id"], fork["id"])
    }
    assert len(texts) == 1
    assert client.delete(f"/v1/memories/{fork['id']}").json()["deleted"]
    assert client.get(f"/v1/memories/{fork['id']}").status_code == 404
    assert client.delete(f"/v1/memories/{fork['id']}").status_code == 404
    assert client.get(path).status_code == 200


def test_a_conversation_becomes_a_memory(client, text):
    messages = [
        {"role": "system", "content": "Keys: " + text[:300]},
        {"role": "user", "content": "Which is that of door 2?"},
        {"role": "assistant", "content": "838"},
    ]
    made = make(client, messages=messages, ratio=4)
    assert made["messages"] == messages
    more = {"role": "user", "content": "And of door 3?"}
    body = {"memory": made["id"], "messages": [more], "max_tokens": 5, "temperature": 0}
    short = client.post("/v1/chat/completions", json=body).json()
    whole = body | {"messages": [*messages, more]}
    assert (
        client.post("/v1/chat/completions", json=whole).json()["choices"]
        == (short["choices"])
    )
    assert short["usage"]["prompt_tokens_details"]["cached_tokens"] > 100


def test_what_cannot_be_a_memory_is_refused(client, text):
    cases = [
        ({}, 400, "text or messages"),
        ({"text": "x", "messages": [{"role": "user", "content": ""}]}, 400, "not both"),
        ({"text": ""}, 400, "text='' is empty"),
        ({"text": "x", "method": "os:system"}, 400, "method='os:system' is unknown"),
        ({"text": "x", "method": "retention:/etc"}, 400, "is unknown"),
        ({"text": text, "ratio": 5}, 400, "ratio=5 is not one of"),
        ({"text": text, "ratio": 2, "max_slots": 9}, 400, "ratio=2 together with"),
        ({"text": text, "max_slots": 3}, 400, "max_slots=3"),
        ({"text": text, "spans": "("}, 400, "not a regular expression"),
        ({"text": text, "spans": [[5, 2]]}, 400, "spans has (5, 2)"),
        ({"text": text * 20, "ratio": 2}, 413, "a row of the server has 1,024"),
        ({"text": text, "max_bytes": "many"}, 400, "max_bytes"),
    ]
    for body, status, said in cases:
        answer = client.post("/v1/memories", json=body)
        assert answer.status_code == status, (body, answer.text)
        assert said in answer.json()["error"]["message"], answer.text


# --- the store -------------------------------------------------------------------


@pytest.fixture
def memory(model, text):
    return programs.on_host(model.compress(text[:800], ratio=8))


def device(model):
    return Device(model, 1, model.net.dtype.name)


def about(memory):
    return {"object": "memory", "tokens": int(memory.lengths[0]), "base": 0}


def test_memories_survive_the_process_and_are_checked(model, memory, tmp_path):
    name = make_id("a")
    Store(model, tmp_path, 2**30).put(name, memory, about(memory))
    again = Store(model, tmp_path, 2**30)
    found = again.get(name)
    assert np.array_equal(found.state.k, memory.state.k)
    assert again.about(name)["tokens"] == memory.lengths[0]
    pack = tmp_path / f"{name}.beacon"
    data = bytearray(pack.read_bytes())
    data[-3] ^= 1
    pack.write_bytes(data)
    from beacon_jax.inference.packs import PackError

    with pytest.raises(PackError, match="damaged"):
        Store(model, tmp_path, 2**30).get(name)


def test_a_damaged_memory_is_made_again(model, memory, text, tmp_path):
    store = Store(model, tmp_path, 2**30)
    reading = Reading(device(model), store, Turns(False), slots=1024, queue=4)
    tokens = model.encode(text[:500], "text", first=True)
    source = Source(tokens, {"ratio": 8})
    job = reading.submit(source)
    eventually(lambda: job.done)
    pack = tmp_path / f"{job.id}.beacon"
    pack.write_bytes(pack.read_bytes()[:-5])
    fresh = Store(model, tmp_path, 2**30)
    reading = Reading(device(model), fresh, Turns(False), slots=1024, queue=4)
    again = reading.submit(source)
    eventually(lambda: again.done)
    assert again.error is None
    assert Memory.load(pack, model).lengths[0] == len(tokens)


def test_those_used_longest_ago_leave_the_ram_and_never_the_disk(
    model, memory, tmp_path
):
    size = sum(x.nbytes for x in (memory.state.k, memory.state.v))
    store = Store(model, tmp_path, int(2.5 * size))
    names = [make_id(i) for i in range(4)]
    for name in names[:2]:
        store.put(name, memory, about(memory))
    store.get(names[0])
    for name in names[2:]:
        store.put(name, memory, about(memory))
    resident = [name for name in names if store.about(name)["resident"]]
    assert resident == names[2:]
    assert store.held_nbytes <= store.most
    for name in names:
        assert store.get(name).lengths[0] == memory.lengths[0]
    assert len(store.all()) == 4


def test_without_a_folder_what_has_no_room_is_refused(model, memory):
    store = Store(model, None, 3 * memory.nbytes // 2)
    store.put(make_id(1), memory, about(memory))
    with pytest.raises(Full, match="delete memories, or start the server with --store"):
        store.put(make_id(2), memory, about(memory))
    assert store.get(make_id(1)) is memory


def test_a_folder_is_shared_by_several_servers(model, memory, tmp_path):
    one, other = Store(model, tmp_path, 2**30), Store(model, tmp_path, 2**30)
    one.put(make_id(1), memory, about(memory))
    assert other.get(make_id(1)).lengths[0] == memory.lengths[0]
    other.delete(make_id(1))
    with pytest.raises(Unknown):
        one.about(make_id(1))
    assert one.all() == []


def test_names_that_are_no_ids_touch_no_file(model, tmp_path):
    store = Store(model, tmp_path, 2**30)
    (tmp_path / "mem-x.json").write_text("{}")
    for name in ("mem-x", "../mem-x", "/etc/passwd", "", "mem-" + "0" * 31 + "\n"):
        assert name not in store
        with pytest.raises(Unknown):
            store.get(name)
        with pytest.raises(Unknown):
            store.delete(name)


def test_another_models_memories_are_not_there(model, memory, tmp_path):
    store = Store(model, tmp_path, 2**30)
    store.put(make_id(1), memory, about(memory))
    path = tmp_path / f"{make_id(1)}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hash": ["x", "y"]}))
    assert Store(model, tmp_path, 2**30).all() == []


def test_a_memory_that_no_row_can_hold_is_refused(model, tmp_path, text):
    store = Store(model, tmp_path, 2**30)
    reading = Reading(device(model), store, Turns(False), slots=128, queue=4)
    tokens = model.encode(text, "text", first=True)
    for settings in ({"ratio": 2}, {"ratio": 2, "method": "snapkv"}):
        job = reading.submit(Source(tokens, settings))
        eventually(lambda job=job: job.done, 120)
        assert isinstance(job.error, TooLong)
    assert not list(tmp_path.iterdir())


def test_a_text_that_nobody_waits_for_is_not_read_to_its_end(model, tmp_path, text):
    store = Store(model, tmp_path, 2**30)
    reading = Reading(device(model), store, Turns(False), slots=2048, queue=4)
    tokens = model.encode(text, "text", first=True)
    job = reading.submit(Source(tokens, {"ratio": 4}))
    reading.leave(job)
    eventually(lambda: job.done, 120)
    assert job.error is not None and not list(tmp_path.iterdir())
    # Somebody else may want it now.
    job = reading.submit(Source(tokens, {"ratio": 4}))
    eventually(lambda: job.done, 120)
    assert job.error is None


def test_without_a_key_only_names_of_this_machine_are_answered(model):
    limits = Limits(**{**vars(LIMITS), "local": True})
    with (
        served(model, None, limits) as service,
        httpx.Client(base_url=service.address) as client,
    ):
        for host, status in (
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost:8000", 200),
            ("127.0.0.1", 200),
            ("[::1]:80", 200),
        ):
            answer = client.get("/v1/memories", headers={"Host": host})
            assert answer.status_code == status, host


def test_a_key_is_asked_for_where_there_is_one(model):
    limits = Limits(**{**vars(LIMITS), "key": "s3cret"})
    with (
        served(model, None, limits) as service,
        httpx.Client(base_url=service.address) as client,
    ):
        for headers in ({}, {"Authorization": "Bearer other"}):
            for path in ("/v1/models", "/v1/memories", "/metrics"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert "error" in answer.json()
        right = {"Authorization": "Bearer s3cret"}
        assert client.get("/v1/models", headers=right).status_code == 200
        for path in ("/", "/health", "/ready"):
            assert client.get(path).status_code == 200
