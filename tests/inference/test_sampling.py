"""Greedy, temperature, top-k, top-p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.inference.sampling import make_sampling, sample

PROBABILITIES = np.float32([0.05, 0.4, 0.3, 0.2, 0.05])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES))


def frequencies(draws: int = 4000, seed: int = 0, **settings: float) -> np.ndarray:
    rows = jnp.broadcast_to(LOGITS, (draws, len(LOGITS)))
    tokens = sample(jax.random.key(seed), rows, make_sampling(**settings))
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS)) / draws


def test_temperature_0_takes_the_most_likely_token_whatever_the_key():
    for seed in range(3):
        assert frequencies(50, seed)[1] == 1


def test_temperature_1_draws_with_the_model_s_probabilities():
    # 4000 draws: the standard error is below 0.008, and 0.03 is four of them.
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


def test_the_same_key_draws_the_same_tokens_and_another_key_others():
    rows = jnp.broadcast_to(LOGITS, (64, 5))
    settings = make_sampling(temperature=1.0)
    first, again, other = (
        np.asarray(sample(jax.random.key(seed), rows, settings)) for seed in (1, 1, 2)
    )
    assert (first == again).all() and (first != other).any()


def test_one_compile_serves_every_setting():
    traces = []

    @jax.jit
    def pick(key, logits, sampling):
        traces.append(1)
        return sample(key, logits, sampling)

    for settings in ({}, {"temperature": 0.7}, {"temperature": 1, "top_k": 3}):
        pick(jax.random.key(0), LOGITS[None], make_sampling(**settings))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make_sampling(**{name: value})
