"""How much of something fits into a prompt."""

import numpy as np
import pytest

from beacon_jax.evaluation.prompts import fit


def sizes(step):
    """Token counts that grow unevenly, sometimes not at all."""
    rng = np.random.default_rng(step)
    return np.cumsum(rng.integers(0, step + 1, 5000)) + 10


@pytest.mark.parametrize("step", [1, 2, 9])
@pytest.mark.parametrize("near", [0, 1, 7, 150, 400, 4000])
def test_the_largest_that_fits_is_found_from_any_guess(step, near):
    counts, asked = sizes(step), []

    def build(n):
        asked.append(n)
        return np.zeros(counts[n])

    for room in (int(counts[3]), 200, 345):
        asked.clear()
        found = fit(build, room, least=3, near=near)
        assert found >= 3 and counts[found] <= room < counts[found + 1]
        assert min(asked) >= 3 and len(asked) < 45


def test_a_good_guess_costs_a_few_prompts():
    counts, asked = sizes(9), []

    def build(n):
        asked.append(n)
        return np.zeros(counts[n])

    room = 12_000
    best = fit(build, room)
    asked.clear()
    assert fit(build, room, near=best + 5) == best and len(asked) <= 12


def test_nothing_that_fits_is_an_error_that_says_how_much_is_missing():
    with pytest.raises(ValueError, match="ruler 30 tokens.*needs 50: use at least 20"):
        fit(lambda n: np.zeros(50 + n), 30, name="ruler")
