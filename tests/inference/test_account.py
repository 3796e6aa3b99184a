"""Bytes and ratios as they are: slots, the open window and its beacons."""

import dataclasses

import numpy as np
import pytest

from beacon_jax.core.law import Law
from beacon_jax.inference.account import Account, ratio_words
from beacon_jax.inference.history import History
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.presets import get_preset

TINY = get_preset("tiny")


def config(placement="interleave", sink=0):
    beacon = BeaconConfig(window=8, ratios=(2, 4), placement=placement, sink=sink)
    return dataclasses.replace(TINY, beacon=beacon)


def account(tokens, plan, *, of=None, slot=100):
    of = of or config()
    law, ids = Law.of(of), np.arange(tokens, dtype=np.int32)
    row = History.empty().feed(law, np.asarray(plan), ids)
    return Account.of(row, row.slots + int(law.entries(row.ratio, row.raw)), slot)


def test_the_open_window_and_its_beacons_are_held_and_counted():
    # 8 tokens in 2 slots; 6 raw tokens with a beacon behind the first 4.
    held = account(14, [4])
    assert (held.slots, held.open_tokens, held.entries) == (2, 6, 9)
    assert held.nbytes == 900 and held.ratios == (4,)
    assert held.ratio == 14 / 9
    assert held.worth() == "x4 planned; x1.6 with the open window"
    assert held.holds() == (
        "2 memory slots + 6 in the open window with 1 beacon (0.001 MiB)"
    )


def test_full_attention_holds_all_of_its_tokens():
    held = account(14, [0])
    assert held.entries == 14 and held.nbytes == 1_400 and held.ratio == 1
    assert held.worth() == held.planned == "uncompressed"


def test_whole_windows_are_what_was_planned():
    assert account(32, [4]).worth() == "x4"
    with_sink = account(32, [4], of=config(sink=1))
    assert with_sink.worth() == "x4 planned; x3.6 held"
    assert account(14, [4], of=config("append")).entries == 2 + 6


def test_a_mix_names_its_ratios():
    held = account(24, [4, 0, 2])
    assert held.ratios == (0, 2, 4)
    assert held.worth() == "mix of uncompressed, x2 and x4 planned; x1.7 held"


@pytest.mark.parametrize(
    ("ratios", "words"),
    [((), "uncompressed"), ((8,), "x8"), ((2, 8), "mix of x2 and x8")],
)
def test_ratios_in_words(ratios, words):
    assert ratio_words(ratios) == words
