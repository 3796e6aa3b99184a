"""The decoding loop: rows of a batch, boundaries of windows, ends of rows."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core import feed as feed_module
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import CapacityError, MemoryState, init_memory
from beacon_jax.inference import decode as decode_module
from beacon_jax.inference.decode import BLOCK, Decoded, Decoding, decode, decode_block
from beacon_jax.inference.sampling import make_sampling, seen_tokens
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from tests.tiny import tiny

# All tests feed rows of up to 60 tokens as [B, 64] into 160 slots, with a plan of 16
# windows that ends in every ratio, and B is 1 or 4, once 8: few programs to compile.
W, T, V, ROOM = 8, 64, 61, 160
PLAN = np.array([2, 4, 2, 0, 4, 4, 2, 2, 4, 2, 4, 2, 2, 4, 0, 2])
CONFIG = tiny(
    vocab_size=V,
    eos_ids=(),
    beacon=BeaconConfig(window=W, ratios=(2, 4), sink=1, embed_init="bos"),
)
GREEDY = make_sampling()


@functools.cache
def variables() -> dict[str, Any]:
    """Random weights, large enough that tokens depend on what is far in front."""
    v = nn.unbox(init_variables(CONFIG, jax.random.key(0)))
    v["params"] = jax.tree.map(lambda x: 3 * x, v["params"])
    keys = iter(jax.random.split(jax.random.key(1), 100))
    v["beacon"] = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(next(keys), x.shape),
        init_beacon(v["params"], CONFIG),
    )
    return v


def prompts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, n).astype(np.int32) for n in lengths]


def start(rows: list[np.ndarray], plan: np.ndarray) -> tuple[jax.Array, MemoryState]:
    tokens = np.zeros((len(rows), T), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    memory = init_memory(CONFIG, len(rows), ROOM)
    inputs = (memory, tokens, lengths, plan)
    out, memory = feed(Net(CONFIG), variables(), *inputs, donate=True)
    return out.last_logits, memory


def run(rows: list[np.ndarray], plan: np.ndarray = PLAN, **options: Any) -> Decoded:
    logits, memory = start(rows, plan)
    options = {"max_new_tokens": 2 * BLOCK, "sampling": GREEDY} | options
    return decode(Net(CONFIG), variables(), memory, logits, plan, Decoding(**options))


def texts(result: Decoded) -> list[list[int]]:
    return [t[:n].tolist() for t, n in zip(result.tokens, result.lengths, strict=True)]


def used(memory: MemoryState, row: int) -> tuple[np.ndarray, np.ndarray]:
    """What a row can see: keys and values of its slots and its open window."""
    count = int(memory.slots[row] + memory.open_entries("interleave")[row])
    return np.asarray(memory.k[:, row, :count]), np.asarray(memory.v[:, row, :count])


def stands(memory: MemoryState, row: int = 0) -> list[int]:
    parts = (memory.slots, memory.sinks, memory.raw, memory.windows)
    return [int(x[row]) for x in parts]


def same_row(ours: MemoryState, i: int, theirs: MemoryState, j: int) -> None:
    assert stands(ours, i) == stands(theirs, j)
    for a, b in zip(used(ours, i), used(theirs, j), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_greedy_equals_feeding_the_argmax_step_by_step():
    (row,) = prompts(43)
    logits, memory = start([row], PLAN)
    last, expected = logits, []
    for _ in range(21):  # crosses the ends of three windows
        expected.append(int(jnp.argmax(last[0])))
        token, one = jnp.full((1, 1), expected[-1]), jnp.ones(1, jnp.int32)
        out, memory = feed(Net(CONFIG), variables(), memory, token, one, PLAN)
        last = out.last_logits
    result = run([row], max_new_tokens=21)
    assert result.tokens[0].tolist() == expected
    assert len(set(expected)) > 5
    np.testing.assert_allclose(result.logits, last, atol=1e-4)
    same_row(result.memory, 0, memory, 0)


@pytest.mark.parametrize(
    "seeds",
    [range(1), pytest.param(range(1, 64), marks=pytest.mark.slow)],
    ids=["1", "63-more"],
)
def test_random_batches_give_each_row_what_it_gives_alone(seeds):
    """Rows of 1 to 60 tokens share the plan of what they are fed; from there on each
    decodes 1 to 20 tokens by a plan of its own."""
    for seed in seeds:
        rng = np.random.default_rng([5, seed])
        rows = prompts(*rng.integers(1, 61, 4), seed=seed)
        plans = np.tile(rng.choice([0, 2, 4], len(PLAN)), (4, 1))
        for plan, row in zip(plans, rows, strict=True):
            begun = -(-len(row) // W)
            plan[begun:] = rng.choice([0, 2, 4], len(PLAN) - begun)
        plans[:, -3:] = [4, 0, 2]  # every ratio to come: one program
        new = rng.integers(1, 21, 4)
        whole = run(rows, plans, max_new_tokens=new)
        assert whole.lengths.tolist() == new.tolist()
        for i, row in enumerate(rows):
            alone = run([row], plans[i], max_new_tokens=new[i])
            assert texts(whole)[i] == texts(alone)[0]
            np.testing.assert_allclose(whole.logits[i], alone.logits[0], atol=1e-4)
            assert stands(whole.memory, i) == stands(alone.memory)
            if seed < 8:
                same_row(whole.memory, i, alone.memory, 0)


def test_8_rows_take_the_device_calls_of_one(monkeypatch):
    calls = []

    def counted(name, function, rows):
        def call(*args, **kwargs):
            calls.append((name, rows(args)))
            return function(*args, **kwargs)

        return call

    fed = counted("feed", feed_module.feed_jit, lambda args: len(args[3]))
    block = counted("block", decode_block, lambda args: len(args[3].logits))
    monkeypatch.setattr(feed_module, "feed_jit", fed)
    monkeypatch.setattr(decode_module, "decode_block", block)
    rows = prompts(60, 13, 1, 40, 8, 16, 33, 59)
    new = [5, 40, 17, 1, 2, 2, 3, 16]
    for count, first in ((8, 0), (1, 1)):
        calls.clear()
        run(rows[first : first + count], max_new_tokens=new[first : first + count])
        # 40 tokens: the first by itself, then blocks of 16.
        assert calls == [("feed", count), *[("block", count)] * 4]


def test_one_compile_serves_every_number_setting_and_end():
    rows = prompts(60, 13, 1, 40)
    run(rows)
    before = decode_block._cache_size()
    run(rows, max_new_tokens=1)
    run(prompts(9, 9, 59, 3), max_new_tokens=[3, 40, 17, 20])
    run(rows, seeds=[1, 2, 3, 4], sampling=make_sampling(0.7, 3, 0.9, 0.1))
    run(rows, seeds=7, sampling=make_sampling([0, 1, 2, 0], [0, 1, 2, 3]))
    run(rows, finished=lambda row, tokens: 3 if row == 1 else None)
    assert decode_block._cache_size() == before


def test_the_memory_passed_in_stays_as_it_is_unless_it_is_donated():
    logits, memory = start(prompts(43), PLAN)
    before = jax.tree.map(np.array, memory)
    options: dict[str, Any] = {"max_new_tokens": 20, "sampling": GREEDY}
    given = (Net(CONFIG), variables(), memory, logits, PLAN, Decoding(**options))
    first = decode(*given)
    jax.tree.map(np.testing.assert_array_equal, before, memory)
    second = decode(*given, donate=True)
    assert first.tokens.tolist() == second.tokens.tolist()
    assert memory.k.is_deleted() and not first.memory.k.is_deleted()


def test_an_end_token_stops_its_row_and_is_neither_returned_nor_fed():
    rows = prompts(43, 12, 30, 5)
    free = run(rows, max_new_tokens=20)
    end = int(free.tokens[0, 7])
    expected = [t[: t.index(end)] if end in t else t for t in texts(free)]
    result = run(rows, max_new_tokens=20, eos_ids=(end,))
    assert texts(result) == expected
    assert result.surplus.tolist() == [0] * 4
    short = run(rows, max_new_tokens=[max(len(t), 1) for t in expected])
    for i, text in enumerate(expected):
        if text:
            same_row(result.memory, i, short.memory, i)
    changed = dataclasses.replace(CONFIG, eos_ids=(end,))
    logits, memory = start(rows, PLAN)
    own = decode(
        Net(changed),
        variables(),
        memory,
        logits,
        PLAN,
        Decoding(20, GREEDY),
    )
    assert texts(own) == expected


@pytest.mark.parametrize("keep", [0, 3, 15, 20, 31])
def test_a_finished_row_keeps_what_it_is_told_and_the_others_go_on(keep):
    rows = prompts(43, 12, 30, 5)
    free = run(rows, max_new_tokens=40)
    asked = []

    def finished(row, tokens):
        asked.append((row, len(tokens)))
        assert tokens.tolist() == free.tokens[row, : len(tokens)].tolist()
        return keep if row == 1 and len(tokens) > keep else None

    blocks = []
    result = run(rows, max_new_tokens=40, finished=finished, on_tokens=blocks.append)
    expected = [*texts(free)]
    expected[1] = expected[1][:keep]
    assert texts(result) == expected
    ends = [1, 1 + BLOCK, 1 + 2 * BLOCK, 40]  # the first token comes by itself
    fed = next(end for end in ends if end > keep)  # the block in which it was found
    assert [a for a in asked if a[0] == 1] == [(1, n) for n in ends if n <= fed]
    assert [a for a in asked if a[0] == 0] == [(0, n) for n in ends]
    # What was streamed joins to the texts (nothing was cut in an earlier block).
    streamed = np.concatenate(blocks, axis=1)
    assert [row[row >= 0].tolist() for row in streamed] == expected
    # 12 + 17 tokens end with 5 in the open window, 12 + 33 as well.
    at = len(rows[1]) + fed
    surplus = fed - keep if fed - keep > at % W else 0
    assert result.surplus.tolist() == [0, surplus, 0, 0]
    assert result.fed[1][result.fed[1] >= 0].tolist() == (
        free.tokens[1, : keep + surplus].tolist()
    )
    _, _, raw, windows = stands(result.memory, 1)
    assert windows * W + raw == len(rows[1]) + keep + surplus
    if keep and not surplus:
        short = run(rows, max_new_tokens=[1, keep, 1, 1])
        same_row(result.memory, 1, short.memory, 1)


def test_a_rolled_back_row_goes_on_as_if_the_rest_had_never_been():
    (row,) = prompts(12)
    whole = run([row], max_new_tokens=30)
    # 12 + 17 tokens leave 5 in the open window: 13 kept, 4 of them taken back.
    cut = run([row], finished=lambda row, tokens: 13 if len(tokens) > 13 else None)
    assert cut.surplus.tolist() == [0] and int(cut.memory.raw[0]) == 1
    forced = jax.nn.one_hot(whole.tokens[:, 13], V)
    rest = decode(
        Net(CONFIG),
        variables(),
        cut.memory,
        forced,
        PLAN,
        Decoding(17, GREEDY),
    )
    assert rest.tokens[0].tolist() == whole.tokens[0, 13:].tolist()
    same_row(rest.memory, 0, whole.memory, 0)


def test_sampled_rows_repeat_alone_with_their_own_seed_and_settings():
    rows = prompts(43, 12, 30, 5)
    sampling = make_sampling([1.5, 0, 0.8, 3], 0, [1, 1, 0.9, 1], [0, 0, 0, 0.1])
    whole = run(rows, sampling=sampling, seeds=[3, 3, 9, 2**32 - 1])
    for i, seed in enumerate([3, 3, 9, 2**32 - 1]):
        own = jax.tree.map(lambda x, i=i: x[i] if x.ndim else x, sampling)
        alone = run(rows[i : i + 1], sampling=own, seeds=[seed])
        assert texts(whole)[i] == texts(alone)[0]
    assert texts(run(rows, sampling=sampling, seeds=[4, 5, 10, 1])) != texts(whole)


def test_equal_rows_with_one_seed_draw_different_texts():
    rows = prompts(20) * 4
    warm = make_sampling(1.0)
    first = texts(run(rows, sampling=warm, seeds=1))
    assert len({tuple(t) for t in first}) == 4
    assert first[2] == texts(run(rows[:1], sampling=warm, seeds=3))[0]


def test_a_draw_depends_on_the_number_of_the_token_not_on_the_block(monkeypatch):
    whole = run(prompts(20), sampling=make_sampling(1.0), max_new_tokens=20)
    monkeypatch.setattr(decode_module, "BLOCK", 5)
    decode_block.clear_cache()
    small = run(prompts(20), sampling=make_sampling(1.0), max_new_tokens=20)
    decode_block.clear_cache()
    assert texts(small) == texts(whole)


def test_a_repetition_penalty_counts_the_prompt_and_the_new_tokens():
    rows = prompts(43, 12, 30, 5)
    by = [1.0, 1.5, 3.0, 1e6]
    whole = run(
        rows,
        sampling=make_sampling(repetition_penalty=by),
        seen=seen_tokens(rows, V),
        max_new_tokens=20,
    )
    assert texts(whole)[0] == texts(run(rows, max_new_tokens=20))[0]
    last = texts(whole)[3]
    assert len({*last, *rows[3].tolist()}) == 20 + len({*rows[3].tolist()})
    # A plain loop: the penalty on the logits of feeding what is there so far.
    so_far, memory = rows[1].tolist(), None
    logits, memory = start([rows[1]], PLAN)
    for token in texts(whole)[1]:
        x = np.asarray(logits[0], np.float64)
        for t in set(so_far):
            x[t] = x[t] / 1.5 if x[t] > 0 else x[t] * 1.5
        assert int(x.argmax()) == token
        so_far.append(token)
        out, memory = feed(
            Net(CONFIG),
            variables(),
            memory,
            jnp.full((1, 1), token),
            jnp.ones(1, jnp.int32),
            PLAN,
        )
        logits = out.last_logits


def test_what_does_not_fit_is_refused_before_anything_is_fed():
    rows = prompts(43, 12)
    logits, memory = start(rows * 2, PLAN)
    given = (Net(CONFIG), variables(), memory, logits, PLAN)
    go = lambda donate=False, **asked: decode(*given, Decoding(**asked), donate=donate)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        go(max_new_tokens=0, sampling=GREEDY)
    with pytest.raises(ValueError, match=r"max_new_tokens has shape \(2,\) for 4 rows"):
        go(max_new_tokens=[1, 2], sampling=GREEDY)
    with pytest.raises(ValueError, match=r"top_k has shape \(3,\) for 4 rows"):
        go(max_new_tokens=1, sampling=make_sampling(top_k=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"seed has shape \(2,\) for 4 rows"):
        go(max_new_tokens=1, sampling=GREEDY, seeds=[1, 2])
    with pytest.raises(ValueError, match=r"repetition_penalty=\[1.5\] needs .*seen="):
        go(max_new_tokens=1, sampling=make_sampling(repetition_penalty=1.5))
    with pytest.raises(CapacityError, match="capacity=160 .*needs"):
        go(max_new_tokens=[1, 1, 1, 400], sampling=GREEDY, donate=True)
    assert not memory.k.is_deleted()
