"""Batches of whole rows: groups, order, mixtures, and where a run ends."""

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.data.examples import Example, shift
from beacon_jax.data.grouped import (
    EMPTY,
    GROUPS,
    GroupConfig,
    GroupedBatches,
    mixture,
    order,
    windows_of,
)

rows = st.lists(st.integers(1, 40), min_size=1, max_size=80)
sizes = st.integers(1, 9)


class Folder:
    """Stands for a prepared folder; row i holds i * 1000, i * 1000 + 1, ..."""

    def __init__(self, lengths, sources=None, uris=("a",)):
        self.lengths = np.asarray(lengths, np.int32)
        self.sources = np.zeros(len(lengths), np.int16) if sources is None else sources
        self.uris = list(uris)
        self.fingerprint = "f"
        self.reads = Counter()

    def read(self, index):
        self.reads[index] += 1
        n = self.lengths[index]
        return Example(np.arange(n, dtype=np.int32) + 1000 * index, np.arange(n) > 2)


def released_order(windows, batch_size, group, seed):
    """What docs/evaluation-protocols.md section 4.1 says, one row at a time."""
    random.seed(seed)
    pairs = list(enumerate(windows))
    random.shuffle(pairs)
    pairs.sort(key=lambda pair: pair[1])
    made, open_batch, before = [], [], None
    for row, count in pairs:
        if group == "strict" and count != before:
            open_batch = []
        open_batch.append(row)
        before = count
        if len(open_batch) == batch_size:
            made.append(open_batch)
            open_batch = []
    random.shuffle(made)
    return made


@pytest.mark.parametrize("group", ["strict", "relaxed"])
@settings(deadline=None, max_examples=60)
@given(lengths=rows, size=sizes, seed=st.integers(0, 2**31))
def test_the_order_is_that_of_the_release(group, lengths, size, seed):
    windows = windows_of(np.asarray(lengths), 8)
    made, _ = order(windows, size, group, seed)
    assert made.tolist() == released_order(windows.tolist(), size, group, seed)


@pytest.mark.parametrize("group", GROUPS)
@settings(deadline=None, max_examples=60)
@given(lengths=rows, size=sizes, seed=st.integers(0, 99))
def test_no_row_comes_twice_and_none_is_lost_unreported(group, lengths, size, seed):
    windows = windows_of(np.asarray(lengths), 8)
    made, left = order(windows, size, group, seed)
    used = made[made != EMPTY]
    assert made.shape[1] == size and len(set(used.tolist())) == len(used)
    assert len(used) + sum(left.values()) == len(lengths)
    missing = Counter(windows.tolist()) - Counter(windows[used].tolist())
    assert missing == Counter(left)
    if group == "strict":
        assert all(len(set(windows[batch])) == 1 for batch in made)
        assert all(count < size for count in left.values())
    if group == "relaxed":
        assert sum(left.values()) < size
    if group == "pad":
        assert not left and (made == EMPTY).sum() < size


def test_windows_are_counted_as_the_release_counts_strides():
    lengths = np.arange(1, 100)
    released = np.ceil((lengths - 16) / 16) + 1
    np.testing.assert_array_equal(windows_of(lengths, 16), released)
    assert windows_of(lengths, 0).max() == 1


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_mixture_has_the_shares_asked_for_and_is_as_large_as_it_can(counts, data):
    weights = data.draw(
        st.lists(
            st.sampled_from([0.5, 1.0, 2.0, 3.0]),
            min_size=len(counts),
            max_size=len(counts),
        )
    )
    sources = np.repeat(np.arange(len(counts)), counts)
    chosen = mixture(sources, weights, [7, 0])
    assert len(set(chosen.tolist())) == len(chosen)
    got = np.bincount(sources[chosen], minlength=len(counts))
    most = min(n / w for n, w in zip(counts, weights, strict=True))
    for n, w, available in zip(got, weights, counts, strict=True):
        assert abs(n - most * w) < 1 and n <= available
    assert any(n == available for n, available in zip(got, counts, strict=True))
    np.testing.assert_array_equal(chosen, mixture(sources, weights, [7, 0]))


def test_a_mixture_draws_other_rows_in_another_epoch():
    sources = np.repeat([0, 1], [100, 10])
    draws = [mixture(sources, [1, 1], [0, epoch]) for epoch in range(2)]
    assert [np.bincount(sources[d]).tolist() for d in draws] == [[10, 10]] * 2
    assert draws[0].tolist() != draws[1].tolist()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "must be one number for each of the 2 data.sources"),
        ((1.0, -1.0), "must not be negative"),
        ((0.0, 0.0), "and not all 0"),
        ((1.0, 1.0, 1.0), "source 2 has no example"),
    ],
)
def test_weights_that_make_no_mixture_are_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        mixture(np.asarray([0, 1, 1]), weights, [0])


def test_labels_are_shifted_once_and_only_targets_count():
    folder = Folder([5, 9, 12, 3])
    batches = GroupedBatches(folder, GroupConfig(4, 2, "pad"))
    for step in range(batches.steps):
        batch = batches.batch(step)
        assert batch["tokens"].shape == batch["labels"].shape == (2, 12)
        assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
        for row in range(2):
            n, first = batch["lengths"][row], batch["tokens"][row, 0]
            tokens, labels = batch["tokens"][row], batch["labels"][row]
            assert n == folder.lengths[first // 1000]
            assert (tokens[:n] == first + np.arange(n)).all() and not tokens[n:].any()
            expected = shift(tokens[:n], np.arange(n) > 2)
            assert (labels[:n] == expected).all() and (labels[n:] == -100).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_of_any_number_of_processes_put_together_are_the_batch(processes):
    config = GroupConfig(8, 8, "pad", seed=3, epochs=2)
    lengths = np.random.default_rng(0).integers(1, 60, 101)
    whole = GroupedBatches(Folder(lengths), config)
    folders = [Folder(lengths) for _ in range(processes)]
    each = [GroupedBatches(folder, config) for folder in folders]
    share = 8 // processes
    for step in range(whole.steps):
        expected = whole.batch(step)
        for i, batches in enumerate(each):
            held = range(i * share, (i + 1) * share)
            part = batches.batch(step, held)
            for name in ("tokens", "labels"):
                np.testing.assert_array_equal(part[name][held], expected[name][held])
                others = np.delete(part[name], held, axis=0)
                assert (others == (0 if name == "tokens" else -100)).all()
            np.testing.assert_array_equal(part["lengths"], expected["lengths"])
    # No process reads what another one holds, and all of them read everything once.
    total = sum((folder.reads for folder in folders), Counter())
    assert total == whole.data.reads == Counter({i: 2 for i in range(101)})


@pytest.mark.parametrize("group", GROUPS)
def test_a_stream_that_starts_anywhere_is_bit_identical(group):
    config = GroupConfig(8, 4, group, seed=5, epochs=3, weights=(2.0, 1.0))
    lengths = np.random.default_rng(1).integers(1, 60, 120)
    sources = (np.arange(120) % 3 == 0).astype(np.int16)
    make = lambda: GroupedBatches(
        Folder(lengths, sources, ("a", "b")),
        config,
    )
    batches = make()
    whole = [batches.batch(step) for step in range(batches.steps)]
    assert len(whole) >= 50
    for start in range(50):
        resumed = make()
        for step in range(start, min(start + 3, len(whole))):
            for name, value in resumed.batch(step).items():
                assert value.tobytes() == whole[step][name].tobytes()


def test_epochs_differ_and_each_has_every_row():
    config = GroupConfig(8, 5, "pad", epochs=2)
    batches = GroupedBatches(Folder([9] * 25), config)
    assert batches.steps == 10 and batches.epochs == 2
    first, second = batches.rows[:5], batches.rows[5:]
    assert sorted(first.flat) == sorted(second.flat) == list(range(25))
    assert first.tolist() != second.tolist()


def test_a_run_ends_at_the_first_of_its_limits():
    make = lambda **limits: GroupedBatches(
        Folder([10] * 40),
        GroupConfig(8, 4, **limits),
    )
    assert make().steps == 10
    assert make(epochs=3).steps == 30
    assert make(steps=7).steps == 7
    assert make(tokens=121).steps == 4  # 40 tokens a step
    assert make(tokens=120).steps == 3
    assert make(steps=25, epochs=0).steps == 25
    assert make(steps=9, tokens=120, epochs=0).steps == 3
    assert make(tokens=10**6).steps == 10
    with pytest.raises(ValueError, match=r"data.steps=11, but data.epochs=1 of 40"):
        make(steps=11)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "loose"}, "data.group='loose' is unknown: use strict, relaxed, pad"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"steps": -1}, "data.steps=-1 must not be negative"),
        ({"epochs": 0}, "never end: set one"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupConfig(**{"window": 8, "batch_size": 4, **settings})


def test_too_few_rows_for_a_batch_are_an_error_that_names_pad():
    config = GroupConfig(8, 4, "strict")
    with pytest.raises(ValueError, match="data.batch_size=4.*data.group='pad'"):
        GroupedBatches(Folder([5, 5, 5]), config)
    with pytest.raises(ValueError, match="one number for each of the 1 data.sources"):
        GroupedBatches(
            Folder([5] * 9),
            GroupConfig(8, 4, weights=(1.0, 2.0)),
        )
