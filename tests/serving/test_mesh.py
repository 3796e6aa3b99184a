"""A model that is split over devices is served as one that is not."""

import threading

import httpx
import jax
import pytest

import beacon_jax
from beacon_jax.serving.service import Limits, Service
from beacon_jax.serving.store import Store
from tests.serving.conftest import LIMITS, TEMPLATE, served

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def test_devices_that_would_split_rows_are_refused(tmp_path):
    split = beacon_jax.load("tiny-beacon", mesh="data:2,tensor:2")
    with pytest.raises(ValueError, match="use --mesh=tensor:N, and N servers"):
        Service(split, "tiny", Store(split, tmp_path, 2**20), LIMITS)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("tensor:2", "stage:2")],
)
def test_a_model_on_a_mesh_answers_as_on_one_device(model, text, tmp_path, mesh):
    split = beacon_jax.load("tiny-beacon", mesh=mesh)
    split.tokenizer.chat_template = TEMPLATE
    here = model.compress(text, ratio=8)
    limits = Limits(**{**vars(LIMITS), "slots": 512})
    prompts = ["The key", "door 5", "A", "The key of door 17 is"]
    with (
        served(split, tmp_path, limits) as service,
        httpx.Client(base_url=service.address, timeout=120) as client,
    ):
        body = {"text": text, "ratio": 8}
        memory = client.post("/v1/memories", json=body).json()["id"]
        found = {}

        def ask(prompt):
            body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
            path = f"{service.address}/v1/completions"
            for name in (memory, None):
                given = body | ({"memory": name} if name else {})
                answer = httpx.post(path, json=given, timeout=120).json()
                found[prompt, name] = answer["choices"][0]["text"]

        def read(number):
            body = {"text": text[number:], "ratio": 4}
            path = f"{service.address}/v1/memories"
            assert httpx.post(path, json=body, timeout=120).status_code == 201

        # Texts are read while answers grow: launches that do not wait for their
        # turn would hang in each other's collectives.
        threads = [threading.Thread(target=ask, args=(p,)) for p in prompts]
        threads += [threading.Thread(target=read, args=(n,)) for n in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
            assert not thread.is_alive()
    for prompt in prompts:
        want = model.complete(prompt, memory=here, max_new_tokens=20)
        assert found[prompt, memory] == want.text
        want = model.complete(prompt, ratio="auto", max_new_tokens=20)
        assert found[prompt, None] == want.text
