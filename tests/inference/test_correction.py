"""The correction of retention: what it adds to which slots, and its training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import beacon_jax
from beacon_jax.core.recent import feed
from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import encode_stream
from beacon_jax.inference.compressors.correction import SINKS
from beacon_jax.inference.compressors.retention import Retention, sample_of
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.piecewise import PLAIN
from beacon_jax.inference.train_correction import Correcting, train_correction
from beacon_jax.model.partition import make_partition
from tests.inference.conftest import W
from tests.inference.test_compressors import OTHER, TEXT, same, slots_of
from tests.inference.test_retention import random


@pytest.fixture(scope="module")
def tiny():
    return beacon_jax.load("tiny-beacon")


@pytest.fixture(scope="module")
def text(tiny):
    return encode_stream(load_documents("stdlib")[:40], tiny.tokenizer)


def drawn(model, seed=1):
    c = model.config
    shape = c.num_layers, c.num_kv_heads, c.head_dim
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(model):
    """A retention that takes nothing for a fact."""
    c = model.config
    zeros = np.zeros((c.num_layers, c.num_kv_heads, c.head_dim), np.float32)
    return Retention(zeros, 0.0, 1.0, sample_of(model.variables))


@pytest.mark.parametrize("ratio", [2, 4])
def test_every_slot_that_was_made_is_changed_by_the_log_of_its_tokens(model, ratio):
    whole = len(TEXT) // W * W
    method, added = plain(model), drawn(model)
    before = model.compress(TEXT[:whole], ratio=ratio, method=method)
    corrected = method.with_correction(added)
    after = model.compress(TEXT[:whole], ratio=ratio, method=corrected)
    count = int(before.slots[0])
    crowd = np.log(whole / count)
    (k, v, bias), (new_k, new_v, new) = slots_of(before), slots_of(after)
    assert np.array_equal(k, new_k) and np.array_equal(bias, new)
    want = np.broadcast_to(crowd * added[:, None], (len(v), count, *added.shape[1:]))
    want = np.where(np.arange(count)[:, None, None] < SINKS, 0.0, want)
    np.testing.assert_allclose(new_v - v, want, atol=1e-5)


def test_facts_and_spans_stay_as_they_are(model):
    added = drawn(model)
    kept = {"ratio": 4, "spans": r"52817", "lossless": "slots"}
    whole = slots_of(model.compress(TEXT, ratio=0))[1]
    found = slots_of(
        model.compress(TEXT, method=plain(model).with_correction(added), **kept)
    )[1]
    for token in range(TEXT.index("52817"), TEXT.index("52817") + 5):
        for layer in range(len(whole)):
            off = np.abs(found[layer] - whole[layer, token]).max(-1).min(0)
            assert (off < 1e-5).all()
    # Everything is a fact: half of the room stays, and only the rest is changed.
    method = random(model, threshold=-1e9)
    before, after = (
        slots_of(model.compress(TEXT[: 8 * W], ratio=4, method=m))[1]
        for m in (method, method.with_correction(added))
    )
    moved = np.abs(after - before).max(-1) > 1e-6  # [L, S, K]
    assert (moved.sum(1) <= before.shape[1] // 2).all() and moved.any()


def test_zeros_change_nothing_and_what_is_not_compressed_stays(model):
    method = random(model)
    zeros = method.with_correction(np.zeros_like(drawn(model)))
    want, found = (
        model.compress([TEXT, OTHER], ratio=4, method=m) for m in (method, zeros)
    )
    for row in range(2):
        same(found, want, row, row)
    whole = model.compress(TEXT, ratio=0)
    found = model.compress(TEXT, ratio=0, method=method.with_correction(drawn(model)))
    same(found, whole)


def test_rows_pieces_int8_and_packs_are_corrected(model, tmp_path):
    method = random(model).with_correction(drawn(model))
    method.piece_tokens = 2 * W
    both = model.compress([TEXT, OTHER], ratio=4, method=method)
    for row, one in enumerate((TEXT, OTHER)):
        same(both, model.compress(one, ratio=4, method=method), row)
    first = model.compress(TEXT[: 2 * W], ratio=4, method=method)
    on = model.compress(TEXT[2 * W :], ratio=4, method=method, memory=first)
    same(on, both)
    for x, y in zip(slots_of(first), slots_of(on), strict=True):
        assert np.array_equal(x, y[:, : x.shape[1]])  # earlier pieces stay
    small = model.compress(TEXT, ratio=4, method=method, memory_dtype="int8")
    assert small.slots[0] == both.slots[0]
    both.save(tmp_path / "m.beacon")
    same(Memory.load(tmp_path / "m.beacon", model), both, atol=0)
    back = Retention.load(method.save(tmp_path))
    back.piece_tokens = 2 * W
    same(model.compress([TEXT, OTHER], ratio=4, method=back), both, atol=0)
    assert back.digest == method.digest != random(model).digest


def test_a_damaged_correction_is_refused(model, tmp_path):
    wrong = random(model).with_correction(drawn(model)[..., :-1])
    with pytest.raises(ValueError, match="a correction has .L, K, H."):
        Retention.load(wrong.save(tmp_path))


def divergence(model, method, rows, window, ratio):
    """How far a window behind memories is from full attention, by the public way."""
    past, last = list(rows[:, :-window]), jnp.asarray(rows[:, -window:])
    logits = []
    for options in ({"ratio": 0}, {"ratio": ratio, "method": method}):
        state = model.compress(past, **options).state
        state = state.resized(state.capacity + window)
        lengths = np.full(len(rows), window, np.int32)
        given = model.net, model.variables, state, last, lengths, PLAIN
        logits.append(feed(*given, outputs="logits")[0].logits)
    full, found = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in logits)
    return float((jnp.exp(full) * (full - found)).sum(-1).mean())


def test_training_brings_predictions_closer_to_full_attention(tiny, text):
    method, told = plain(tiny), []
    text = np.tile(text[:256], 2)  # one text: what can be learnt of it is learnt
    settings = Correcting(steps=30, ratios=(8,), length=256, lr=1e-2)
    made = train_correction(tiny, method, text, settings, lambda *x: told.append(x))
    assert told[-1] == (72, 72) and sorted(told) == told
    assert made.after < 0.6 * made.before
    assert made.retention.correction is not None
    # The same, as a user meets it.
    rows = text[None, :256]
    for want, one in ((made.before, method), (made.after, made.retention)):
        assert divergence(tiny, one, rows, 64, 8) == pytest.approx(want, rel=1e-3)
    again = train_correction(tiny, method, text, settings)
    assert np.array_equal(made.retention.correction, again.retention.correction)


def test_a_correction_that_does_not_help_is_left_out(tiny, text):
    settings = Correcting(steps=12, ratios=(2,), length=128, lr=30.0)
    made = train_correction(tiny, plain(tiny), text, settings)
    assert made.after >= made.before and made.retention.correction is None


@pytest.mark.parametrize("mesh", ["tensor:2"])
def test_heads_may_be_split(tiny, text, mesh):
    split = beacon_jax.load("tiny-beacon", mesh=mesh)
    settings = Correcting(steps=3, ratios=(4,), length=128)
    a, b = (train_correction(m, plain(m), text, settings) for m in (tiny, split))
    np.testing.assert_allclose([*a[1:]], [*b[1:]], rtol=1e-4)


def test_settings_that_cannot_be_are_refused(tiny, text):
    for name in ("steps", "texts"):
        with pytest.raises(ValueError, match=f"{name}=0 must be >= 1"):
            Correcting(**{name: 0})
    with pytest.raises(ValueError, match="length=100 must be >= 128"):
        Correcting(length=100)
    for ratios in ((), (1,), (2, 97)):
        with pytest.raises(ValueError, match="must be numbers from 2 to 96"):
            Correcting(ratios=ratios)
    for lr in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lr=.* must be a number above 0"):
            Correcting(lr=lr)
    with pytest.raises(ValueError, match="length=1,024 is above the positions"):
        train_correction(tiny, plain(tiny), text)
    with pytest.raises(ValueError, match="text has 9 tokens, but 2,048 are needed"):
        train_correction(tiny, plain(tiny), text[:9])
    for mesh in ("data:2", "stage:2"):
        split = dataclasses.replace(tiny, partition=make_partition(mesh))
        with pytest.raises(ValueError, match=f"mesh=.*{mesh}.* splits more than heads"):
            train_correction(split, plain(tiny), text, Correcting(length=128))
