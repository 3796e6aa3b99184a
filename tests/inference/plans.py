"""A tiny config, accounts of rows and random cases for the tests of plans."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from beacon_jax.core.law import Law
from beacon_jax.inference import plan as plans
from beacon_jax.inference.budget import Budget
from beacon_jax.inference.history import History
from beacon_jax.inference.plan import Plan
from beacon_jax.model.config import BeaconConfig
from tests.tiny import tiny

W = 8
CONFIG = tiny(
    vocab_size=64, num_heads=2, num_kv_heads=1, head_dim=8, eos_ids=(), bos_ids=()
)
PLAIN = dataclasses.replace(CONFIG, beacon=None)


def with_beacon(**changes):
    return dataclasses.replace(
        CONFIG, beacon=dataclasses.replace(CONFIG.beacon, **changes)
    )


def make_plan(
    config, ratio=None, max_slots=None, max_bytes=None, slot_nbytes=None, **options
) -> Plan:
    """The plan of what a user asks for."""
    budget = Budget.read(max_slots, max_bytes, slot_nbytes)
    return plans.make_plan(config, ratio, budget=budget, **options)


def fed(ratios, length, config=CONFIG, before=None):
    """An account after `length` more tokens."""
    before = before or History.empty()
    return before.feed(Law.of(config), np.asarray(ratios), np.arange(length))


def entries_by_token(config, plan, length, new, before):
    """Entries in the buffer after each token, the last ones of a window before they
    are compressed and after, in two lists: while reading and from its end on."""
    placement, sink = config.beacon.placement, config.beacon.sink
    slots, raw, window = before.slots, before.raw, before.windows
    ratio = before.ratio
    reading, held = [], []

    def entries():
        if not ratio or (placement == "append" and raw < W):
            return slots + raw
        return slots + raw + raw // ratio

    pending = before.length - before.fed
    for token in range(pending + length + new):
        if raw == 0:
            ratio = int(plan.ratios[min(window, len(plan.ratios) - 1)])
        raw += 1
        into = held if token >= pending + length else reading
        into.append(entries())
        if raw == W:
            kept = len(plan.keep.get(window, ()))
            grown = W // ratio + kept + (0 if slots else sink) if ratio else W
            slots, raw, window = slots + grown, 0, window + 1
        into.append(slots if raw == 0 else entries())
        if token == pending + length - 1:
            held.append(into[-1])
    return reading, held


beacons = st.builds(
    BeaconConfig,
    window=st.just(W),
    ratios=st.sampled_from([(2, 4), (4,), (2, 8), (0, 2, 4), (1, 2, 4, 8)]),
    sink=st.integers(0, 2),
    placement=st.sampled_from(["interleave", "append"]),
)
configs = st.builds(lambda b: dataclasses.replace(CONFIG, beacon=b), beacons)


@st.composite
def cases(draw, spans=True):
    """(config, arguments of make_plan without a ratio or budget)."""
    config = draw(configs)
    before = None
    if draw(st.booleans()):
        plan = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), min_size=1, max_size=4))
        before = fed(plan, draw(st.integers(0, 40)), config)
        if draw(st.booleans()):
            before = before.cut(draw(st.integers(0, before.length)))
    length = draw(st.integers(1, 90))
    options = {"length": length, "before": before}
    options["new_tokens"] = draw(st.integers(0, 20))
    if spans:
        start = st.integers(0, length - 1)
        found = draw(st.lists(st.tuples(start, st.integers(1, 12)), max_size=3))
        options["spans"] = [(a, min(a + n, length)) for a, n in found]
        options["lossless"] = draw(st.sampled_from(["windows", "slots"]))
        began = before is not None and before.raw and before.ratio
        into = W - before.raw if before is not None else 0
        if began and (options["lossless"] == "windows" or length < into):
            options["spans"] = [x for x in options["spans"] if x[0] >= into]
    return config, options
