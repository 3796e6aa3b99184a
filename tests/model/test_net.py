"""Nets of several kinds in one process: each has its own program, and keeps it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.bench.device import random_variables
from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed, feed_jit
from beacon_jax.core.memory import init_memory
from beacon_jax.inference.decode import decode_block
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.model.net import Net
from beacon_jax.model.partition import make_mesh, make_partition
from tests.tiny import TINY

ROWS, LENGTH, PLAN = 2, 12, np.asarray([2])


def nets() -> dict[str, Net]:
    split = lambda mesh: make_partition(mesh, jax.devices()[:2])
    return {
        "plain": Net(TINY),
        "bfloat16": Net(TINY, "bfloat16"),
        "blockwise": Net(TINY, attention="blockwise"),
        "heads": Net(TINY, partition=split("tensor:2")),
        "rows": Net(TINY, partition=split("data:2")),
    }


def outputs(net: Net) -> tuple[np.ndarray, np.ndarray]:
    """Logits behind a text, and behind one more token that is decoded."""
    variables = random_variables(TINY, net.dtype)
    tokens = np.random.default_rng(0).integers(3, TINY.vocab_size, (ROWS, LENGTH))
    memory = init_memory(TINY, ROWS, 32, net.dtype)
    lengths = np.full(ROWS, LENGTH)
    out, memory = feed(net, variables, memory, jnp.asarray(tokens), lengths, PLAN)
    next_token = jnp.asarray(tokens[:, 0])
    logits, _ = decode_step(net, variables, memory, next_token, PLAN, static=(2,))
    return np.asarray(out.last_logits), np.asarray(logits)


@pytest.mark.slow
def test_nets_of_several_kinds_do_not_disturb_each_other():
    known = nets()
    before = feed_jit._cache_size(), decode_step._cache_size()
    first = {name: outputs(net) for name, net in known.items()}
    made = feed_jit._cache_size(), decode_step._cache_size()
    assert [m - b for m, b in zip(made, before, strict=True)] == [len(known)] * 2
    for name in reversed(list(nets())):
        for a, b in zip(outputs(nets()[name]), first[name], strict=True):
            np.testing.assert_array_equal(a, b)
    assert (feed_jit._cache_size(), decode_step._cache_size()) == made
    for name, rounding in (("blockwise", 1e-5), ("heads", 1e-5), ("rows", 1e-5)):
        for a, b in zip(first[name], first["plain"], strict=True):
            np.testing.assert_allclose(a, b, atol=rounding)
    assert np.abs(first["bfloat16"][0] - first["plain"][0]).max() > 1e-4


def test_a_dtype_is_the_same_however_it_is_written():
    same = {Net(TINY, d) for d in (jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16"))}
    assert len(same) == 1 and len({Net(TINY), Net(TINY, np.float32)}) == 1


@pytest.mark.slow
def test_models_on_two_meshes_answer_in_turns_as_one_device_does():
    """The memory of each is a pack's, too: it is loaded where its model is."""
    variables = random_variables(TINY, "float32")
    alone = Model(TINY, variables)
    text = np.random.default_rng(1).integers(3, 31, 40)
    ask = lambda model, **more: model.complete(text[:5], max_new_tokens=6, **more)
    expected = ask(alone, context=text, ratio=2).tokens.tolist()
    models = [
        Model(TINY, variables, partition=make_partition(mesh, jax.devices()[at:][:2]))
        for mesh, at in (("tensor:2", 0), ("tensor:2", 2), ("data:1,tensor:2", 4))
    ]
    for model in (*models, alone, *models):
        assert ask(model, context=text, ratio=2).tokens.tolist() == expected
    assert decode_block._cache_size() >= len(models) + 1


@pytest.mark.parametrize("mesh", ["tensor:2", "data:2", None])
def test_a_pack_goes_on_on_the_devices_of_its_model(mesh, tmp_path):
    variables = random_variables(TINY, "float32")
    alone = Model(TINY, variables)
    text = np.random.default_rng(2).integers(3, 31, 40)
    memory = alone.compress([text, text[:30]], ratio=2)
    memory.save(tmp_path / "a.beacon")
    partition = make_partition(mesh) if mesh else None
    model = Model(TINY, variables, partition=partition)
    loaded = Memory.load(tmp_path / "a.beacon", model)
    found, expected = (
        m.complete([text[:4], text[:5]], memory=x, max_new_tokens=5)
        for m, x in ((model, loaded), (alone, memory))
    )
    assert [f.tokens.tolist() for f in found] == [e.tokens.tolist() for e in expected]


def test_a_mesh_has_the_sizes_that_were_asked_for():
    mesh = make_mesh({"data": 2, "tensor": 3}, jax.devices())
    assert dict(mesh.shape) == {"data": 2, "tensor": 3}
    assert make_partition(mesh).mesh == mesh
