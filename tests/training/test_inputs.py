"""Inputs of a step: aligned rows, plans of their windows, the same from anywhere."""

import numpy as np
import pytest

from beacon_jax.data.grouped import GroupConfig, GroupedBatches
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.training.config import default_config
from beacon_jax.training.inputs import Inputs, draw_plans
from tests.data.test_grouped import Folder
from tests.training.test_trainer import SMALL

W, RATIOS = 8, (0, 2, 4)
MODEL = ModelConfig(**SMALL, beacon=BeaconConfig(W, RATIOS))


def make(group="pad", batch_size=4, **options):
    lengths = np.random.default_rng(2).integers(1, 60, 111)
    config = GroupConfig(W, batch_size, group, seed=5, **options)
    return GroupedBatches(Folder(lengths), config)


def inputs_of(batches, rows=None):
    return Inputs(default_config(), MODEL, batches, 2, rows)


def same(one, other):
    assert one.batch.keys() == other.batch.keys()
    for name, value in one.batch.items():
        assert value.tobytes() == other.batch[name].tobytes()
    assert one.plans.tobytes() == other.plans.tobytes()
    return one[2:] == other[2:]


def test_rows_end_together_and_hold_what_the_batch_holds():
    batches = make()
    longest = -(-batches.longest // W)
    for step in range(batches.steps):
        given, raw = inputs_of(batches)[step], batches.batch(step)
        assert given.batch["tokens"].shape == (longest, 4, W)
        assert given.tokens == raw["lengths"].sum() == given.batch["valid"].sum()
        for row, n in enumerate(raw["lengths"]):
            valid = given.batch["valid"][:, row]
            assert valid.sum() == n and (valid[-1] > 0) == (n > 0)
            live = np.arange(W) < valid[:, None]
            for name in ("tokens", "labels"):
                cut = given.batch[name][:, row][live]
                np.testing.assert_array_equal(cut, raw[name][row, :n])
            assert (given.batch["labels"][:, row][~live] == -100).all()


def test_a_plan_is_that_of_the_steps_longest_row_and_suits_all_of_them():
    batches = make(epochs=4)
    zeros = 0
    for step in range(batches.steps):
        plans = draw_plans(default_config(), MODEL, batches, step, 2)
        lengths = batches.lengths(step)
        assert len(plans) == -(-lengths.max() // W)
        for plan in plans.T:
            assert set(plan) <= set(RATIOS) and (plan == 0).sum() <= 1
            for n in lengths[lengths > 0]:
                own = plan[len(plan) - -(-n // W) :]
                (at,) = np.nonzero(own == 0)
                zeros += len(at)
                # docs/specification.md section 3: only while start + 2W <= T.
                assert all((i + 2) * W <= n for i in at)
    assert zeros > 50


@pytest.mark.parametrize("group", ["strict", "relaxed", "pad"])
def test_a_stream_that_resumes_at_any_of_50_steps_is_bit_identical(group):
    batches = make(group, epochs=4)
    whole = list(inputs_of(batches).ahead(0, batches.steps))
    assert len(whole) == batches.steps > 55
    for start in range(50):
        resumed = inputs_of(make(group, epochs=4)).ahead(start, batches.steps)
        for step in range(start, start + 4):
            assert same(next(resumed), whole[step])
        resumed.close()


def test_processes_see_the_same_plans_tokens_and_flops():
    batches = make()
    parts = [inputs_of(make(), rows) for rows in ([0, 1], [2, 3])]
    for step in range(batches.steps):
        whole = inputs_of(batches)[step]
        for rows, part in zip(([0, 1], [2, 3]), parts, strict=True):
            given = part[step]
            assert given[1].tobytes() == whole[1].tobytes() and given[2:] == whole[2:]
            np.testing.assert_array_equal(given.batch["valid"], whole.batch["valid"])
            for name in ("tokens", "labels"):
                mine, all_rows = given.batch[name][:, rows], whole.batch[name][:, rows]
                np.testing.assert_array_equal(mine, all_rows)


def test_an_error_in_the_loader_reaches_the_run():
    batches = make()
    read = batches.data.read

    def fail(index):
        if batches.data.reads.total() > 20:
            raise ValueError("example 3 is damaged")
        return read(index)

    batches.data.read = fail
    with pytest.raises(ValueError, match="example 3 is damaged"):
        list(inputs_of(batches).ahead(0, batches.steps))


def test_nothing_is_left_when_the_run_is_over():
    batches = make()
    assert list(inputs_of(batches).ahead(batches.steps, batches.steps)) == []
