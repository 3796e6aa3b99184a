"""Prefill, decoding and the model handle, on a tiny random model."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beacon_jax
from beacon_jax.core.feed import Pieces, feed, feed_jit
from beacon_jax.core.memory import CapacityError, init_memory
from beacon_jax.inference.decode import BLOCK, Decoding, decode, decode_block
from beacon_jax.inference.plan import plan_ratios
from beacon_jax.inference.sampling import make_sampling
from beacon_jax.model.net import Net

CONTEXT = "In 1998 the harbour master counted 41 boats; the key is 52817. He wept."
# One buffer and, with at most 128 tokens, one plan length: the tests share compiles.
ROOM = {"capacity": 160}
GREEDY = make_sampling()


def used(memory, row=0):
    """What a row can see: keys and values of its slots and its open window."""
    memory = getattr(memory, "state", memory)
    count = int(memory.slots[row] + memory.open_entries("interleave")[row])
    return np.asarray(memory.k[:, row, :count]), np.asarray(memory.v[:, row, :count])


def test_greedy_equals_feeding_the_argmax_step_by_step(model):
    new, ratios = 21, plan_ratios(model.config, 2, length=80)
    tokens = model.encode(CONTEXT, "context", first=True)[:43]
    memory = init_memory(model.config, 1, 160)
    one = jnp.ones(1, jnp.int32)
    for token in tokens:
        out, memory = feed(
            model.net,
            model.variables,
            memory,
            jnp.full((1, 1), token),
            one,
            ratios,
        )
    expected = []
    for _ in range(new):  # crosses the ends of two windows of 8
        expected.append(int(jnp.argmax(out.last_logits[0])))
        token = jnp.full((1, 1), expected[-1])
        out, memory = feed(model.net, model.variables, memory, token, one, ratios)
    assert 256 not in expected
    result = model.complete(tokens, ratio=2, max_new_tokens=new, **ROOM)
    assert result.tokens.tolist() == expected
    assert int(result.memory.slots[0]) == int(memory.slots[0]) == (43 + new) // 8 * 4
    for ours, theirs in zip(used(result.memory), used(memory), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("ratio", [0, 2, [4, 0, 2]])
def test_a_context_compressed_first_gives_the_text_of_one_call(model, ratio):
    options = {"ratio": ratio, "max_new_tokens": 12, **ROOM}
    memory = model.compress(CONTEXT, ratio=ratio, **ROOM)
    before = jax.tree.map(np.array, memory.state)
    first = model.complete("The key is ", memory=memory, **options)
    whole = model.complete("The key is ", context=CONTEXT, **options)
    assert first.tokens.tolist() == whole.tokens.tolist()
    assert first.text == model.tokenizer.decode(first.tokens)
    # The memory passed in is a value: still valid, and bit for bit the same.
    jax.tree.map(np.testing.assert_array_equal, before, memory.state)


def test_a_memory_goes_on_with_its_own_ratio_unless_told_otherwise(model):
    memory = model.compress(CONTEXT[:64], ratio=4, **ROOM)
    assert int(memory.slots[0]) == 64 // 4
    assert int(model.compress("x" * 8, memory=memory).slots[0]) == 64 // 4 + 2
    assert int(model.compress("x" * 8, 2, memory=memory).slots[0]) == 64 // 4 + 4
    assert int(model.compress("x" * 8, "full", memory=memory).slots[0]) == 64 // 4 + 8


@pytest.mark.slow
def test_continuing_the_returned_memory_equals_one_long_generation(model):
    whole = model.complete(CONTEXT, ratio=4, max_new_tokens=BLOCK + 9, **ROOM)
    # The second call starts from the logits of the prompt's last token, so the last
    # token of the first call is given as the prompt of the second.
    first = model.complete(CONTEXT, ratio=4, max_new_tokens=10, **ROOM)
    assert first.tokens.tolist() == whole.tokens[:10].tolist()
    assert int(first.memory.lengths[0]) == len(CONTEXT) + 10
    second = model.complete(whole.tokens[10:11], memory=first.memory, **ROOM)
    rest = whole.tokens[11:]
    assert second.tokens[: len(rest)].tolist() == rest.tolist()


@pytest.mark.slow
def test_rows_of_different_length_give_what_each_gives_alone(model):
    config, variables = model.config, model.variables
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 256, (2, 50))
    ratios = plan_ratios(config, 2, length=80)
    settings: dict[str, Any] = {
        "max_new_tokens": 9,
        "sampling": GREEDY,
        "eos_ids": (),
    }

    def run(rows, lengths):
        memory = init_memory(config, len(rows), 160)
        given = (memory, rows, np.array(lengths), ratios)
        out, memory = feed(Net(config), variables, *given)
        logits = out.last_logits
        return decode(
            Net(config), variables, memory, logits, ratios, Decoding(**settings)
        )

    both = run(tokens, [50, 13])
    for row, length in enumerate([50, 13]):
        alone = run(tokens[row : row + 1, :length], [length])
        assert both.tokens[row].tolist() == alone.tokens[0].tolist()
        np.testing.assert_allclose(both.logits[row], alone.logits[0], atol=1e-4)


def test_lengths_of_a_doubling_share_one_compile_and_pieces_change_nothing(model):
    config, variables = model.config, model.variables
    rng = np.random.default_rng(2)
    ratios = plan_ratios(config, 4, length=128)
    before = feed_jit._cache_size()
    for length in (65, 99, 100, 128):
        tokens = rng.integers(0, 256, (1, length))
        memory = init_memory(config, 1, 80)
        out, memory = feed(Net(config), variables, memory, tokens, None, ratios)
        assert feed_jit._cache_size() == before + 1
    done = []
    empty = init_memory(config, 1, 80)
    given = (Net(config), variables, empty, tokens, None, ratios)
    again, pieces = feed(*given, pieces=Pieces(24, done.append))
    assert done == [24, 48, 72, 96, 120, 128]
    assert feed_jit._cache_size() == before + 2
    np.testing.assert_allclose(out.last_logits, again.last_logits, atol=1e-4)
    every, _ = feed(*given, outputs="logits")
    parts, _ = feed(*given, outputs="logits", pieces=Pieces(24, done.append))
    assert every.logits.shape == parts.logits.shape == (1, 128, 257)
    np.testing.assert_allclose(every.logits, parts.logits, atol=1e-4)
    for ours, theirs in zip(used(memory), used(pieces), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="piece=12 must be a multiple of the window"):
        feed(*given, pieces=Pieces(12, done.append))


def test_an_end_token_stops_its_row_and_is_neither_returned_nor_fed(model):
    free = model.complete(CONTEXT, ratio=2, max_new_tokens=BLOCK + 4, **ROOM)
    end = int(free.tokens[3])
    stop = free.tokens.tolist().index(end)
    changed = dataclasses.replace(
        model, config=dataclasses.replace(model.config, eos_ids=(end,))
    )
    result = changed.complete(CONTEXT, ratio=2, max_new_tokens=BLOCK + 4, **ROOM)
    assert result.tokens.tolist() == free.tokens[:stop].tolist()
    assert int(result.memory.lengths[0]) == len(CONTEXT) + stop


def test_one_compile_of_the_decoding_loop_serves_every_number_and_setting(model):
    memory = model.compress(CONTEXT, ratio=2, **ROOM)
    options = {"memory": memory, "ratio": 2, **ROOM}
    model.complete("a", max_new_tokens=3, **options)
    before = decode_block._cache_size()
    model.complete("bc", max_new_tokens=2 * BLOCK, **options)
    model.complete("d", max_new_tokens=5, temperature=0.7, top_k=3, **options)
    assert decode_block._cache_size() == before


def test_a_seed_repeats_sampled_text_and_top_k_1_is_greedy(model):
    def draw(**options):
        result = model.complete(CONTEXT, ratio=2, max_new_tokens=20, **ROOM, **options)
        return result.tokens.tolist()

    drawn = draw(temperature=1.5, seed=3)
    assert drawn == draw(temperature=1.5, seed=3)
    assert drawn != draw(temperature=1.5, seed=4)
    assert draw(temperature=1.5, top_k=1, seed=3) == draw()
    assert draw(temperature=1.5, top_p=1e-6, seed=3) == draw()


def test_streamed_pieces_join_to_the_text(model):
    pieces = []
    result = model.complete(
        CONTEXT,
        ratio=4,
        max_new_tokens=3 * BLOCK,
        temperature=1.0,
        on_text=pieces.append,
        **ROOM,
    )
    assert "".join(pieces) == result.text and len(pieces) > 1


def test_the_public_functions_are_the_methods(model):
    memory = beacon_jax.compress(model, CONTEXT, ratio=2, **ROOM)
    assert isinstance(memory, beacon_jax.Memory)
    text = beacon_jax.generate(model, "x", memory=memory, max_new_tokens=4)
    assert text == model.generate("x", memory=memory, max_new_tokens=4)
    assert all(getattr(beacon_jax, name) for name in beacon_jax.__all__)
    assert len(beacon_jax.__all__) <= 12
    with pytest.raises(AttributeError, match="beacon_jax has no 'lod'"):
        _ = beacon_jax.lod


def test_a_plain_model_attends_to_everything(plain):
    tokens = plain.encode(CONTEXT, "context", first=True)
    result = plain.complete(tokens, max_new_tokens=5)
    assert int(result.memory.lengths[0]) == len(tokens) + 5
    assert result.tokens.tolist() == (
        plain.complete(tokens, ratio="full", max_new_tokens=5).tokens.tolist()
    )


def test_beyond_the_trained_positions_it_warns_once_with_the_ratio_that_fits(model):
    config = dataclasses.replace(model.config, max_position=40)
    small = dataclasses.replace(model, config=config)
    with pytest.warns(UserWarning, match=r"trained for 40.*ratio=4 would fit"):
        small.compress("x" * 100, ratio=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.compress("x" * 100, ratio=2)


@pytest.mark.parametrize("prompt", ["", []])
def test_a_prompt_of_0_tokens_is_refused(model, prompt):
    with pytest.raises(ValueError, match="prompt=.* is empty, it has no tokens"):
        model.generate(prompt)
    with pytest.raises(ValueError, match="context=.* is empty"):
        model.compress(prompt)
    with pytest.raises(ValueError, match="context=.* is empty"):
        model.generate("x", context=prompt)


def test_a_row_of_0_tokens_stays_as_it_is(model):
    memory = init_memory(model.config, 2, 64)
    tokens, lengths = np.zeros((2, 3), int), np.array([3, 0])
    given = (memory, tokens, lengths, np.array([2]))
    _, memory = feed(model.net, model.variables, *given)
    assert memory.raw.tolist() == [3, 0]
    assert not np.asarray(memory.k[:, 1]).any()
    assert np.asarray(memory.k[:, 0]).any()


@pytest.mark.parametrize("ratio", [3, [2, 3], -1])
def test_a_ratio_that_does_not_divide_the_window_names_those_that_do(model, ratio):
    with pytest.raises(
        ValueError, match="does not divide window=8: use one of 1, 2, 4"
    ):
        model.compress(CONTEXT, ratio=ratio)


def test_other_bad_arguments_are_named(model, plain):
    with pytest.raises(ValueError, match="ratio='most' must be"):
        model.compress("x", ratio="most")
    with pytest.raises(ValueError, match=r"ratio=\[\] is empty"):
        model.compress("x", ratio=[])
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        model.generate("x", max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate("x", temperature=-1)
    with pytest.raises(ValueError, match="token ids from 5 to 300.* 0 to 256"):
        model.generate([5, 300])
    with pytest.raises(ValueError, match="ratio=2 needs beacons.*none: use ratio=0"):
        plain.compress("x", ratio=2)


def test_a_plain_model_gets_untrained_beacons_when_asked_to(make_folder):
    settings = beacon_jax.BeaconConfig(window=8, ratios=(2,))
    with pytest.warns(UserWarning, match="beacons of .* are untrained.*with ratio=0"):
        model = beacon_jax.load(make_folder(beacons=False), beacon=settings)
    assert int(model.compress("x" * 16, ratio=2).slots[0]) == 8


def test_a_capacity_that_is_too_small_states_the_one_needed(model):
    with pytest.raises(CapacityError, match="capacity=16 .*needs") as error:
        model.compress(CONTEXT, ratio=2, capacity=16)
    enough = error.value.needed
    assert model.compress(CONTEXT, ratio=2, capacity=enough).capacity == enough
    memory = model.compress(CONTEXT, ratio=2, capacity=enough)
    with pytest.raises(CapacityError):
        model.complete("x", memory=memory, max_new_tokens=90, capacity=enough)


def test_a_folder_without_model_or_tokenizer_says_so(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        beacon_jax.load(tmp_path)
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ValueError, match="prompt is text.*no tokenizer"):
        bare.complete("x")
    with pytest.raises(ValueError, match="tokenizer=None"):
        bare.generate([1, 2])
    assert len(bare.complete([1, 2], max_new_tokens=3).tokens) <= 3


def test_a_memory_that_needs_a_larger_buffer_is_still_there_afterwards(model):
    memory = model.compress(CONTEXT, ratio=2, capacity=48)
    larger = model.compress("x" * 100, memory=memory)
    assert larger.capacity > memory.capacity == 48
    again = model.compress("x" * 100, memory=memory)
    assert again.slots.tolist() == larger.slots.tolist()
