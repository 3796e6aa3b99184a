"""The second path of --verify is right by itself, and notices a wrong model."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from beacon_jax.hf import save_hf
from beacon_jax.hf.conversion import from_hf
from beacon_jax.hf.reader import open_hf
from beacon_jax.inference import verify
from beacon_jax.model.config import ModelConfig, RopeConfig

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDENS.glob("b*")))
def test_the_second_path_gives_the_logits_of_transformers(case):
    hf = json.loads((GOLDENS / case / "config.json").read_text())
    config = ModelConfig.from_hf(hf)
    arrays = np.load(GOLDENS / case / "case.npz")
    reader = open_hf(GOLDENS / case)
    for tokens, expected in zip(arrays["input_ids"], arrays["logits"], strict=True):
        logits = verify.numpy_logits(config, reader, tokens)
        np.testing.assert_allclose(logits, expected, atol=1e-4)


# From transformers 5.23 (modeling_rope_utils), theta 100, head_dim 12.
@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (
            RopeConfig(100.0, "linear", 4.0),
            [0.25, 0.11603972, 0.05386086, 0.025, 0.01160397, 0.00538609],
        ),
        (
            RopeConfig(100.0, "llama3", 8.0, original_max_position=64),
            [1.0, 0.46415889, 0.10198934, 0.01304226, 0.00580199, 0.00269304],
        ),
        (
            RopeConfig(100.0, "yarn", 4.0, original_max_position=64),
            [1.0, 0.37712911, 0.13465215, 0.04375, 0.01160397, 0.00538609],
        ),
        (
            RopeConfig(
                100.0,
                "yarn",
                4.0,
                original_max_position=64,
                beta_fast=4,
                beta_slow=0.5,
                truncate=False,
            ),
            [1.0, 0.46415889, 0.16879375, 0.0506644, 0.01160397, 0.00538609],
        ),
    ],
)
def test_scaled_frequencies_are_those_of_transformers(rope, expected):
    found = verify.inverse_frequencies(rope, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_table_tells_a_right_model_from_a_wrong_one():
    reference = verify.softmax(np.random.default_rng(0).normal(size=(4, 9)))
    right = verify.Comparison(np.zeros(4), reference, reference)
    assert right.passed and "ok: KL per token" in right.table()
    assert "  5  1.0000" in right.table()
    wrong = verify.Comparison(np.full(4, 0.1), reference, np.roll(reference, 1, -1))
    assert not wrong.passed and "FAILED" in wrong.table()
    assert "max 1.00e-01" in wrong.table()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_conversion_that_mixes_up_heads_is_noticed(
    tmp_path, make_checkpoint, config_of, tensors_of, family
):
    # Four times the weights: attention that is nearly uniform hides such a fault.
    hf = config_of(family)
    src = make_checkpoint(hf, {k: 4 * x for k, x in tensors_of(hf).items()})
    from_hf(src, tmp_path / "ours")

    def logits(config, variables, tokens, shift=0):
        attention = dict(variables["params"]["layers"]["attention"])
        kernel = np.roll(attention["q_proj"]["kernel"], shift, axis=2)
        attention["q_proj"] = {**attention["q_proj"], "kernel": kernel}
        layers = {**variables["params"]["layers"], "attention": attention}
        params = {**variables["params"], "layers": layers}
        save_hf(tmp_path / "again", config, {"params": params}, overwrite=True)
        return verify.numpy_logits(config, open_hf(tmp_path / "again"), tokens)

    right = verify.compare(src, tmp_path / "ours", logits)
    assert right.passed and right.kl.max() < 1e-5
    wrong = verify.compare(src, tmp_path / "ours", functools.partial(logits, shift=1))
    assert not wrong.passed
