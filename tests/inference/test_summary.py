"""Summaries: what kept tokens gain of the dropped ones, and its training."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import beacon_jax
from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import encode_stream
from beacon_jax.inference.compressors import summary
from beacon_jax.inference.compressors.attention_matching import Matched
from beacon_jax.inference.compressors.piece import Kept
from beacon_jax.inference.compressors.retention import Retention, sample_of
from beacon_jax.inference.compressors.summary import (
    Summary,
    fresh,
    shapes,
    slots_of,
)
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.train_summary import Steps, train_summary
from beacon_jax.model.partition import make_partition
from tests.evaluation.numpy_model import rotated as rotated_by
from tests.inference.conftest import W
from tests.inference.test_compressors import OTHER, TEXT, same
from tests.inference.test_compressors import slots_of as memory_slots
from tests.inference.test_retention import random


@pytest.fixture(scope="module")
def tiny():
    return beacon_jax.load("tiny-beacon")


@pytest.fixture(scope="module")
def text(tiny):
    return encode_stream(load_documents("stdlib")[:40], tiny.tokenizer)


def drawn(config, seed=1):
    """A summary that adds something to every slot."""
    rng = np.random.default_rng(seed)
    sizes = shapes(config, 4)
    return Summary(*(rng.normal(size=s, scale=0.3).astype(np.float32) for s in sizes))


def test_slots_know_the_means_of_the_dropped_tokens_nearest_to_them(model):
    memory = model.compress([TEXT[: 4 * W], OTHER[: 2 * W]], ratio=0)
    c, rng = model.config, np.random.default_rng(0)
    start, stop, count = np.asarray([3, 0]), np.asarray([30, 16]), np.asarray([9, 4])
    size, capacity = 10, memory.state.capacity
    kept = np.zeros((c.num_layers, 2, capacity, c.num_kv_heads), np.int32)
    for layer, row, head in np.ndindex(c.num_layers, 2, c.num_kv_heads):
        inside = np.arange(start[row], stop[row])
        some = np.sort(rng.choice(inside, count[row], replace=False))
        both = [*range(start[row]), *some]
        kept[layer, row, : len(both), head] = both
    given = [jnp.asarray(x, jnp.int32) for x in (kept, start, stop, count)]
    exact = jnp.zeros((c.num_layers, 2, c.num_kv_heads, capacity), bool)
    exact = exact.at[..., 5].set(True)  # wherever a head keeps slot 5
    shape = (c.num_layers, 2, size, c.num_kv_heads, c.head_dim)
    v = rng.normal(size=shape).astype(np.float32)
    bias = rng.normal(size=(*shape[:2], shape[3], size)).astype(np.float32)
    made = Matched(jnp.asarray(v), jnp.asarray(bias))
    found = slots_of(model.net, memory.state, Kept(*given, exact), made)
    assert np.array_equal(found.v, v) and np.array_equal(found.bias, bias)
    sizes = 2 * c.head_dim, 1, c.head_dim
    for row in range(2):
        k, values = memory_slots(memory, row)
        at = -np.arange(k.shape[1])[:, None]
        k = np.stack([rotated_by(c, x, at) for x in k])
        for layer, head in np.ndindex(c.num_layers, c.num_kv_heads):
            end = start[row] + count[row]
            mine = kept[layer, row, start[row] : end, head]
            nearest = {int(p): [] for p in mine}
            for p in set(range(start[row], stop[row])) - {*nearest}:
                # Of two equally far the first.
                nearest[min(nearest, key=lambda x: (abs(x - p), x))].append(p)
            for number, p in enumerate(mine):
                f = np.asarray(found.features)[layer, row, number, head]
                own = np.concatenate([k[layer, p, head], values[layer, p, head]])
                got = np.asarray(found.k)[layer, row, number, head]
                np.testing.assert_allclose(got, own[: c.head_dim], atol=1e-5)
                if p == 5:
                    assert not f.any()
                    continue
                *f, change, last = np.split(f, np.cumsum([*sizes]))
                others = nearest[int(p)]
                assert f[1] == pytest.approx(np.log1p(len(others)), abs=1e-5)
                f = f[0]
                mine = (layer, row, number, head)
                np.testing.assert_allclose(
                    change, v[mine] - own[c.head_dim :], atol=1e-5
                )
                assert last == bias[layer, row, head, number]
                away = np.zeros_like(own)
                if others:
                    parts = [x[layer, others, head] for x in (k, values)]
                    means = np.concatenate(parts, axis=-1).mean(0)
                    away = means - own
                np.testing.assert_allclose(f, away, atol=1e-5)


def test_a_fresh_summary_changes_nothing(model):
    method = random(model)
    want = model.compress([TEXT, OTHER], ratio=4, method=method)
    new = method.with_summary(fresh(model.config))
    found = model.compress([TEXT, OTHER], ratio=4, method=new)
    for row in range(2):
        same(found, want, row, row)


def test_a_summary_changes_what_is_not_to_stay(model):
    method = random(model).with_summary(drawn(model.config))
    plain = random(model)
    a, b = (model.compress(TEXT, ratio=4, method=m) for m in (method, plain))
    v, without = (memory_slots(m)[1] for m in (a, b))
    assert np.abs(v - without).max() > 0.01
    span = r"52817"
    options = {"ratio": 4, "spans": span, "lossless": "slots"}
    v = memory_slots(model.compress(TEXT, method=method, **options))[1]
    whole = memory_slots(model.compress(TEXT, ratio=0))[1]
    at = TEXT.index(span)
    for layer in range(len(v)):
        for token in range(at, at + 5):
            off = np.abs(v[layer] - whole[layer, token]).max(-1).min(0)
            assert (off < 1e-5).all()


def test_rows_pieces_int8_and_packs_have_summaries(model, tmp_path):
    method = random(model).with_summary(drawn(model.config))
    method.piece_tokens = 2 * W
    both = model.compress([TEXT, OTHER], ratio=4, method=method)
    for row, one in enumerate((TEXT, OTHER)):
        same(both, model.compress(one, ratio=4, method=method), row)
    first = model.compress(TEXT[: 2 * W], ratio=4, method=method)
    on = model.compress(TEXT[2 * W :], ratio=4, method=method, memory=first)
    same(on, both)
    for x, y in zip(memory_slots(first), memory_slots(on), strict=True):
        assert np.array_equal(x, y[:, : x.shape[1]])  # earlier pieces stay
    small = model.compress(TEXT, ratio=4, method=method, memory_dtype="int8")
    assert small.slots[0] == both.slots[0]
    both.save(tmp_path / "m.beacon")
    same(Memory.load(tmp_path / "m.beacon", model), both, atol=0)
    back = Retention.load(method.save(tmp_path))
    back.piece_tokens = 2 * W
    same(model.compress([TEXT, OTHER], ratio=4, method=back), both, atol=0)
    assert back.digest == method.digest != random(model).digest


def test_a_damaged_summary_is_refused(model, tmp_path):
    made = drawn(model.config)
    wrong = random(model).with_summary(made._replace(b=made.b[..., :-1]))
    with pytest.raises(ValueError, match="summary_b .L, K, R, 2 H."):
        Retention.load(wrong.save(tmp_path))


def test_training_brings_predictions_closer_to_full_attention(tiny, text):
    size = tiny.config.num_layers, tiny.config.num_kv_heads, tiny.config.head_dim
    scores = np.zeros(size, np.float32), 0.0, 1.0, sample_of(tiny.variables)
    method = Retention(*scores)  # nothing is likely: snapkv
    settings = Steps(count=40, ratios=(8,), length=160, window=32)
    one, steps = text[:160], []  # one text: what can be learnt of it is learnt
    made = train_summary(tiny, method, one, settings, lambda *x: steps.append(x))
    assert steps[-1] == (40, 40) and len(made.losses) == 40
    assert made.losses[-1] < 0.5 * made.losses[0]
    # It goes on from what it has; a step of rate zero measures it.
    again = Steps(count=1, ratios=(8,), length=160, window=32, lr=0.0)
    (after,) = train_summary(tiny, made.retention, one, again).losses
    assert after <= made.losses[-1] + 1e-4


def test_settings_of_training_that_cannot_be_are_refused(tiny, text):
    with pytest.raises(ValueError, match="steps=0 must be >= 1"):
        Steps(count=0)
    with pytest.raises(ValueError, match="at least two windows of 256"):
        Steps(length=300)
    for ratios in ((), (0,), (2, 769)):
        with pytest.raises(ValueError, match="must be numbers from 1 to 768"):
            Steps(ratios=ratios)
    with pytest.raises(ValueError, match="lr=nan must be"):
        Steps(lr=float("nan"))
    none = Retention(np.zeros((4, 2, 8), np.float32), 0.0, 1.0, np.zeros((4, 8)))
    with pytest.raises(ValueError, match="text has 9 tokens, fewer than the 1,024"):
        train_summary(tiny, none, text[:9])
    split = dataclasses.replace(tiny, partition=make_partition("data:2"))
    with pytest.raises(ValueError, match="mesh=data:2.* splits rows"):
        train_summary(split, none, text)
    assert summary.RANK == 64
