"""The slot law against a count that takes one token after the other."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.core.law import Law
from beacon_jax.core.plan import at, capacity
from beacon_jax.model.layout import Layout
from tests.tiny import TINY


class Count:
    """A row that is fed token by token: lists in place of arithmetic.

    An entry is (start, end, ratio): the tokens that it stands for, 0 if it is raw.
    """

    def __init__(self, law: Law):
        self.law, self.slots, self.open, self.fed = law, [], [], 0
        self.most = 0

    def feed(self, ratio: int) -> None:
        law, start = self.law, self.fed // self.law.window * self.law.window
        self.open.append((self.fed, self.fed + 1, 0))
        self.fed += 1
        raw = self.fed - start
        every = range(start, start + law.window, ratio or law.window)
        groups = [(first, first + ratio, ratio) for first in every] if ratio else []
        if law.placement == "interleave":
            self.open += [g for g in groups if g[1] == self.fed]
        elif raw == law.window:
            self.open += groups
        self.most = max(self.most, len(self.slots) + len(self.open))
        if raw == law.window:
            if not ratio:
                self.slots += self.open
            else:
                sink = [] if self.slots else self.open[: law.sink]
                self.slots += [*sink, *groups]
            self.open = []


def laws(most: int) -> list[Law]:
    sizes = itertools.product(range(1, most + 1), ("interleave", "append"))
    return [Law(w, sink, placement) for w, placement in sizes for sink in range(w + 1)]


def ratios_of(law: Law) -> list[int]:
    return [0, *(r for r in range(1, law.window + 1) if law.window % r == 0)]


def check(law: Law, plan: list[int]) -> None:
    """Compares every number of the law with the count of a row of these windows."""
    row, after = Count(law), law.after(plan)
    for number, ratio in enumerate(plan):
        slots = len(row.slots)
        assert after[number] == slots
        for raw in range(law.window):
            assert law.entries(ratio, raw) == len(row.open)
            assert law.beacons(ratio, raw) == len(row.open) - raw
            row.feed(ratio)
        assert law.kept(ratio, slots) == len(row.slots) - slots
        spans, each = law.source(ratio, law.kept_entries(ratio, slots))
        found = np.column_stack([spans + number * law.window, each])
        assert found.tolist() == [list(entry) for entry in row.slots[slots:]]
        token = np.arange(law.window)
        stands = (spans[:, :1] <= token) & (token < spans[:, 1:])  # a sink comes first
        owner = slots + stands.argmax(axis=0)
        np.testing.assert_array_equal(law.slot_of(ratio, slots, token), owner)
    assert after[-1] == len(row.slots)
    assert row.most <= after[-1] + law.room(plan)
    if len(set(plan)) == 1:
        assert law.closed(plan[0], len(plan)) == len(row.slots)


def test_every_number_of_small_windows_is_that_of_counting():
    for law in laws(6):
        for plan in itertools.product(ratios_of(law), repeat=2):
            check(law, list(plan))


@st.composite
def rows(draw):
    window = draw(st.integers(1, 48))
    sink = draw(st.integers(0, window))
    law = Law(window, sink, draw(st.sampled_from(["interleave", "append"])))
    ratio = st.sampled_from(ratios_of(law))
    return law, draw(st.lists(ratio, min_size=1, max_size=6))


@settings(deadline=None, max_examples=100)
@given(rows())
def test_every_number_of_longer_rows_is_that_of_counting(row):
    check(*row)


def test_the_entries_of_a_window_are_those_that_the_decoder_lays_out():
    for law in laws(8):
        for ratio in ratios_of(law)[1:]:
            layout = Layout.of_window(law.window, ratio, law.placement)
            kept = law.kept_entries(ratio, slots=1)
            np.testing.assert_array_equal(kept, layout.beacon_index)
            assert layout.length == law.entries(ratio, law.window)
            raw = np.setdiff1d(np.arange(layout.length), kept)
            tokens = np.arange(law.window)
            np.testing.assert_array_equal(raw, law.entries(ratio, tokens))


@pytest.mark.parametrize("law", [Law(8, 2), Law(8, 3, "append")])
def test_arrays_of_numpy_and_of_jax_give_the_same_numbers(law):
    ratio, number = np.meshgrid([0, 1, 2, 4, 8], np.arange(9))
    for name in ("beacons", "entries", "kept"):
        ours = getattr(law, name)(jnp.asarray(ratio), jnp.asarray(number))
        assert isinstance(ours, jnp.ndarray)
        np.testing.assert_array_equal(ours, getattr(law, name)(ratio, number))
    for slots in (0, 5):
        ours = law.place(jnp.asarray(ratio), slots, jnp.asarray(number))
        np.testing.assert_array_equal(ours, law.place(ratio, slots, number))


def test_no_room_is_wasted():
    """Some plan fills what is reserved: a full window beside its beacons or sinks."""
    for law in laws(6):
        for ratio in ratios_of(law)[1:]:
            row = Count(law)
            for _ in range(2 * law.window):
                row.feed(ratio)
            beacons = law.window // ratio
            used = row.most - law.closed(ratio, 1)
            assert used == law.window + beacons <= law.room([ratio])
            assert law.room([ratio]) - used == max(law.sink - beacons, 0)


def test_the_last_ratio_of_a_plan_goes_on():
    plan = np.asarray([4, 2, 8])
    assert at(plan, 7) == 8 and at(plan, np.arange(5)).tolist() == [4, 2, 8, 8, 8]
    several = jnp.asarray([plan, [1, 1, 2]])
    found = at(several, jnp.asarray([[0, 9], [1, 2]]))
    assert found.tolist() == [[4, 8], [1, 2]]


def test_a_capacity_holds_full_windows_and_an_open_one():
    assert TINY.beacon is not None
    law = Law.of(TINY)
    assert capacity(TINY, [2, 4]) == law.after([2, 4])[-1] + law.room([2, 4])
    assert capacity(TINY, []) == law.window + law.sink
