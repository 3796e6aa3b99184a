"""A run in float16 beside one in float32."""

import json

import numpy as np
import pytest

from beacon_jax import hf
from beacon_jax.training.trainer import train


def history(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return np.asarray([json.loads(line)[name] for line in lines])


@pytest.mark.slow
def test_float16_learns_as_float32_does(config, tmp_path):
    config.beacon.ratios = (4,)
    config.data.stages.stage1.steps = 12
    config.optimizer.update({"lr": 2e-2, "decay_start": 0.0, "warmup": 0})
    found = {}
    for dtype in ("float32", "float16"):
        config.dtype = dtype
        train(config, tmp_path / dtype)
        found[dtype] = history(tmp_path / dtype, "loss")
        assert history(tmp_path / dtype, "skipped").max() == 0
    exact, ours = found["float32"], found["float16"]
    assert exact[-4:].mean() < exact[:4].mean() - 0.01
    np.testing.assert_allclose(ours, exact, atol=0.01)
    np.testing.assert_allclose(
        history(tmp_path / "float16", "grad_norm"),
        history(tmp_path / "float32", "grad_norm"),
        rtol=0.05,
    )
    kernels = hf.load(tmp_path / "float16" / "export").variables["beacon"]["layers"]
    assert kernels["attention"]["k_proj"]["kernel"].dtype == np.float32


def test_a_loss_scale_that_is_not_positive_is_an_error(config, tmp_path):
    config.loss.scale = 0.0
    with pytest.raises(ValueError, match=r"loss\.scale=0\.0 must be greater than 0"):
        train(config, tmp_path)
