"""Plans against hand-computed tables and token-by-token counts on a tiny config."""

import dataclasses
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from beacon_jax import flops
from beacon_jax.core.law import Law
from beacon_jax.core.memory import init_memory
from beacon_jax.core.plan import capacity
from beacon_jax.inference.budget import parse_bytes
from beacon_jax.inference.history import History
from beacon_jax.inference.plan import (
    Plan,
    fitting_ratio,
    group_rows,
    plan_ratios,
    positions,
    stack_ratios,
    warn_beyond_training,
)
from beacon_jax.inference.row import Row
from beacon_jax.model.config import BeaconConfig
from tests.inference.plans import (
    CONFIG,
    PLAIN,
    W,
    cases,
    entries_by_token,
    fed,
    make_plan,
    with_beacon,
)

quiet = pytest.mark.filterwarnings("ignore:max_slots=")


def budgets(config, options):
    """(smallest that works, enough for the smallest ratio everywhere)"""
    row = Row(config, options["length"], options["new_tokens"], options["before"])
    row.with_spans(options.get("spans", ()), options.get("lossless", "windows"))
    least = min(r for r in config.beacon.ratios if r)
    held = lambda r: row.held(row.applied(row.uniform(r)))
    return held(W), held(least)


@settings(deadline=None)
@given(cases(), st.sampled_from([0, 1, 2, 4, 8, [4, 0, 2], [8, 2]]))
def test_slots_positions_and_entries_equal_a_count_token_by_token(case, ratio):
    config, options = case
    plan = make_plan(config, ratio, **options)
    before = options["before"] or History.empty()
    length, new = options["length"], options["new_tokens"]
    reading, held = entries_by_token(config, plan, length, new, before)
    most = positions(config, plan, length + new, options["before"])
    assert most == max(*reading, *held)
    row = Row(config, length, new, options["before"])
    row.with_spans(options["spans"], options["lossless"])
    number = np.minimum(row.first + np.arange(row.count), len(plan.ratios) - 1)
    assert row.held(plan.ratios[number]) == max(held)


@settings(deadline=None)
@given(cases(), st.sampled_from([0, 2, 4, [4, 0, 2]]))
def test_slots_are_those_of_the_account(case, ratio):
    config, options = case
    assume(options["lossless"] == "windows")
    plan = make_plan(config, ratio, **options)
    before = options["before"] or History.empty()
    tokens = np.concatenate([before.pending, np.arange(options["length"])])
    after = before.feed(Law.of(config), plan.ratios, tokens)
    row = Row(config, options["length"], 0, options["before"])
    number = np.minimum(row.first + np.arange(row.count), len(plan.ratios) - 1)
    slots = row.slots(row.applied(plan.ratios[number]))
    assert slots[row.text // W] == after.slots


@quiet
@settings(deadline=None)
@given(cases(), st.data())
def test_a_budget_is_never_exceeded_and_holds_from_the_smallest_on(case, data):
    config, options = case
    smallest, plenty = budgets(config, options)
    slots = data.draw(st.integers(smallest, max(plenty, smallest) + 4))
    plan = make_plan(config, max_slots=slots, **options)
    before = options["before"] or History.empty()
    length, new = options["length"], options["new_tokens"]
    _, held = entries_by_token(config, plan, length, new, before)
    assert max(held) <= slots
    if smallest > 1:
        with pytest.raises(ValueError, match=rf"smallest.* max_slots={smallest} "):
            make_plan(config, max_slots=smallest - 1, **options)


@quiet
@settings(deadline=None)
@given(cases(), st.data())
def test_a_larger_budget_raises_the_ratio_of_no_window(case, data):
    config, options = case
    smallest, plenty = budgets(config, options)
    sizes = st.integers(smallest, max(plenty, smallest) + 4)
    few, many = sorted([data.draw(sizes), data.draw(sizes)])
    tight, loose = (make_plan(config, max_slots=n, **options) for n in (few, many))
    assert (loose.ratios <= tight.ratios).all()
    assert np.array_equal(loose.ratios == 0, tight.ratios == 0)


@quiet
@settings(deadline=None)
@given(cases(), st.data())
def test_what_a_budget_has_left_goes_to_the_latest_windows(case, data):
    config, options = case
    smallest, plenty = budgets(config, options)
    slots = data.draw(st.integers(smallest, max(plenty, smallest) + 4))
    plan = make_plan(config, max_slots=slots, **options)
    row = Row(config, options["length"], options["new_tokens"], options["before"])
    row.with_spans(options["spans"], options["lossless"])
    ratios = plan.ratios[row.first :][: row.count]
    free = ~row.lossless
    free[0] &= row.fixed is None
    chosen = ratios[free]
    assert (chosen > 0).all() and (np.diff(chosen) <= 0).all()
    assert len(set(chosen.tolist())) <= 2
    # One step more does not fit: the budget is used up.
    higher = np.flatnonzero(free & (ratios == chosen.max(initial=0)))
    ladder = sorted({*config.beacon.ratios, 8} - {0})
    step = ladder.index(chosen.max()) if len(chosen) else 0
    if step and len(higher):
        more = ratios.copy()
        more[higher[-1]] = ladder[step - 1]
        assert row.held(more) > slots


@quiet
@settings(deadline=None)
@given(cases(), st.sampled_from([1, 2, 8, [4, 0, 2], "auto", "auto-8", "budget"]))
def test_span_tokens_are_uncompressed_or_kept(case, ratio):
    config, options = case
    if ratio == "budget":
        options["max_slots"], ratio = budgets(config, options)[0], None
    plan = make_plan(config, ratio, **options)
    before = options["before"] or History.empty()
    start = int(before.marks[-1, 0])
    for a, b in options["spans"]:
        for token in range(before.length + a, before.length + b):
            number, offset = divmod(token - start, W)
            number += before.windows
            assert plan.ratios[number] == 0 or offset in plan.keep[number]
            assert options["lossless"] == "slots" or not plan.keep
            assert number in plan.keep or plan.ratios[number] == 0
    for offsets in plan.keep.values():
        assert (np.diff(offsets) > 0).all()
    assert bool(options["spans"]) == ("lossless: " in plan.note)


@settings(deadline=None)
@given(st.data())
def test_rows_of_a_group_have_equal_ratios_in_every_step_both_have(data):
    rows = data.draw(st.integers(1, 8))
    lists = st.lists(st.sampled_from([0, 2, 4]), min_size=1, max_size=5)
    plans, lengths, before = [], [], []
    for _ in range(rows):
        account = fed(data.draw(lists), data.draw(st.integers(0, 30)))
        length = data.draw(st.integers(0, 30))
        before.append(account)
        lengths.append(length)
        ratio = data.draw(lists)
        plans.append(make_plan(CONFIG, ratio, length=length, before=account))
    groups = group_rows(CONFIG, plans, lengths, before)
    assert sorted(i for group in groups for i in group) == list(range(rows))
    assert groups == sorted(sorted(group) for group in groups)

    def steps(i):
        total = before[i].raw + lengths[i]
        ratios = plans[i].ratios
        out = [
            ratios[min(before[i].windows + s, len(ratios) - 1)]
            for s in range(-(-total // W))
        ]
        return ([before[i].ratio, *out[1:]] if before[i].raw else out)[: len(out)]

    agree = lambda i, j: all(a == b for a, b in zip(steps(i), steps(j), strict=False))
    for group in groups:
        assert all(agree(i, j) for i in group for j in group)
    # As few as possible: the longest rows of two groups never agree.
    longest = [max(group, key=lambda i: len(steps(i))) for group in groups]
    assert not any(agree(i, j) for i in longest for j in longest if i != j)


def test_rows_with_equal_prefixes_share_a_group_and_others_do_not():
    plan = lambda *ratios: Plan(np.array(ratios, np.int32))
    plans = [plan(4), plan(4, 2), plan(4, 4), plan(2), plan(4, 2)]
    lengths = [8, 16, 16, 5, 30]
    assert group_rows(CONFIG, plans, lengths) == [[0, 1, 4], [2], [3]]
    # An open window goes on at its own ratio, whatever the plan says.
    opened = [fed([2], 3), fed([4], 3)]
    assert group_rows(CONFIG, [plan(4), plan(4)], [9, 9], opened) == [[0], [1]]
    assert group_rows(CONFIG, [plan(2), plan(2)], [0, 0]) == [[0, 1]]


def test_plans_of_different_length_are_stacked_with_the_last_ratio_going_on():
    plans = [make_plan(CONFIG, [4, 2], length=n) for n in (8, 40)]
    assert stack_ratios(plans).tolist() == [[4] * 8, [4, 2, 2, 2, 2, 2, 2, 2]]


@pytest.mark.parametrize(
    ("slots", "ratios", "note"),
    [
        # 12 windows of 8: 48 slots at x2, 24 at x4; each window at x2 costs 2 more.
        (48, [2] * 12, "budget of 48 slots: x2"),
        (47, [4] + [2] * 11, "budget of 47 slots: x4, the last 11 windows x2"),
        (31, [4] * 9 + [2] * 3, "budget of 31 slots: x4, the last 3 windows x2"),
        (26, [4] * 11 + [2], "budget of 26 slots: x4, the last window x2"),
        (24, [4] * 12, "budget of 24 slots: x4"),
    ],
)
def test_budgets_by_hand(slots, ratios, note):
    plan = make_plan(CONFIG, max_slots=slots, length=96)
    assert plan.ratios[:12].tolist() == ratios and len(plan.ratios) == 16
    assert plan.note == note


def test_a_ratio_that_was_not_trained_is_taken_last_and_warned_about():
    with pytest.warns(UserWarning, match=r"of 2, 4 fits, x8.* max_slots=24 allows x4"):
        plan = make_plan(CONFIG, max_slots=23, length=96)
    assert plan.ratios[:12].tolist() == [8] + [4] * 11


def test_the_open_window_and_the_new_tokens_need_room():
    # One full window at x4 leaves 2 slots; 3 tokens behind it have no beacon yet.
    assert make_plan(CONFIG, max_slots=5, length=11).ratios[0] == 4
    # A window that fills while decoding holds 8 tokens and 2 beacons at x4.
    error = r"max_slots=9 is too small.*max_slots=10 \(x8 is the largest ratio\)"
    with pytest.raises(ValueError, match=error):
        make_plan(CONFIG, max_slots=9, length=11, new_tokens=5)
    assert make_plan(CONFIG, max_slots=12, length=11, new_tokens=5).ratios[0] == 4


def test_bytes_are_slots_of_the_size_given():
    options = {"length": 96, "slot_nbytes": 1024}
    plan = make_plan(CONFIG, max_bytes="31KiB", **options)
    assert plan.note.startswith(
        "budget of 31 slots (max_bytes='31KiB'): x4, the last 3"
    )
    # At half the bytes per slot twice as many fit.
    options["slot_nbytes"] = 512
    assert (make_plan(CONFIG, max_bytes="31KiB", **options).ratios == 2).all()
    both = make_plan(CONFIG, max_bytes="31KiB", max_slots=24, **options)
    assert both.note == "budget of 24 slots: x4"
    error = r"max_bytes='5kB' \(9 slots\).*max_bytes=6144 \(12 slots, 0\.006 MiB\)"
    with pytest.raises(ValueError, match=error):
        make_plan(CONFIG, max_bytes="5kB", **options)
    with pytest.raises(ValueError, match="needs slot_nbytes"):
        make_plan(CONFIG, max_bytes="5kB", length=96)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        (" 7 kb ", 7000),
        ("1TiB", 2**40),
        ("64B", 64),
    ],
)
def test_sizes_in_bytes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "12 parsecs", "MiB", "-1", "1iB", "5M", "1e9", -3]
)
def test_other_sizes_are_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"max_bytes=.*'512MiB', '2GB', '1\.5 GiB'"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="at least one byte"):
        parse_bytes("0MiB")


def test_slots_of_a_memory_count_against_the_budget_and_stay():
    before = fed([2], 30)  # 3 windows of 4 slots, 6 tokens with 3 beacons
    options = {"length": 26, "before": before}  # the open window and 3 more
    plan = make_plan(CONFIG, max_slots=12 + 4 + 3 * 2 + 2, **options)
    assert plan.ratios[3:7].tolist() == [2, 4, 4, 2]
    error = r"smallest that works is max_slots=19 .*the memory has 12 slots already"
    with pytest.raises(ValueError, match=error):
        make_plan(CONFIG, max_slots=18, **options)


def test_lossless_windows_are_paid_first():
    options = {"length": 96, "spans": [(15, 17), (40, 41)]}  # windows 1, 2 and 5
    plan = make_plan(CONFIG, max_slots=3 * 8 + 9 * 2 + 5, **options)
    expected = [4, 0, 0, 4, 4, 0, 4, 4, 4, 4, 2, 2]
    assert plan.ratios[:12].tolist() == expected
    # 12 windows at x4, two of them x2: 28 slots; 3 x (8 - 2) more.
    cost = "lossless: 3 of 12 windows uncompressed, 18 slots more (+64 %)"
    assert plan.note == f"budget of 47 slots: x4, the last 2 windows x2; {cost}"
    error = r"max_slots=23 is too .*max_slots=33 .*3 lossless windows take 24\)"
    with pytest.raises(ValueError, match=error):
        make_plan(CONFIG, max_slots=23, **options)


def test_lossless_slots_keep_the_entries_of_the_span():
    options = {"length": 96, "spans": [(15, 17), (40, 42)], "lossless": "slots"}
    plan = make_plan(CONFIG, 4, **options)
    assert (plan.ratios == 4).all()
    assert {w: at.tolist() for w, at in plan.keep.items()} == {
        1: [7],
        2: [0],
        5: [0, 1],
    }
    cost = "lossless: 4 tokens in 3 of 12 windows kept, 4 slots more (+17 %)"
    assert plan.note == cost
    assert make_plan(CONFIG, max_slots=28, **options).note == (
        f"budget of 28 slots: x4; {cost}"
    )
    # A window that is not compressed keeps everything anyway.
    assert set(make_plan(CONFIG, [4, 0, 4], **options).keep) == {2, 5}


def test_spans_count_from_the_new_text_and_cannot_change_a_window_begun():
    before = fed([4], 13)  # 5 tokens of window 1
    plan = make_plan(CONFIG, length=20, before=before, spans=[(3, 5)])
    assert plan.ratios[:5].tolist() == [4, 4, 0, 4, 4]
    error = r"tokens 8 to 16 .*begun at ratio 4.*memory\.truncate\(8\)"
    with pytest.raises(ValueError, match=error):
        make_plan(CONFIG, length=20, before=before, spans=[(2, 4)])
    again = make_plan(CONFIG, length=25, before=before.cut(8), spans=[(7, 9)])
    assert again.ratios[1:5].tolist() == [0, 0, 4, 4]
    kept = make_plan(CONFIG, length=20, before=before, spans=[(2, 4)], lossless="slots")
    assert {w: at.tolist() for w, at in kept.keep.items()} == {1: [7], 2: [0]}


def test_a_memory_goes_on_with_the_last_ratio_that_compressed():
    options = {"length": 8}
    own = lambda before: make_plan(CONFIG, before=before, **options).ratios[-1]
    assert own(fed([2, 4], 16)) == own(fed([2, 4], 12)) == 4
    assert own(fed([4, 0], 16)) == own(fed([4, 0], 12)) == 4  # 0: it was lossless
    assert own(fed([0], 16)) == own(fed([0], 3)) == 0
    assert own(fed([4], 20).cut(13)) == 4
    assert own(fed([4], 20).cut(5)) == 4  # 5 pending tokens that were at x4
    drawn = plan_ratios(CONFIG, None, length=13, seed=5)
    new = make_plan(CONFIG, before=History.empty(), length=13, seed=5)
    assert new.ratios.tolist() == drawn.tolist()


def test_a_callable_gets_the_windows_of_the_row_with_their_tokens():
    calls = []

    def ratio(window, start, stop):
        calls.append((window, start, stop))
        return 2 if window % 2 else 4

    plan = make_plan(CONFIG, ratio, length=14, before=fed([8], 16))
    assert calls == [(2, 16, 24), (3, 24, 32)]
    assert plan.ratios.tolist() == [4, 4, 4, 2]
    with pytest.raises(ValueError, match="ratio=3 does not divide window=8"):
        make_plan(CONFIG, lambda *_: 3, length=9)
    with pytest.raises(ValueError, match=r"ratio=2\.5 is no whole number: use one of"):
        make_plan(CONFIG, lambda *_: 2.5, length=3)


def test_no_ratio_takes_the_mix_of_the_config_by_seed():
    plans = [plan_ratios(CONFIG, None, length=256, seed=s) for s in (0, 0, 1)]
    assert plans[0].tolist() == plans[1].tolist() != plans[2].tolist()
    assert set(plans[0].tolist()) == {2, 4}


BIG = dataclasses.replace(
    CONFIG,
    hidden_size=64,
    intermediate_size=64,
    head_dim=32,
    max_position=8192,
    beacon=BeaconConfig(window=64, ratios=(2, 4, 8)),
)


def test_auto_takes_what_the_flop_formula_says():
    breaks = flops.break_even(BIG, 2)
    assert breaks is not None and 640 < breaks < 8192
    for length in (640, breaks - 64, breaks):
        plan = make_plan(BIG, "auto", length=length)
        ours = flops.prefill(BIG, length, 2).total
        full = flops.full_attention(BIG, length).total
        assert (plan.ratios == (2 if ours <= full else 0)).all()
        row = Row(BIG, length, 0, None)
        assert row.flops(row.uniform(2)) == ours
        assert row.flops(row.uniform(0)) == full
    note = make_plan(BIG, "auto", length=640).note
    assert note.startswith("auto: uncompressed, 0.") or "against" in note


def test_auto_n_is_that_ratio_or_none():
    breaks = flops.break_even(BIG, 8)
    assert breaks is not None and breaks > 128
    assert (make_plan(BIG, "auto-8", length=breaks).ratios == 8).all()
    short = make_plan(BIG, "auto-8", length=breaks - 64)
    assert (short.ratios == 0).all()
    assert short.note.startswith("auto-8: uncompressed, ") and "at x8" in short.note
    # No ratio given never means no compression.
    assert (make_plan(BIG, None, length=64).ratios > 0).all()


def test_auto_stays_within_the_trained_positions_if_it_can():
    config = dataclasses.replace(BIG, max_position=400)
    plan = make_plan(config, "auto", length=640)
    # x2: 9 windows of 32 slots, then 64 tokens and 32 beacons.
    assert positions(config, np.array([2]), 640) == 9 * 32 + 96
    assert (plan.ratios == 2).all()
    assert "which takes 640 positions of the 400 trained" in plan.note
    assert (make_plan(config, "auto", length=700).ratios == 4).all()
    assert (make_plan(config, "auto", length=640, new_tokens=60).ratios == 4).all()
    assert (make_plan(config, "auto", length=6400).ratios == 8).all()
    zero = dataclasses.replace(
        config, beacon=dataclasses.replace(config.beacon, ratios=(0, 2, 4))
    )
    assert make_plan(zero, "auto", length=400).note == (
        "auto: uncompressed, 400 of 400 positions"
    )
    assert (make_plan(zero, "auto", length=401).ratios == 2).all()


def test_auto_counts_the_flops_behind_a_memory():
    before = fed([2], 64 * 20 + 5, BIG)
    row = Row(BIG, 300, 0, before)
    expected, slots = 0, before.slots
    for raw, ratio in ((64, 2), (64, 8), (64, 8), (64, 8), (49, 8)):
        expected += flops.window(BIG, ratio, slots, raw=raw).total
        slots += 64 // ratio
    head = flops.full_attention(BIG, 0).lm_head
    assert row.flops(row.applied(row.uniform(8))) == expected + head


def test_a_plain_model_is_never_compressed():
    assert (make_plan(PLAIN, None, length=900).ratios == 0).all()
    note = make_plan(PLAIN, "auto", length=90).note
    assert note == "auto: uncompressed, 90 of 256 positions"
    assert make_plan(PLAIN, max_slots=90, length=90).note == (
        "budget of 90 slots: uncompressed"
    )
    error = r"max_slots=90 is too .* max_slots=91 \(the model has no beacons"
    with pytest.raises(ValueError, match=error):
        make_plan(PLAIN, max_slots=90, length=91)
    with pytest.raises(ValueError, match="this model has none"):
        make_plan(PLAIN, "auto-8", length=9)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ratio": "most"}, "ratio='most' must be a number"),
        ({"ratio": "auto-0"}, "ratio='auto-0' must be"),
        ({"ratio": "auto-3"}, "ratio=3 does not divide window=8"),
        ({"ratio": 2.5}, r"ratio=\[2\.5\] must be of whole numbers"),
        ({"ratio": []}, r"ratios=\[\] is empty"),
        ({"ratio": [2, 3]}, "ratio=3 does not divide window=8"),
        ({"ratio": 4, "max_slots": 40}, "ratio=4 together with max_slots"),
        (
            {"ratio": "auto", "max_bytes": 9, "slot_nbytes": 3},
            "ratio='auto' together with",
        ),
        ({"max_slots": 0}, "max_slots=0 must be at least 1: give a number of slots"),
        (
            {"lossless": "beacons"},
            "lossless='beacons' is unknown: use windows or slots",
        ),
        ({"spans": [(3, 3)]}, r"spans has \(3, 3\).*the 20 tokens"),
        ({"spans": [(18, 21)]}, r"spans has \(18, 21\)"),
        ({"spans": [(-1, 3)]}, r"spans has \(-1, 3\)"),
        ({"spans": [1, 2]}, r"spans=\[1, 2\] must be token ranges"),
        ({"spans": r"\d+"}, r"spans=.* must be token ranges"),
        ({"length": -1}, "length=-1"),
    ],
)
def test_bad_arguments_are_named(options, error):
    with pytest.raises(ValueError, match=error):
        make_plan(CONFIG, **{"length": 20, **options})


def test_positions_follow_the_windows():
    # Two windows of 8 compressed to 4 slots each, then 7 tokens with 3 beacons.
    assert positions(CONFIG, np.array([2, 2, 2]), 23) == 4 + 4 + 7 + 3
    assert positions(CONFIG, np.array([0]), 21) == 21
    # One window: 8 tokens and its 4 beacons are more than the 4 slots that stay.
    assert positions(CONFIG, np.array([2]), 8) == 12
    # Mixed ratios, the last going on.
    assert positions(CONFIG, np.array([4, 0, 2]), 31) == 2 + 8 + 4 + 7 + 3
    # Beacons appended are there in full windows only, the second one here.
    assert positions(with_beacon(placement="append"), np.array([2]), 23) == 4 + 8 + 4
    # Behind a memory its slots count, whatever its windows were: 13 slots, 2 windows
    # of 8 tokens as mounted, 3 tokens open at x2.
    mounted = dataclasses.replace(
        fed([4, 4, 2], 19),
        spans=np.zeros((13, 2), np.int32),
        marks=np.array([[0, 0], [8, 5], [16, 13]], np.int32),
    )
    assert positions(CONFIG, np.array([4]), 5, mounted) == 13 + 8 + 4
    assert positions(CONFIG, np.array([4]), 7, mounted) == 13 + 8 + 4
    assert positions(CONFIG, np.array([4]), 13, mounted) == 13 + 4 + 8 + 2


def test_the_ratio_that_fits_counts_what_is_there_already():
    config = dataclasses.replace(CONFIG, max_position=40)
    assert fitting_ratio(config, 100) == 4
    assert fitting_ratio(config, 60, fed([2], 40)) == 8
    assert fitting_ratio(config, 60, fed([0], 40)) is None
    assert fitting_ratio(dataclasses.replace(PLAIN, max_position=40), 100) is None


def test_beyond_the_trained_positions_it_warns_once_with_the_ratio_that_fits():
    # Another vocabulary: a model that no other test has warned about.
    config = dataclasses.replace(CONFIG, max_position=40, vocab_size=65)
    plan = make_plan(config, 2, length=100)
    message = r"100 tokens take 56 positions.*trained for 40.*ratio=4 would fit"
    with pytest.warns(UserWarning, match=message):
        warn_beyond_training(config, plan, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_beyond_training(config, plan, 100)
    other = dataclasses.replace(config, vocab_size=66)
    with pytest.warns(UserWarning, match=r"100 tokens take .*ratio=8 would fit"):
        warn_beyond_training(other, plan, 60, fed([2], 40))


def test_a_plan_within_the_trained_positions_does_not_warn():
    config = dataclasses.replace(CONFIG, max_position=40, vocab_size=67)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_beyond_training(config, make_plan(config, 4, length=100), 100)


def test_slot_bytes_of_a_memory_make_a_budget_of_bytes():
    state = init_memory(CONFIG, 1, 16)
    # 2 layers, keys and values, 1 head of 8 in float32.
    assert state.slot_nbytes == 2 * 2 * 8 * 4
    plan = make_plan(CONFIG, max_bytes="4KiB", slot_nbytes=state.slot_nbytes, length=96)
    assert plan.note.startswith("budget of 32 slots")


def test_a_buffer_of_the_budget_and_a_window_at_work_is_enough():
    plan = make_plan(CONFIG, max_slots=31, length=96)
    assert capacity(CONFIG, plan.ratios[:12]) == 30 + W + W // 2
