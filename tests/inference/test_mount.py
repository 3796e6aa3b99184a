"""Mounted memories against float64 attention over the joined, un-rotated entries."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from beacon_jax.core.decode import decode_step
from beacon_jax.hf import Identity
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.mount import closed, concatenate
from beacon_jax.model.buffers import biased, entries_of
from beacon_jax.model.config import RopeConfig
from beacon_jax.model.net import Net
from beacon_jax.model.rotary import inverse_frequencies
from beacon_jax.training.initial import random_variables
from tests.inference.memories import (
    CONFIG,
    W,
    assert_same_live,
    random_memory,
    read,
    tokens_of,
    with_biases,
)


def config_with(rope=None, **beacon):
    settings = dataclasses.replace(CONFIG.beacon, **beacon)
    return dataclasses.replace(CONFIG, beacon=settings, rope=rope or CONFIG.rope)


YARN = RopeConfig(kind="yarn", factor=4.0, original_max_position=64)
CONFIGS = {
    "sinks": config_with(sink=2),
    "yarn": config_with(YARN),
    "append": config_with(placement="append", sink=1),
    "biases": config_with(),
}


@functools.cache
def variables():
    """Beacons that are not copies of the base, so that a mix-up shows."""
    tree = random_variables(CONFIG, 0)
    tree["beacon"] = random_variables(CONFIG, 1)["beacon"]
    return jax.tree.map(jnp.asarray, tree)


def turned(config, keys, positions):
    """Keys [..., n, K, H] rotated by positions [n], no magnitude; float64."""
    angles = positions[:, None] * inverse_frequencies(config).astype(np.float64)
    half = keys.shape[-1] // 2
    x = (keys[..., :half] + 1j * keys[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([x.real, x.imag], axis=-1)


def entries_to_keep(memory, row):
    """By hand: indices of the slots, and of the open window's raw tokens."""
    history, kept = memory.rows[row], []
    r, at = int(memory.state.ratio[row]), history.slots
    for i in range(history.raw):
        kept.append(at)
        at += 1
        interleaved = memory.config.beacon.placement == "interleave"
        at += interleaved and r > 0 and (i + 1) % r == 0
    return np.asarray([*range(history.slots), *kept])


def joined_by_hand(memories, row):
    """Un-rotated keys (with their magnitude), values [L, M, K, H], biases; float64."""
    keys, values, biases = [], [], []
    for memory in memories:
        index = entries_to_keep(memory, row)
        k, v = (
            np.asarray(x, np.float64)[:, row, index]
            for x in (entries_of(memory.state.k), memory.state.v)
        )
        bias = np.asarray(biased(memory.state.k).bias, np.float64)[:, row]
        biases.append(np.swapaxes(bias[..., index], 1, 2))
        keys.append(turned(memory.config, k, -index))
        values.append(v)
    return (np.concatenate(x, axis=1) for x in (keys, values, biases))


def reference_logits(config, keys, values, biases, tokens):
    """float64 logits after `tokens`, fed uncompressed behind the joined entries."""
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), variables()["params"])
    scale, m = config.rope.attention_scale, keys.shape[1]
    position = m + np.arange(len(tokens))
    x = tree["embed"]["embedding"][tokens]
    norm = lambda x, w: (
        x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w
    )
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"])
        heads = layer["attention"]
        h = norm(x, layer["input_norm"]["scale"])
        q, k, v = (
            np.einsum("td,dnh->tnh", h, heads[f"{n}_proj"]["kernel"]) for n in "qkv"
        )
        q = turned(config, q, position) * scale
        old = turned(config, keys[i], np.arange(m))
        k = np.concatenate([old, turned(config, k, position) * scale])
        v = np.concatenate([values[i], v])
        group = config.num_heads // config.num_kv_heads
        k, v = (np.repeat(a, group, axis=1) for a in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / config.head_dim**0.5
        scores[..., :m] += np.repeat(biases[i], group, axis=1).T[:, None]
        scores[:, np.arange(len(k)) > position[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("nts,snh->tnh", weights, v)
        x = x + np.einsum("tnh,nhd->td", out, heads["o_proj"]["kernel"])
        h, mlp = norm(x, layer["post_norm"]["scale"]), layer["mlp"]
        gate, up = (h @ mlp[f"{n}_proj"]["kernel"] for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down_proj"]["kernel"]
    x = norm(x[-1], tree["final_norm"]["scale"])
    return x @ tree["lm_head"]["kernel"]


def texts(*lengths, seed=0):
    return [tokens_of(n, seed + i) for i, n in enumerate(lengths)]


@functools.cache
def documents(name):
    """Three memories of two rows: whole windows, parts of windows, first windows.

    "biases": the slots of the second have some, and what lies behind them, too.
    """
    config = CONFIGS[name]
    lengths = ((13, 16), (5, 11), (16, 3))
    found = [
        read(config, variables(), texts(*pair, seed=10 * i), (2, 4))[1]
        for i, pair in enumerate(lengths)
    ]
    if name == "biases":
        found[1] = with_biases(found[1])
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_what_follows_mounted_memories_sees_them_like_joined_entries(name):
    config, memories = CONFIGS[name], documents(name)
    mounted = concatenate(memories)
    new = texts(5, 3, seed=50)
    got, _ = read(config, variables(), new, (0,), mounted)
    for row in range(2):
        keys, values, biases = joined_by_hand(memories, row)
        assert mounted.rows[row].slots == keys.shape[1]
        want = reference_logits(config, keys, values, biases, new[row])
        np.testing.assert_allclose(got[row], want, atol=1e-4)
        # The comparison is worth something: other slots are another answer.
        wrong = turned(config, keys, np.arange(keys.shape[1]) % 7)
        other = reference_logits(config, wrong, values, biases, new[row])
        assert np.abs(other - want).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_behind_mounted_memories_equals_feeding(name):
    config = CONFIGS[name]
    mounted = concatenate(documents(name))
    new, plan = texts(11, 11, seed=60), np.full(16, 2)
    want, fed = read(config, variables(), new, plan, mounted)
    state = mounted.state.resized(64)
    for t in range(11):
        logits, state = decode_step(
            Net(config),
            variables(),
            state,
            jnp.asarray([text[t] for text in new]),
            jnp.asarray(plan),
            static=(2,),
        )
    np.testing.assert_allclose(logits, want, atol=1e-4)
    for field in ("slots", "sinks", "raw", "windows", "ratio"):
        np.testing.assert_array_equal(getattr(state, field), getattr(fed.state, field))
    assert [row.slots for row in fed.rows] == np.asarray(state.slots).tolist()
    assert [row.windows for row in fed.rows] == np.asarray(state.windows).tolist()


@settings(max_examples=25, deadline=None)
@given(
    windows=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    sink=st.integers(0, 2),
)
def test_mounting_one_memory_of_whole_windows_is_that_memory(windows, sink):
    config = config_with(sink=sink)
    memory = random_memory([W * n for n in windows], config=config)
    assert_same_live(concatenate([memory]), memory)


def test_asking_a_mounted_memory_of_whole_windows_is_asking_it_alone():
    config = CONFIGS["sinks"]
    _, memory = read(config, variables(), texts(16, 24), (2, 4))
    question = texts(5, 3, seed=50)
    want, _ = read(config, variables(), question, (2,), memory)
    got, _ = read(config, variables(), question, (2,), concatenate([memory]))
    np.testing.assert_array_equal(got, want)
    # Also behind a memory of nothing, whose slots it then has.
    nothing = memory.truncate(0)
    nothing = dataclasses.replace(
        nothing, rows=tuple(row.forget_tokens() for row in nothing.rows)
    )
    behind = concatenate([nothing, memory])
    assert_same_live(
        behind,
        dataclasses.replace(
            memory, rows=tuple(row.forget_tokens() for row in memory.rows)
        ),
    )
    got, _ = read(config, variables(), question, (2,), behind)
    np.testing.assert_array_equal(got, want)


def test_an_open_window_is_closed_with_its_raw_tokens_as_a_mark_and_a_window():
    memory = random_memory((21, 16, 3), config=CONFIGS["sinks"])
    after = closed(memory)
    assert after.slots.tolist() == [memory.rows[0].slots + 5, memory.rows[1].slots, 3]
    assert [row.raw for row in after.rows] == [0, 0, 0]
    assert [row.windows for row in after.rows] == [3, 2, 1]
    assert np.asarray(after.state.windows).tolist() == [3, 2, 1]
    assert np.asarray(after.state.raw).tolist() == [0, 0, 0]
    assert after.rows[0].spans[-5:].tolist() == [[t, t + 1] for t in range(16, 21)]
    assert after.rows[0].ratios[-5:].tolist() == [0] * 5
    assert after.rows[2].marks.tolist() == [[0, 0], [3, 3]]
    kept = entries_to_keep(memory, 0)
    np.testing.assert_array_equal(
        np.asarray(after.state.v)[:, 0, : len(kept)],
        np.asarray(memory.state.v)[:, 0, kept],
    )
    assert memory.rows[0].raw == 5  # the one that was closed is still as it was
    assert np.asarray(memory.state.raw).tolist() == [5, 0, 3]


def test_spans_marks_and_tokens_are_those_of_the_joint_text():
    memories = documents("sinks")
    mounted = concatenate(memories)
    row = mounted.rows[0]
    tokens = np.concatenate([memory.rows[0].tokens for memory in memories])
    np.testing.assert_array_equal(row.tokens, tokens)
    assert row.fed == 13 + 5 + 16 == mounted.lengths[0]
    # 13 tokens: 2 sinks, 4 beacons, 5 raw; then 5 raw; then 2 windows with sinks of
    # their own, of ratio 2 and 4.
    marks = [[0, 0], [8, 6], [13, 11], [18, 16], [26, 22], [34, 24]]
    assert row.marks.tolist() == marks
    assert row.spans[6:16].tolist() == [[t, t + 1] for t in range(8, 18)]
    assert row.spans[16:20].tolist() == [[18, 19], [19, 20], [18, 20], [20, 22]]
    assert row.spans[-1].tolist() == [30, 34]
    assert np.asarray(mounted.state.sinks).tolist() == [2, 2]
    assert [r.slots for r in mounted.rows] == np.asarray(mounted.state.slots).tolist()


def test_cutting_a_mounted_memory_gives_back_the_first_one():
    memories = documents("sinks")
    first = [memories[0][row] for row in range(2)]
    for row, memory in enumerate(first):
        mounted = concatenate([memory, memories[1][row]])
        cut = mounted.truncate(int(memory.lengths[0]))
        assert_same_live(cut, closed(memory))


def test_memories_differ_in_capacity_and_one_without_tokens_makes_all_without():
    small = random_memory((16,), capacity=24)
    large = random_memory((24,), capacity=200, keep_tokens=False)
    for pair in ([small, large], [large, small]):
        mounted = concatenate(pair)
        assert mounted.rows[0].tokens is None
        assert mounted.lengths.tolist() == [40]
        assert mounted.slots.tolist() == [6 + 8] == mounted.state.slots.tolist()
        assert mounted.capacity >= 14


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.slow
def test_history_and_device_agree_after_any_mix_of_feeding_cutting_and_mounting(data):
    config, plan = CONFIGS["sinks"], (2, 4)
    lengths = st.integers(1, 16)
    feed = lambda memory, n: read(
        config, variables(), [np.resize(tokens_of(n), n)], plan, memory, capacity=160
    )[1]
    memory = feed(None, data.draw(lengths, "first"))
    for kind in data.draw(st.lists(st.sampled_from("fcm"), max_size=4), "kinds"):
        if kind == "f":
            memory = feed(memory, data.draw(lengths, "more"))
        elif kind == "c":
            at = data.draw(st.integers(0, int(memory.lengths[0])), "cut")
            memory = memory.truncate(at)
        else:
            if len(memory.rows[0].pending):
                memory = feed(memory, 1)
            memory = concatenate([memory, feed(None, data.draw(lengths, "other"))])
        row, state = memory.rows[0], memory.state
        assert (row.slots, row.raw, row.windows) == (
            int(state.slots[0]),
            int(state.raw[0]),
            int(state.windows[0]),
        )
        assert len(row.spans) == len(row.ratios) == row.marks[-1, 1]
        assert row.marks[-1, 0] + row.raw == row.fed
        if row.raw:
            assert row.ratio == int(state.ratio[0])
            open_ids = np.asarray(state.tokens)[0, : row.raw]
            assert row.tokens[: row.fed][-row.raw :].tolist() == open_ids.tolist()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (random_memory((16, 8)), r"memories\[1\] does not fit.*rows 2, not 1"),
        (random_memory((16,), dtype="bfloat16"), "dtype bfloat16, not float32"),
        (
            random_memory((16,), config=config_with(sink=1)),
            "config.beacon.sink 1, not 0",
        ),
        (
            random_memory((16,), identity=Identity("a" * 64, "c" * 64)),
            "hash of the beacon weights c{64}, not b{64}. Mount",
        ),
        (random_memory((16,), identity=Identity()), "base weights unknown, not a{64}"),
        (random_memory((20,)).truncate(13), r"memories\[1\] has 5 tokens .*at \[8\]"),
    ],
)
def test_memories_that_do_not_fit_are_refused_saying_what_differs(other, message):
    with pytest.raises(ValueError, match=message):
        concatenate([random_memory((16,)), other])


def test_memories_that_are_spread_over_devices_mount_where_they_are(tmp_path):
    pair = [random_memory((21, 16), seed=1), random_memory((5, 11), seed=2)]
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    spread = []
    for i, memory in enumerate(pair):
        memory.save(tmp_path / f"{i}.beacon")
        spread.append(Memory.load(tmp_path / f"{i}.beacon", mesh=mesh))
    mounted = concatenate(spread)
    assert mounted.state.k.sharding.is_equivalent_to(spread[0].state.k.sharding, 5)
    assert_same_live(mounted, concatenate(pair))


def test_no_memory_at_all_is_refused():
    with pytest.raises(ValueError, match="memories=\\[\\] is empty"):
        Memory.concatenate([])
