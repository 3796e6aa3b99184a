"""Logits that are no numbers are an error, not the end of a text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.evaluation.likelihood import Pair, score

SAID = "are not finite: its weights, or the memory that it reads, are damaged"


@pytest.fixture(scope="module")
def broken(model):
    """The model with NaN in the embedding of "d"."""
    variables = jax.tree.map(lambda x: x, model.variables)
    embed, (token,) = variables["params"]["embed"], model.tokenizer("d").input_ids
    embed["embedding"] = embed["embedding"].at[token, 3].set(jnp.nan)
    return dataclasses.replace(model, variables=variables)


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_of_no_numbers_is_an_error(broken, temperature):
    with pytest.raises(ValueError, match=f"logits {SAID}"):
        broken.complete("abcd", max_new_tokens=4, temperature=temperature)
    with pytest.raises(ValueError, match=f"logits of row 1 {SAID}"):
        broken.generate(["abc", "d"], max_new_tokens=4, temperature=temperature)


def test_a_score_of_no_numbers_is_an_error(broken):
    tokens = np.asarray(broken.tokenizer("abcd").input_ids)
    pair = Pair(tokens, np.arange(3))
    with pytest.raises(ValueError, match=f"losses {SAID}"):
        score(broken, [pair])


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_memory_of_no_numbers_is_not_written(broken, tmp_path, dtype):
    memory = broken.compress("abcd" * 5, ratio=2, memory_dtype=dtype)
    with pytest.raises(ValueError, match=f"keys and values {SAID}"):
        memory.save(tmp_path / "a.beacon")
    assert not any(tmp_path.iterdir())
