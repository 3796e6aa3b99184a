"""What a user gives by mistake is told by name, value and remedy. Compiles nothing."""

import os
import re
import warnings

import numpy as np
import pytest

import beacon_jax
from beacon_jax.cli import context
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.packs import read_manifest
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.partition import make_partition
from tests.inference.memories import Fed, random_memory

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


pytestmark = pytest.mark.usefixtures("nothing_is_fed")


@pytest.fixture(scope="module")
def memory(model):
    return random_memory([44], config=model.config, identity=model.identity)


def refused(call, said, *given, **options):
    """The call ends with one of our errors that says this."""
    kinds = (TypeError, ValueError, IndexError, OSError)
    with warnings.catch_warnings(), pytest.raises(kinds, match=said):
        warnings.simplefilter("error")
        call(*given, **options)


# --- models ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, said",
    [
        ({"path": None}, "path=None is None: give a folder"),
        ({"path": 3}, "path=3 is of type int"),
        ({"path": b"x"}, "path=b'x' is of type bytes"),
        ({"path": ""}, "path='' is empty: give a folder"),
        ({"path": "tiny-beacn"}, r"path=tiny-beacn: .*Did you mean tiny-beacon\?"),
        ({"path": "a" * 300}, "path=aaa.*no such folder"),
        ({"path": "~/a-model"}, r"Did you mean /.*/a-model\?"),
        ({"path": "assets/tiny-becon"}, r"Did you mean tiny-beacon\?"),
        ({"path": "a\0b"}, r"path='a\\x00b': there is no such folder"),
        ({"dtype": "float8"}, "dtype='float8' is unknown: did you mean float32"),
        ({"dtype": 3}, "dtype=3 is of type int: give 'float32'"),
        ({"dtype": np.float32}, "dtype=<class 'numpy.float32'> is of type type"),
        ({"beacon": 8}, r"beacon=8 is of type int: give BeaconConfig\("),
        ({"ignore_sliding_window": "yes"}, "ignore_sliding_window='yes' .* give True"),
        ({"mesh": 3}, "mesh=3 is of type int: give the axes as text, 'tensor:8'"),
        ({"mesh": "tensor"}, "mesh='tensor' has no size for 'tensor': give one"),
        ({"mesh": "tensr:2"}, r"an axis 'tensr', .*did you mean tensor\?"),
        ({"mesh": "tensor:0"}, "has '0' as the size of 'tensor': give a number"),
        ({"mesh": "tensor:1,tensor:1"}, "names 'tensor' twice"),
        ({"mesh": "tensor:64"}, "needs 64 devices, there are"),
        ({"device": "cpu"}, r"load\(device='cpu'\): jax chooses the device"),
        ({"max_len": 3}, r"load\(max_len=3\): it has no such one. The arg.* path, dt"),
        ({"dtyp": 3}, r"load\(dtyp=3\): did you mean dtype\?"),
    ],
)
def test_a_model_that_cannot_be_loaded_so(given, said):
    refused(beacon_jax.load, said, **{"path": "tiny-beacon", **given})


def test_what_is_no_model_is_told_how_to_get_one(model):
    refused(
        beacon_jax.generate, r"model='hi' .*first argument.*load\('hi'\)", "hi", "x"
    )
    refused(beacon_jax.generate, "model='hi' is of type str", "hi")
    refused(beacon_jax.complete, "complete: the first argument is the model")
    refused(beacon_jax.compress, "model=None is None: it is the first", None, "x")
    refused(Chat, "model=None is None", None)
    refused(Chat, "Chat: missing a required argument: 'model'")
    refused(Chat, r"as in Chat\(load\('tiny-beacon'\), ", "tiny-beacon")
    refused(beacon_jax.load, "a model already", model)
    refused(model.generate, "generate: missing a required argument: 'prompt'")
    refused(model.generate, r"\(context, .* only by name\)", "a", "b")
    refused(model.generate, r"\(text='a'\): did you mean prompt\?", text="a")


# --- options ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"ratio": float("nan")}, "ratio=nan is no whole number: use one of 1, 2, 4"),
        ({"ratio": float("inf")}, "ratio=inf is no whole number"),
        ({"ratio": 2.5}, "ratio=2.5 is no whole number"),
        ({"ratio": np.array([4.0])}, "ratio=4.0 is no whole number: write it as 4"),
        ({"ratio": 10**30}, "ratio=10+ does not divide window=8"),
        ({"ratio": "²"}, "ratio='²' must be a number, a list"),
        ({"ratio": "auto-" + "1" * 5000}, r"ratio='auto-1+\.\.\. must be"),
        ({"ratio": "auto-3"}, "ratio=3 does not divide"),
        ({"ratio": int}, "ratio=<class 'int'> is of type type"),
        ({"ratio": lambda: 8}, r"ratio=.*cannot be called.*number of the window"),
        ({"ratio": lambda *_: "x"}, r"ratio\(window 0\) returned 'x', of type str: r"),
        ({"ratio": lambda *_: True}, r"returned True, of type bool"),
        ({"ratio": lambda *_: 3}, "ratio=3 does not divide"),
        ({"max_slots": "x"}, "max_slots='x' is of type str: give a number of slots"),
        ({"max_slots": True}, "max_slots=True is of type bool"),
        ({"max_slots": float("nan")}, "max_slots=nan is of type float"),
        ({"max_slots": -1}, "max_slots=-1 must be at least 1"),
        ({"max_slots": 9, "ratio": 4}, "ratio=4 together with max_slots"),
        ({"max_bytes": "12 potatoes"}, "max_bytes='12 potatoes' must be a number of b"),
        ({"max_bytes": 0}, "max_bytes=0 must be at least one byte"),
        ({"max_bytes": float("nan")}, "max_bytes=nan must be a number of bytes"),
        ({"max_bytes": "9" * 400 + "GB"}, r"max_bytes='9+\.\.\. must be"),
        ({"max_bytes": [1]}, r"max_bytes=\[1\] is of type list"),
        ({"spans": 5}, r"spans=5 must be token ranges .* give \[\(10, 20\)\]"),
        ({"spans": [(0, 3), (1,)]}, r"spans=\[\(0, 3\), \(1,\)\] must be token ranges"),
        ({"spans": re.compile(b"x")}, "spans=b'x' is an expression for bytes"),
        ({"spans": "(a"}, "spans=.* is not a regular expression"),
        ({"spans": "(a{99999999999})"}, "repeats something 99,999,999,999 times"),
        ({"lossless": "slotz"}, r"lossless='slotz' .*did you mean slots\?"),
        ({"memory_dtype": np.int8}, "memory_dtype=<class .* give 'int8', or None"),
        ({"capacity": [3]}, r"capacity=\[3\] is of type list: give one whole number"),
        ({"capacity": 10**30}, r"capacity=10+ must be .* below 2\^31"),
        ({"on_progress": lambda x: 0}, r"on_progress=.*\(tokens fed, of how many\)"),
    ],
)
def test_options_of_reading(model, options, said):
    refused(model.compress, said, "The key is 52817.", **options)
    refused(model.generate, said, "?", context="The key is 52817.", **options)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"instruct": "yes"}, "instruct='yes' is of type str: give True or False"),
        ({"instruct": 1}, "instruct=1 is of type int: give True or False"),
        ({"temperature": 10**400}, r"temperature=10+\.\.\. must be 0"),
        ({"top_k": 10**30}, r"top_k=10+ must be 0 \(all tokens\) or more, below"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\] has an empty string"),
        ({"on_text": lambda row, text: 0}, r"on_text=.*missing.*\(piece of text\)"),
        ({"on_tokens": lambda: 0}, r"on_tokens=.*\(number of new tokens\)"),
    ],
)
def test_options_of_generation(model, options, said):
    refused(model.complete, said, "a", **options)


def test_a_function_for_many_texts_also_takes_the_row(model):
    said = r"on_text=.*\(number of the row, piece of text\)"
    refused(model.complete, said, ["a", "b"], on_text=lambda text: 0)
    with pytest.raises(Fed):
        model.complete(["a", "b"], on_text=lambda row, text: 0)


def test_arrays_and_ranges_of_ratios_are_lists(model):
    for ratio in (np.array([2, 4]), np.array(4), range(2, 3), np.int32(2)):
        with pytest.raises(Fed):
            model.compress("x" * 14, ratio=ratio)


def test_an_expression_that_matches_nothing_warns(model):
    for spans in ("missing", re.compile("missing"), "x*"):
        with (
            pytest.warns(UserWarning, match="spans='.* matches nothing") as found,
            pytest.raises(Fed),
        ):
            model.compress(["the key", "the door"], spans=spans)
        assert context.in_flags(found[0].message).startswith("--spans=")
    with warnings.catch_warnings(), pytest.raises(Fed):
        warnings.simplefilter("error")  # in one of two texts
        model.compress(["the key", "the door"], spans="key")


# --- texts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, said",
    [
        ("ab\ud800", r"T='ab\\ud800' has '\\ud800' at character 2, .*: leave it out"),
        (["a", "\udfff"], r"T\[1\]='\\udfff' has '\\udfff' at character 0"),
        ("", "T='' is empty, it has no tokens: give at least one"),
        ([[1, 2], []], r"T\[1\]=\[\] is empty"),
        (np.zeros((2, 3), int), r"T has shape \[2, 3\], it is no row of tokens"),
        ([[[1], [2, 3]]], r"T\[0\]=\[\[1\], \[2, 3\]\] is a list of lists of diff"),
        ([2**63], "T has token ids from 9223372036854775808 to .* the model has 0 to"),
        ([10**30], "T has token ids from 10+ to 10+, the model has 0 to 256"),
        ([["a"]], r"T\[0\]=\['a'\] is of type list: token ids are whole numbers"),
    ],
)
def test_texts_that_cannot_be_read(model, given, said):
    refused(model.generate, said.replace("T", "prompt", 1), given)
    refused(model.compress, said.replace("T", "context", 1), given)


def test_a_text_with_half_a_character_has_no_ids(model):
    refused(
        model.encode,
        "prompt=.*half of a surrogate pair",
        "a\ud800",
        "prompt",
        first=True,
    )


def test_a_surrogate_is_named_by_its_flag():
    from beacon_jax.inference.validate import texts

    with pytest.raises(ValueError) as error:
        texts("prompt", "a" * 500 + "\ud800")
    said = context.in_flags(error.value)
    assert said.startswith("--prompt=aaa") and "at character 500" in said
    assert len(said) < 250 and "encode(" not in said


# --- conversations ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        ({"system": 3}, "system=3 is of type int: give a text"),
        ({"chat_template": 5}, "chat_template=5 is of type int"),
        (
            {"chat_template": "{% for"},
            r"chat_template='{% for' is no jinja template: .*\. Mend it, or leave",
        ),
        ({"chat_template": "{{ 1 + 'a' }}"}, "chat_template=.* cannot write.* Mend"),
        ({"chat_template": "{{ no.such }}"}, "chat_template=.* cannot write.* Mend"),
        (
            {"chat_template": "{{ raise_exception('no system') }}", "system": "a"},
            "chat_template=.* refuses this: no system",
        ),
        ({"on_text": print}, r"Chat\(on_text=.*: give it to each message, say\("),
        ({"instruct": True}, r"Chat\(instruct=True\): .* leave it out"),
        ({"spans": "x"}, r"Chat\(spans='x'\): .* give memory=compress\("),
        ({"sistem": "x"}, r"Chat\(sistem='x'\): did you mean system\?"),
        ({"memory_dtype": "int4"}, "memory_dtype='int4' is not possible"),
    ],
)
def test_a_chat_is_checked_when_it_is_made(model, options, said):
    refused(Chat, said, model, **{"chat_template": TEMPLATE, **options})


def test_a_message_is_a_text_and_options_are_the_chats(model):
    chat = Chat(model, chat_template=TEMPLATE)
    for given, said in (
        (None, "text=None is None"),
        (3, "text=3 is of type int"),
        ([], r"text=\[\] is of type list"),
        ("", "text='' is empty"),
        ("a\ud800", r"text='a\\ud800' has .* at character 1"),
    ):
        refused(chat.say, said, given)
    said = r"say\(max_tokens=5\): options belong .* give max_new_tokens to Chat\(model"
    refused(chat.say, said, max_tokens=5)
    refused(chat.say, "give temperature to Chat", "hi", temperature=1)
    refused(chat.say, r"on_text=.*\(piece of text\)", "hi", on_text=lambda: 0)
    assert chat.messages == []


# --- memories --------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [None, "a", 1.5, [1, 2], True])
def test_memories_are_cut_at_a_whole_number(memory, tokens):
    refused(memory.truncate, "tokens=.* is .*: give one whole number", tokens)


@pytest.mark.parametrize(
    "given, said",
    [
        (5, r"memory\[5\]: the memory has 1 row, number 0"),
        (-2, r"memory\[-2\]: the memory has 1 row"),
        (10**30, r"memory\[10+\]: the memory has 1 row"),
        ([0, 7], r"memory\[\[0, 7\]\]: the memory has 1 row"),
        ([], r"memory\[\[\]\] takes no row"),
        (slice(0, 0), r"memory\[slice\(0, 0, None\)\] takes no row"),
        ("a", r"memory\['a'\] is of type str: give the number of a row"),
        (None, r"memory\[None\] is None"),
        (True, r"memory\[True\] is of type bool"),
        (1.5, r"memory\[1.5\] is of type float"),
        ([[0]], r"memory\[\[\[0\]\]\] is of type list"),
        (slice("a", None), "is of type slice"),
    ],
)
def test_rows_of_a_memory(memory, given, said):
    refused(memory.__getitem__, said, given)


def test_rows_are_taken_by_every_kind_of_number():
    two = random_memory([13, 7])
    lengths = lambda given: two[given].lengths.tolist()
    assert lengths(-1) == lengths(np.int64(1)) == lengths([1]) == [7]
    assert lengths([True, False]) == lengths(slice(1)) == [13]
    assert lengths((1, 0)) == lengths(slice(None, None, -1)) == [7, 13]
    assert [one.lengths.tolist() for one in two] == [[13], [7]]


def test_copies_and_accounts(memory):
    refused(memory.repeat, "count=0 must be at least 1", 0)
    refused(memory.repeat, "count='a' is of type str: give the number of copies", "a")
    refused(memory.repeat, r"count=10+ needs .* GiB are free: at most", 10**12)
    refused(memory.account, "row=9: the memory has 1 row", row=9)
    refused(memory.account, "row='a' is of type str", "a")
    assert memory.account(-1).tokens == 44


@pytest.mark.parametrize(
    "given, said",
    [
        (None, "memories=None is None: give a list of memories"),
        ("a", "memories='a' is of type str"),
        ([], r"memories=\[\] is empty"),
        ([None], r"memories\[0\]=None is None: give what model.compress returned"),
        (["a"], r"memories\[0\]='a' is of type str: load it, Memory.load"),
    ],
)
def test_memories_are_joined_from_a_list(given, said):
    refused(Memory.concatenate, said, given)


def test_a_memory_is_no_list_of_memories(memory):
    refused(Memory.concatenate, r"a list of memories, \[first, second\]", memory)
    refused(Memory.concatenate, "too many positional arguments", memory, memory)
    refused(Memory.concatenate, r"memories\[1\]=3 is of type int", [memory, 3])


@pytest.mark.parametrize(
    "path, said",
    [
        (3, "path=3 is of type int: give the name of a file"),
        (None, "path=None is None"),
        ("", "path='' is empty and names no file"),
        ("~/a.beacon", "path=~/a.beacon: only a shell knows ~.*: write /"),
        ("a\0b", r"path='a\\x00b' has a NUL character at 1"),
        (
            "a" * 300,
            "path=a+... is too long: a name has at most 255 bytes, this one 300",
        ),
        ("\ud800", r"path='\\ud800' has characters that are no text"),
    ],
)
def test_names_that_no_file_has(memory, path, said):
    refused(memory.save, said, path)
    refused(Memory.load, said, path)
    refused(read_manifest, said, path)


def test_names_that_are_long_but_no_longer_than_a_file_may_have(memory, tmp_path):
    path = tmp_path / ("é" * 120 + "x" * 15)
    memory.save(path)
    assert Memory.load(path).lengths.tolist() == [44]


def test_packs_are_saved_and_loaded_by_the_right_arguments(model, memory, tmp_path):
    path = tmp_path / "a.beacon"
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    refused(memory.save, "path=Model.* is of type Model", model)
    refused(memory.save, "file is a file, not a folder", tmp_path / "file" / "x")
    refused(memory.save, "tokens='no' is of type str: give True", path, tokens="no")
    refused(memory.save, "overwrite=1 is of type int", path, overwrite=1)
    refused(memory.save, r"\(overwite=True\): did you mean", path, overwite=True)
    refused(Memory.load, r"Memory.load\(path, model\)", model, path)
    refused(Memory.load, r"model='tiny-beacon' .* load\('t", path, "tiny-beacon")
    refused(Memory.load, "it is a memory already", memory)
    refused(Memory.load, "allow_other_model='x'", path, allow_other_model="x")
    refused(Memory.load, "mesh=3 is of type int", path, mesh=3)
    refused(Memory.load, "pipe is a device or pipe", tmp_path / "pipe")
    assert not path.exists()


# --- settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, said",
    [
        (
            {"window": 33},
            r"window=33 and ratios=\(2, 4, 8\) .*use window=32 or 40, or ratios of 1",
        ),
        ({"window": 10**30}, "window=10+ must be at most 1048576"),
        ({"window": "x"}, "window='x' must be a positive integer"),
        ({"ratios": 8}, r"ratios=8 must be a list, as in \(2, 4, 8\)"),
        ({"ratios": "248"}, "ratios='248' must be a list"),
        ({"ratios": (2.5,)}, r"ratios=\(2.5,\) has 2.5: give whole numbers"),
        ({"ratios": (True,)}, "has True"),
        ({"ratio_mix": 3}, "ratio_mix=3 is unknown"),
        ({"param": 3}, "param=3 must be a list"),
        ({"sink": "x"}, "sink='x' must be between"),
        ({"windw": 8}, r"BeaconConfig\(windw=8\): did you mean window\?"),
    ],
)
def test_beacon_settings(given, said):
    refused(BeaconConfig, said, **given)


def test_beacon_settings_take_numbers_of_numpy():
    assert BeaconConfig(ratios=[np.int64(2)]).ratios == (2,)
    refused(make_partition, "mesh=None is None", None)
