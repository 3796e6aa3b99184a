"""Arguments that cannot be meant so are told at the door. Compiles nothing: every
model here breaks as soon as it is fed."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

from beacon_jax.cli import context
from beacon_jax.inference import room
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.validate import ArgumentError
from tests.inference.memories import Fed, random_memory

pytestmark = pytest.mark.usefixtures("nothing_is_fed")


@pytest.mark.parametrize(
    "given, said",
    [
        (None, r"prompt=None is None: give text or token ids"),
        (b"abc", r"prompt=b'abc' is of type bytes: give text, prompt\.decode"),
        (Path("a.txt"), r"prompt=.*a\.txt.* is of type .*Path.* prompt\.read_text\("),
        (5, "prompt=5 is of type int: give text or token ids"),
        ([1.5, 2.0], "prompt=.* token ids are whole numbers"),
        (["a", None], r"prompt\[1\]=None is None"),
        ([b"a"], r"prompt\[0\]=b'a' is of type bytes"),
        ({"a": 1}, "prompt=.* is of type dict"),
    ],
)
def test_what_is_no_text_is_named_with_the_remedy(model, given, said):
    with pytest.raises(TypeError, match=said):
        model.generate(given)
    if not isinstance(given, Path):  # a context is read from it
        with pytest.raises(TypeError, match=said.replace("prompt", "context")):
            model.compress(given)


def test_a_memory_that_is_none_says_how_to_get_one(model):
    with pytest.raises(
        TypeError, match=r"memory='x\.beacon'.*Memory\.load\('x\.beacon"
    ):
        model.generate("a", memory="x.beacon")
    with pytest.raises(TypeError, match="memory=5 is of type int: give what model.com"):
        model.compress("a", memory=5)
    with pytest.raises(TypeError, match="memory='x'"):
        Chat(model, "x", chat_template="{{ messages }}")  # type: ignore


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": -3}, ValueError, "max_new_tokens=-3 must be"),
        ({"max_new_tokens": 10**30}, ValueError, r"max_new_tokens=1.* below 2\^31"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens=2.5 must be a whole"),
        ({"max_new_tokens": None}, TypeError, "max_new_tokens=None is None: give a n"),
        (
            {"max_new_tokens": [3]},
            ValueError,
            r"max_new_tokens=\[3\] has 1 number",
        ),
        ({"temperature": "hot"}, TypeError, "temperature='hot' is of type str"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan must be 0"),
        ({"temperature": True}, TypeError, "temperature=True is of type bool"),
        ({"top_p": 1.5}, ValueError, "top_p=1.5 must be above 0 and at most 1"),
        ({"top_k": [1, 2, 3]}, ValueError, r"top_k=\[1, 2, 3\] has 3 numbers for 2 te"),
        ({"seed": [1, -2]}, ValueError, "seed=-2 must be between 0 and"),
        (
            {"seed": (1, 2, 3)},
            ValueError,
            r"seed=\(1, 2, 3\) has 3 numbers for 2 texts",
        ),
        ({"stop": ["a", None]}, TypeError, r"stop=\['a', None\] is of type list"),
        ({"stop": 5}, TypeError, "stop=5 is of type int: give a string"),
        ({"capacity": 0}, ValueError, "capacity=0 must be at least 1, or None"),
        ({"on_text": "print"}, TypeError, "on_text='print' .*give a function"),
        ({"ratio": []}, ValueError, r"ratio=\[\] is empty"),
        ({"ratio": "8"}, TypeError, "ratio='8' is text: give the number 8"),
        ({"ratio": True}, TypeError, "ratio=True is of type bool"),
        ({"ratio": {2: 4}}, TypeError, "ratio=.* is of type dict"),
        ({"ratio": [[2], [4]]}, ValueError, "is a list of lists: give one number per"),
        ({"ratio": 3}, ValueError, "ratio=3 does not divide window=8: use one of 1, 2"),
        ({"context": ["a", "b", "c"]}, ValueError, "context has 3 texts for 2 prompts"),
    ],
)
def test_options_that_cannot_be_meant_are_named_with_their_value(
    model, options, error, said
):
    with pytest.raises(error, match=said):
        model.complete(["first", "second"], **options)


def test_a_chat_checks_its_options_when_it_is_made(model):
    with pytest.raises(ValueError, match="top_p=2 must be"):
        Chat(model, chat_template="{{ messages }}", top_p=2)
    with pytest.raises(ValueError, match=r"seed=\[1, 2\] has 2 numbers for 1 texts"):
        Chat(model, chat_template="{{ messages }}", seed=[1, 2])


def test_compress_checks_its_own_arguments(model):
    with pytest.raises(ValueError, match="reserve=-1 must not be negative"):
        model.compress("a", reserve=-1)
    with pytest.raises(TypeError, match="on_note=5 .*give a function"):
        model.compress("a", on_note=5)


def test_an_untrained_ratio_warns_and_names_the_trained_ones(model):
    said = "ratio=8 was not trained: this model's beacons know 2, 4"
    for asked in (8, [8], lambda *_: 8):
        with pytest.warns(UserWarning, match=said) as found, pytest.raises(Fed):
            model.compress("x" * 20, ratio=asked)
        assert context.in_flags(found[0].message).startswith("--ratio=8 was not")
    with warnings.catch_warnings(), pytest.raises(Fed):
        warnings.simplefilter("error")
        model.compress("x" * 20, ratio=[2, 4, 0])


def test_a_list_of_ratios_of_another_length_says_what_becomes_of_it(model):
    with (
        pytest.warns(UserWarning, match="has 2 numbers.* 4 windows.* 4, goes on"),
        pytest.raises(Fed),
    ):
        model.compress("x" * 32, ratio=[2, 4])
    with (
        pytest.warns(UserWarning, match="has 3 numbers.* 1 windows.*last 2 are not"),
        pytest.raises(Fed),
    ):
        model.compress("x" * 8, ratio=[2, 4, 4])
    memory = random_memory([44], config=model.config, identity=model.identity)
    with warnings.catch_warnings(), pytest.raises(Fed):
        warnings.simplefilter("error")  # what went on before goes on
        model.compress("x" * 32, ratio=[2, 4], memory=memory)


def test_a_model_without_beacons_names_what_helps_in_the_callers_words(plain):
    for asked in (8, "auto-8", np.int32(8), [0, 8]):
        with pytest.raises(ArgumentError, match="needs beacons, but .* none") as error:
            plain.generate("x", ratio=asked)
    assert "use ratio=0" in str(error.value) and "BeaconConfig" in str(error.value)
    on_command_line = context.in_flags(error.value)
    assert (
        on_command_line.startswith("--ratio=0,8 needs")
        and "--ratio=full" in on_command_line
    )
    assert "BeaconConfig" not in on_command_line
    for asked in (0, "full", "auto", None, [0, 0]):
        with pytest.raises(Fed):
            plain.generate("x", ratio=asked)


def test_more_than_the_memory_of_the_device_is_refused_before_a_plan(
    model, monkeypatch
):
    slot = 2 * 2 * 8 * 4  # keys and values of 2 layers, 8 channels, float32
    monkeypatch.setattr(room, "_free_bytes", lambda model: 1000 * slot)
    with pytest.raises(
        ArgumentError, match=r"max_new_tokens=1000000000 needs .* at most 3,1\d\d fit"
    ) as error:
        model.generate("x", ratio=4, max_new_tokens=10**9)
    fit = int(str(error.value).split("at most ")[1].split()[0].replace(",", ""))
    with pytest.raises(Fed):
        model.generate("x", ratio=4, max_new_tokens=fit)
    for asked in (None, "full", "auto", lambda *_: 8):
        with pytest.raises(ArgumentError, match="max_new_tokens=1000000000 needs"):
            model.generate("x", ratio=asked, max_new_tokens=10**9)
    with pytest.raises(ArgumentError, match="capacity=2000 needs .*at most 800 slots"):
        model.generate("x", capacity=2000)
    with pytest.raises(ArgumentError, match="ratio='full' needs.*memory_dtype='int8'"):
        model.compress("x" * 1200, ratio="full")
    # Only the exact plan knows this one: every window but the last is kept.
    mostly = [0] * 140 + [4]
    with pytest.raises(ArgumentError, match="capacity=1,?280 needs"):
        model.compress("x" * 1128, ratio=mostly)


def test_the_room_is_that_of_one_device_of_a_mesh(model):
    alone = room.free_slots(model, 2, "float32")
    assert alone and alone > 10**5  # this machine has some GiB
    from beacon_jax.model.partition import make_partition

    split = dataclasses.replace(model, partition=make_partition("data:2"))
    two = room.free_slots(split, 2, "float32")
    # Two CPU devices share one memory, and each has one of the rows.
    assert two == pytest.approx(alone, rel=0.2)


def test_a_text_that_names_a_file_hints_at_what_is_in_it(model, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("The key is 52817.")
    with (
        pytest.warns(UserWarning, match=r"taken as text.*read_text\(") as found,
        pytest.raises(Fed),
    ):
        model.compress(str(path), ratio=4)
    assert found[0].filename == __file__  # the caller's line, not one of the package


def test_warnings_are_not_repeated_for_a_line_that_runs_again(model):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            with pytest.raises(Fed):
                model.compress("x" * 20, ratio=8)
    assert len(found) == 1
