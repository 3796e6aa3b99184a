"""A model whose layers lie in stages, used as any other: equal to one device's."""

import numpy as np
import pytest

import beacon_jax
from beacon_jax.inference.compressors import METHODS

TEXT = " ".join(f"The key of door {i} is {i * 919 % 1000}." for i in range(90))
PROMPTS = ["The key of door 7 is", "A"]


@pytest.fixture(scope="module")
def one():
    return beacon_jax.load("tiny-beacon")


@pytest.fixture(scope="module")
def split():
    return beacon_jax.load("tiny-beacon", mesh="stage:4")


def used(memory):
    """What the entries in use hold, all rows and layers."""
    state, found = memory.state, []
    for row, count in enumerate(memory.entries.tolist()):
        found += [np.asarray(x)[:, row, :count] for x in (state.k, state.v)]
    return found


def same_memory(a, b):
    assert a.entries.tolist() == b.entries.tolist()
    for x, y in zip(used(a), used(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_device_holds_its_layers_and_their_memory(split):
    memory = split.compress(TEXT[:200], ratio=4)
    assert memory.state.k.sharding.shard_shape(memory.state.k.shape)[0] == 1
    kernel = split.variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[0] == 1


def test_a_text_is_read_and_asked_as_on_one_device(one, split):
    told = []
    options = {"ratio": [2, 8, 0, 4], "progress_windows": 1}
    memory = split.compress(
        TEXT, on_progress=lambda n, of: told.append((n, of)), **options
    )
    same_memory(one.compress(TEXT, **options), memory)
    assert told[-1][0] == told[-1][1] and len(told) > 2
    for prompt in PROMPTS:
        ask = {"max_new_tokens": 40}
        want = one.complete(prompt, memory=one.compress(TEXT, **options), **ask)
        got = split.complete(prompt, memory=memory, **ask)
        assert got.tokens.tolist() == want.tokens.tolist()
        same_memory(want.memory, got.memory)


@pytest.mark.slow
def test_batches_and_whatever_else_a_memory_can_be(one, split, tmp_path):
    for options in (
        {"ratio": 8, "recent": True},
        {"ratio": 8, "spans": "door 7 "},
        {"max_slots": 90},
        {"ratio": 4, "temperature": 0.8, "seed": 3},
    ):
        context = [TEXT, TEXT[:333]]
        more = {"context": context, "max_new_tokens": 20, **options}
        ours = split.complete(PROMPTS, **more)
        theirs = one.complete(PROMPTS, **more)
        for a, b in zip(ours, theirs, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist(), options
    memory = split.compress(TEXT, ratio=8, memory_dtype="int8")
    memory.save(tmp_path / "x.beacon")
    loaded = beacon_jax.Memory.load(tmp_path / "x.beacon", split)
    plain = one.compress(TEXT, ratio=8, memory_dtype="int8")
    for again in (memory, loaded):
        got = split.generate("A", memory=again, max_new_tokens=20)
        assert got == one.generate("A", memory=plain, max_new_tokens=20)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_without_training_keep_the_same(one, split, method):
    options = {"ratio": 4, "method": method, "max_new_tokens": 20, "context": TEXT}
    got, want = (m.complete("The key of", **options) for m in (split, one))
    assert got.tokens.tolist() == want.tokens.tolist()


@pytest.mark.slow
def test_all_axes_of_a_mesh_go_together(one):
    split = beacon_jax.load("tiny-beacon", mesh="data:2,tensor:2,stage:2")
    options = {"ratio": 4, "max_new_tokens": 20, "context": [TEXT, TEXT[:400]]}
    pairs = zip(*(m.complete(PROMPTS, **options) for m in (split, one)), strict=True)
    for got, want in pairs:
        assert got.tokens.tolist() == want.tokens.tolist()
