"""The loss of attention to the memory, against tables of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.attention_loss import LEAST, choose, slot_ends
from beacon_jax.core.law import Law
from beacon_jax.core.step import count_slots
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.net import Net
from tests.core.dense import paid_to_slots
from tests.core.test_distil import (
    PLAN,
    N,
    W,
    batch,
    behind,
    close,
    config,
    counted,
    variables,
)

pytestmark = pytest.mark.optimized  # a tolerance of 1e-5
WEIGHT = 3.0


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def plain(net, rows, plan, kind, average, queries):
    """The loss as a function of the beacons: tables of attention, row by row."""
    c, v = net.config, variables()
    weights = counted(rows)
    if kind == "labels":
        live = np.arange(W) < rows["valid"][..., None]
        weights = rows["weights"] * (rows["labels"] != -100) * live
    total = (
        weights.sum((0, 2)) * weights.shape[1] if average == "row" else weights.sum()
    )
    weights = weights * behind(rows)
    kept = np.zeros_like(weights)
    at, _ = choose(jnp.asarray(weights), queries)
    np.put_along_axis(kept, np.asarray(at), 1.0, axis=2)
    weights = weights * kept / np.maximum(total, 1e-9)[..., None]
    ratios = np.append(plan[:-1], 0)

    def loss(beacon):
        total = 0.0
        for b in range(rows["tokens"].shape[1]):
            first = int(np.argmax(rows["valid"][:, b] > 0))
            tokens = rows["tokens"][first:, b].reshape(-1)
            own, e = paid_to_slots(c, {**v, "beacon": beacon}, tokens, ratios[first:])
            if not e.sources:
                continue
            whole = np.zeros(N - first, int)
            full, _ = paid_to_slots(c, v, tokens, whole)
            pad = jnp.pad(full, ((0, 0), (0, 0), (0, W)))  # the last is no slot
            taught = []
            for number, (start, end) in enumerate(e.sources):
                # A token that is a slot of its own, the sink, is no part of a unit.
                start = max(start, c.beacon.sink if e.beacon[e.kept[number]] else start)
                taught.append(pad[..., start:end].sum(-1))
            taught = jax.lax.stop_gradient(jnp.stack(taught, -1))
            each = -(taught * jnp.log(own + LEAST)).sum(-1).mean(0)
            total += (each * weights[first:, b].reshape(-1)).sum()
        return total

    return jax.jit(jax.value_and_grad(loss))(v["beacon"])


@pytest.mark.parametrize(
    "remat, kind, queries, plan, beacon, offload",
    [
        ("lean", "distil", 3, PLAN, {"sink": 1}, True),
        slow("lean", "labels", W, PLAN, {}, False),
        slow("lean-layer", "distil", W, (4, 4, 2, 2), {"sink": 3}, True),
        slow("none", "labels", 5, (4, 2, 2, 2), {"placement": "append"}, False),
        slow("window", "distil", 2, (2, 2, 4, 4), {"placement": "append"}, False),
        slow("layer", "labels", W, (2, 0, 4, 2), {"ratios": (0, 2, 4)}, False),
    ],
)
def test_value_and_gradients_are_those_of_tables(
    remat, kind, queries, plan, beacon, offload
):
    net, rows, plan = Net(config(**beacon)), batch(), np.asarray(plan, np.int32)
    v, average = variables(), "row" if remat == "lean-layer" else "token"

    def loss(own, weight):
        settings = LossConfig(
            kind,
            attention_weight=weight,
            attention_queries=queries,
            average=average,
            remat=remat,
            offload=offload,
        )
        value, aux = train_loss(net, own, v["params"], rows, plan, settings)
        return value, aux["attention_loss"]

    run = jax.value_and_grad(loss, has_aux=True)
    (with_it, found), gradients = run(v["beacon"], WEIGHT)
    (without, none), others = run(v["beacon"], 0.0)
    wanted, d_wanted = plain(net, rows, plan, kind, average, queries)
    assert none == 0 and found > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(with_it - without, WEIGHT * wanted, rtol=1e-5)
    both = jax.tree.map(lambda a, b: a + WEIGHT * b, others, d_wanted)
    close(gradients, both)


def test_of_equal_weights_places_far_from_each_other_are_chosen():
    at, weights = choose(jnp.ones((1, 2, 256)), 4)
    assert np.sort(at[0, 0]).tolist() == [0, 64, 128, 192]
    np.testing.assert_allclose(weights, 1.0)
    given = jnp.zeros((1, 1, 6)).at[0, 0, 3].set(5.0).at[0, 0, 1].set(1.0)
    at, weights = choose(given, 2)
    assert at[0, 0].tolist() == [3, 1]
    np.testing.assert_allclose(weights[0, 0], [5.0, 1.0])
    at, weights = choose(jnp.zeros((2, 1, 5)), 9)  # no more than there are
    assert sorted(at[0, 0].tolist()) == list(range(5)) and not weights.any()


def test_slots_end_where_their_tokens_do():
    law = Law(window=W, sink=1)
    plan = jnp.asarray([4, 2, 0, 0])
    closes = jnp.asarray([[True, False], [True, True], [True, True], [False, False]])
    slots, added = count_slots(law, plan, closes)
    ends = slot_ends(law, plan, slots, added, 16)
    first = [1, 4, 8, 10, 12, 14, 16, 17, 18, 19, 20, 21, 22, 23, 24, 24]
    assert ends[0].tolist() == first
    second = [1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 16, 16, 16]
    assert ends[1].tolist() == second
