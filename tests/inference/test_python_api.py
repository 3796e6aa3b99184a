"""The public functions as a user meets them: names, reprs, errors. Compiles nothing."""

import dataclasses
import inspect
from typing import get_type_hints

import pytest

import beacon_jax
from beacon_jax.inference import options
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.generation import Generation
from beacon_jax.inference.memory import Memory
from beacon_jax.model.partition import make_partition
from tests.inference.memories import random_memory


@pytest.mark.parametrize(
    "keywords, kind, beside",
    [
        (options.ReadOptions, options.Reading, {"ratio"}),  # an argument of its own
        (options.CompleteOptions, options.Completion, set()),
    ],
)
def test_keywords_and_their_value_have_the_same_names_and_types(keywords, kind, beside):
    value = {f.name: f.type for f in dataclasses.fields(kind) if f.name not in beside}
    assert get_type_hints(keywords) == value


def test_every_option_is_in_the_signature_with_its_default():
    for name in ("complete", "generate"):
        shown = inspect.signature(getattr(beacon_jax, name)).parameters
        for field in dataclasses.fields(options.Completion):
            assert shown[field.name].default == field.default
    shown = inspect.signature(beacon_jax.compress).parameters
    for name in ("ratio", "memory", "reserve", "on_note", "max_bytes", "seed"):
        assert name in shown
    assert "options" not in shown


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("max_tokens", "max_new_tokens"),
        ("max_length", "max_new_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("ratios", "ratio"),
    ],
)
def test_an_option_that_is_misspelt_names_the_nearest(model, wrong, meant):
    with pytest.raises(TypeError, match=rf"\({wrong}=5\): did you mean {meant}\?"):
        model.generate("x", **{wrong: 5})
    with pytest.raises(TypeError, match=rf"Chat\({wrong}=5\): did you mean {meant}"):
        Chat(model, chat_template="{{ messages }}", **{wrong: 5})


def test_a_memory_says_what_it_holds():
    # 44 tokens, windows of 8 at x2 and x4: 4 + 4 x 2 slots, 4 tokens and 1 beacon open.
    one = random_memory([44])
    size = 17 * one.slot_nbytes / 2**20
    expected = f"1 row: 44 tokens → 12 slots + 5 open, x2.6, {size:.2f} MiB, float32"
    assert repr(one) == f"Memory({expected})"
    assert one.entries.tolist() == [17] and one.used_nbytes == 17 * one.slot_nbytes
    assert repr(random_memory([44, 44])).startswith("Memory(2 rows: 88 tokens → 24 ")
    assert "6 tokens still to be fed" in repr(one.truncate(30))


def test_a_model_a_chat_and_an_answer_say_what_they_hold(model, plain):
    assert repr(model) == (
        "Model(llama: 13,184 parameters, 2 layers, float32, 256 positions, window 8, "
        "ratios 2, 4, cpu)"
    )
    assert "no beacons" in repr(plain)
    chat = Chat(model, chat_template="{{ messages }}")
    assert repr(chat) == "Chat(0 turns, None)"
    made = Generation("Yes. " * 30, range(3), "stop", "", 1431, 0.1, 0.2, None)  # type: ignore
    assert repr(made) == (
        f"Generation({('Yes. ' * 30)[:57] + '...'!r}: 3 tokens behind 1,431 read, "
        "finish='stop')"
    )


def test_a_pack_goes_to_the_devices_of_its_model(model, tmp_path):
    memory = random_memory([44], config=model.config, identity=model.identity)
    memory.save(tmp_path / "one.beacon")
    split = dataclasses.replace(model, partition=make_partition("data:2"))
    for given in ({"model": split}, {"mesh": "data:2"}):
        loaded = Memory.load(tmp_path / "one.beacon", **given)
        assert len(loaded.state.k.devices()) == 2
    assert len(Memory.load(tmp_path / "one.beacon", model).state.k.devices()) == 1
