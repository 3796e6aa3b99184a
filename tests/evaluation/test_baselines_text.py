"""Compressors of text, methods of one's own, and how --methods spells them."""

import numpy as np
import pytest

from beacon_jax.evaluation import Method, reading
from beacon_jax.evaluation.baselines import TextCompressor, make_methods
from beacon_jax.evaluation.methods import remember

PLUGIN = """
from beacon_jax.evaluation import Method, reading
from beacon_jax.evaluation.baselines import select

calls = []


def last_words(text, budget):
    calls.append((text, budget))
    return " ".join(text.split()[-3:])


def everything(text, budget):
    return text


def number(text, budget):
    return 3


class Nothing(Method):
    family = "nothing"

    def remember(self, model, past, following):
        return reading.empty(model, len(past), 0)


class Last(Method):
    family, per_ratio = "last", True

    def remember(self, model, past, following):
        last = [row[len(row) - len(row) // self.number :] for row in past]
        return select.read(model, last)


NOT_ONE = 1
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "shorten_for_test.py").write_text(PLUGIN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "shorten_for_test"


@pytest.fixture
def rows(model, inputs):
    """(past, following) of 3 rows: two windows, one with bos in front, and nothing."""
    stream = inputs.stream
    past = stream[stream != 0][:64].astype(np.int32)
    with_bos = past[:32].copy()
    with_bos[0] = model.config.bos_ids[0]
    return [past, with_bos, past[:0]], [past[:5]] * 3


def test_a_text_compressor_gets_the_text_and_its_budget(model, rows, plugin):
    past, following = rows
    (method,) = make_methods([f"text:{plugin}.last_words"], [2])
    assert (method.name, method.ratio) == ("text_last_words_x2", 2)
    memory, kept = remember(model, method, past, following)
    calls = method.compress.__globals__["calls"]
    text = model.tokenizer.decode
    assert calls == [(text(past[0]), 32), (text(past[1][1:]), 15)]
    short = [" ".join(t.split()[-3:]) for t, _ in calls]
    want = [model.tokenizer.encode(t, add_special_tokens=False) for t in short]
    sizes = [len(want[0]), 1 + len(want[1]), 0]
    assert memory.slots.tolist() == sizes
    assert kept == [n * memory.slot_nbytes for n in sizes]
    plain = reading.read(model, [np.asarray(want[0])] * 3, 0)[1]
    kept, read = (m.state.k[:, 0, : sizes[0]] for m in (memory, plain))
    assert np.array_equal(kept, read)


def test_text_is_cut_at_the_budget(model, rows, plugin):
    past, following = rows
    for ratio in (2, 8):
        (method,) = make_methods([f"text:{plugin}.everything"], [ratio])
        memory, _ = remember(model, method, past, following)
        assert memory.slots.tolist() == [64 // ratio, 32 // ratio, 0]
        kept = method.shorten(model, past[1], 32 // ratio)
        assert kept.tolist() == past[1][: 32 // ratio].tolist()


def test_what_is_no_text_is_refused(model, rows, plugin):
    (method,) = make_methods([f"text:{plugin}.number"], [2])
    with pytest.raises(TypeError, match="text_number returned int"):
        remember(model, method, *rows)


def test_a_compressor_can_be_given_without_a_command_line(model, rows):
    method = TextCompressor(lambda text, budget: "", "empty", 4)
    assert method.name == "empty_x4"
    memory, kept = remember(model, method, *rows)
    assert kept == [0, memory.slot_nbytes, 0]  # the bos token


def test_a_class_of_ones_own_is_a_method(model, rows, plugin):
    made = make_methods([f"{plugin}:Nothing", f"{plugin}:Last", "full"], [2, 4])
    assert [m.name for m in made] == ["nothing", "last_x2", "last_x4", "full"]
    assert all(isinstance(m, Method) for m in made)
    memory, kept = remember(model, made[1], *rows)
    assert kept == [n * memory.slot_nbytes for n in (32, 16, 0)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "snap",
            "names 'snap': did you mean snapkv. Known are .*, NAME_recent, "
            "retention:FOLDER, text:",
        ),
        ("no_such_module:Class", "cannot be imported .*module:Class"),
        ("shorten_for_test:Missing", "cannot be imported .*Missing"),
        ("shorten_for_test:NOT_ONE", "no subclass of beacon_jax.evaluation.Method"),
        ("text:shorten_for_test.missing", "cannot be imported"),
        ("text:alone", "cannot be imported .*text:module.function"),
        ("text:shorten_for_test.NOT_ONE", "no function"),
    ],
)
def test_a_method_that_is_not_there_is_named(name, message, plugin):
    with pytest.raises(ValueError, match=message):
        make_methods(["full", name], [2])


def test_a_method_with_a_ratio_needs_ratios_and_names_are_unique():
    with pytest.raises(ValueError, match="--methods=snapkv needs --ratios"):
        make_methods(["full", "snapkv"], [])
    with pytest.raises(ValueError, match="several called full"):
        make_methods(["full", "full"], [])
