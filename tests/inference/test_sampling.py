"""Greedy, temperature, top-k, top-p, min-p, repetition penalty, seeds per row."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beacon_jax.inference.sampling import (
    make_sampling,
    penalize,
    row_keys,
    row_seeds,
    seen_tokens,
)
from beacon_jax.inference.sampling import sample as sample_eagerly

PROBABILITIES = np.float32([0.05, 0.4, 0.3, 0.2, 0.05])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))
DRAWS = 4000  # of one token: the standard error is below 0.008, and 0.03 is four of it


# As the decoding loop runs it; eagerly each call would compile its branches anew.
sample = jax.jit(sample_eagerly)


@jax.jit
def _keys(seeds, number):
    return row_keys(seeds, number)


def keys(seed: int | list[int], rows: int, number: int = 0) -> Any:
    return _keys(row_seeds(seed, rows), number)


def frequencies(seed: int = 0, **options: Any) -> np.ndarray:
    rows = jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS)))
    tokens = sample(keys(seed, DRAWS), rows, make_sampling(**options))
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS)) / DRAWS


def allowed(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    """The probabilities that the settings leave, float64, one row, step by step."""
    x = np.asarray(logits, np.float64) / temperature
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    left = sorted(range(len(p)), key=lambda i: (-x[i], i))
    if top_k:
        left = left[:top_k]
    if top_p < 1:
        total, mass, kept = sum(p[i] for i in left), 0.0, []
        for i in left:
            if mass >= top_p:
                break
            kept.append(i)
            mass += p[i] / total
        left = kept
    left = [i for i in left if p[i] >= min_p * p.max()]
    result = np.zeros_like(p)
    result[left] = p[left] / p[left].sum()
    return result


def test_temperature_0_takes_the_most_likely_token_whatever_the_seed():
    for seed in range(3):
        assert frequencies(seed)[1] == 1


def test_temperature_1_draws_with_the_model_s_probabilities():
    np.testing.assert_allclose(frequencies(temperature=1.0), PROBABILITIES, atol=0.03)


def test_a_low_temperature_sharpens_by_the_power_of_its_inverse():
    expected = PROBABILITIES**2 / np.sum(PROBABILITIES**2)
    np.testing.assert_allclose(frequencies(temperature=0.5), expected, atol=0.03)


def test_top_k_draws_from_the_k_most_likely_only():
    expected = np.float32([0, 4 / 7, 3 / 7, 0, 0])
    np.testing.assert_allclose(
        frequencies(temperature=1.0, top_k=2), expected, atol=0.03
    )


@pytest.mark.parametrize(("p", "kept"), [(0.01, 1), (0.39, 1), (0.69, 2), (0.71, 3)])
def test_top_p_keeps_the_fewest_tokens_that_reach_p(p, kept):
    found = np.flatnonzero(frequencies(temperature=1.0, top_p=p))
    assert set(found) == set(np.argsort(-PROBABILITIES)[:kept])


def test_top_p_counts_the_probabilities_that_top_k_leaves():
    # After top_k=2 the first token has 4/7 = 0.57 of the mass, which reaches 0.5.
    found = frequencies(temperature=1.0, top_k=2, top_p=0.5)
    assert found[1] == 1


@pytest.mark.parametrize(
    ("p", "kept"), [(0, 5), (0.12, 5), (0.13, 3), (0.51, 2), (0.76, 1), (1, 1)]
)
def test_min_p_keeps_the_tokens_not_much_less_likely_than_the_first(p, kept):
    # The probabilities over the largest, 0.4: 1, 0.75, 0.5, 0.125, 0.125.
    found = np.flatnonzero(frequencies(temperature=1.0, min_p=p))
    assert set(found) == set(np.argsort(-PROBABILITIES)[:kept])


def test_min_p_compares_at_the_temperature():
    # At temperature 0.5 the second token is (3/4)^2 = 0.56 times as likely, below 0.6.
    assert frequencies(temperature=0.5, min_p=0.6)[1] == 1
    assert frequencies(temperature=1.0, min_p=0.6)[2] > 0


def test_top_p_counts_what_min_p_takes_away():
    # top_p=0.75 of all: 0.4, 0.3, 0.2. Had min_p=0.7 come first, 0.4/0.7 + 0.3/0.7
    # would have kept the same two; 0.56 shows the order: 0.4 + 0.3 of all tokens are
    # needed, but 0.4/0.7 = 0.571 alone would do.
    found = np.flatnonzero(frequencies(temperature=1.0, top_p=0.56, min_p=0.7))
    assert set(found) == {1, 2}


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 1),
)
def test_only_what_a_plain_loop_over_the_rules_leaves_is_drawn(
    seed, temperature, top_k, top_p, min_p
):
    logits = np.random.default_rng(seed).normal(size=9).astype(np.float32) * 2
    expected = allowed(logits, temperature, top_k, top_p, min_p)
    rows = jnp.broadcast_to(jnp.asarray(logits), (256, 9))
    tokens = sample(
        keys(seed, 256), rows, make_sampling(temperature, top_k, top_p, min_p)
    )
    counts = np.bincount(np.asarray(tokens), minlength=9)
    # float32 may place a token on the other side of a bound that it lies on.
    near = allowed(logits, temperature, top_k, min(top_p + 1e-5, 1), min_p - 1e-5)
    assert (counts[near == 0] == 0).all()
    # A token of 10 % and more is missing from 256 draws once in 5e11.
    sure = allowed(logits, temperature, top_k, top_p - 1e-5, min_p + 1e-5)
    assert (counts[(sure >= 0.1) & (expected >= 0.1)] > 0).all()
    # Five standard errors of 256 draws.
    assert np.abs(counts / 256 - expected).max() < 0.16


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = jnp.asarray([[2.0, -2.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]])
    seen = seen_tokens([[0, 1], []], 4)
    found = penalize(logits, make_sampling(repetition_penalty=2.0), jnp.asarray(seen))
    assert found.tolist() == [[1.0, -4.0, 1.0, -1.0], [2.0, -2.0, 1.0, -1.0]]


def test_a_penalty_turns_the_greedy_choice_away_from_what_was_seen():
    logits = jnp.asarray([[3.0, 2.0, -1.0]] * 2)
    seen = jnp.asarray(seen_tokens([[0], [2]], 3))
    found = sample(keys(0, 2), logits, make_sampling(repetition_penalty=2.0), seen)
    assert found.tolist() == [1, 0]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    rows = jnp.broadcast_to(LOGITS, (64, 5))
    options = make_sampling(temperature=1.0)
    first, again, other = (
        np.asarray(sample(keys(seed, 64), rows, options)) for seed in (1, 1, 1000)
    )
    assert (first == again).all() and (first != other).any()


def test_a_row_draws_the_same_alone_and_in_any_batch():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(8, 50)), jnp.float32)
    temperature, top_k = [0, 1, 2, 1, 0.5, 1, 0, 3], [0, 0, 5, 2, 0, 9, 0, 0]
    top_p, min_p = [1, 1, 1, 0.5, 1, 0.9, 0.1, 1], [0, 0, 0, 0, 0.2, 0, 0, 0.05]
    seeds = [5, 5, 7, 1, 0, 2**32 - 1, 9, 3]
    for number in range(6):
        whole = sample(
            keys(seeds, 8, number),
            logits,
            make_sampling(temperature, top_k, top_p, min_p),
        )
        for i in range(8):
            alone = sample(
                keys(seeds[i], 1, number),
                logits[i : i + 1],
                make_sampling(temperature[i], top_k[i], top_p[i], min_p[i]),
            )
            assert int(alone[0]) == int(whole[i])


def test_the_draws_of_one_row_differ_from_token_to_token():
    rows = LOGITS[None]
    options = make_sampling(temperature=1.0)
    drawn = {int(sample(keys(0, 1, n), rows, options)[0]) for n in range(40)}
    assert len(drawn) >= 4


def test_one_seed_gives_rows_that_differ_and_each_can_be_drawn_alone():
    assert row_seeds(7, 3).tolist() == [7, 8, 9]
    assert row_seeds([7, 7, 1], 3).tolist() == [7, 7, 1]
    assert row_seeds(2**32 - 1, 2).tolist() == [2**32 - 1, 0]


def test_one_compile_serves_every_setting():
    traces = []

    @jax.jit
    def pick(keys, logits, sampling):
        traces.append(1)
        return sample_eagerly(keys, logits, sampling)

    for options in (
        {},
        {"temperature": 0.7},
        {"temperature": 1, "top_k": 3},
        {"top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.3},
        {"temperature": [1, 0]},
    ):
        sampling = make_sampling(**options).for_rows(2)
        pick(keys(0, 2), jnp.stack([LOGITS, LOGITS]), sampling)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_sampling(**{name: value})
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_sampling(**{name: [1, value]})


@pytest.mark.parametrize("seed", [-1, 2**32, [1, -1]])
def test_a_seed_that_is_no_32_bit_word_is_refused(seed):
    with pytest.raises(ValueError, match="seed=.*must be between 0 and 4294967295"):
        row_seeds(seed, 2)


def test_seeds_for_another_number_of_rows_are_refused():
    with pytest.raises(ValueError, match=r"seed has shape \(3,\) for 2 rows"):
        row_seeds([1, 2, 3], 2)
