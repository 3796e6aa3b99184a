"""configs/smollm2.py, the recipe of the beacons that are shipped."""

import json
import runpy
from pathlib import Path

import pytest

from beacon_jax import hf
from beacon_jax.hf.adapter import open_adapter
from beacon_jax.training.check import check_settings
from beacon_jax.training.trainer import train

RECIPE = Path(__file__).parents[2] / "configs" / "smollm2.py"
get_config = runpy.run_path(str(RECIPE))["get_config"]


@pytest.mark.slow
def test_the_recipe_distils_low_rank_beacons(base, text, tmp_path):
    config = get_config("smoke")
    config.init_from = str(base / "export")
    config.data.sources = (str(text),)
    train(config, tmp_path)
    beacon = open_adapter(tmp_path / "adapter").beacon
    assert (beacon.rank, beacon.ratios) == (64, (2, 4, 8))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["base_hash_before"] == summary["base_hash_after"]
    assert summary["last"]["loss"] >= 0  # a divergence
    assert hf.load(tmp_path / "export").config.beacon is not None


def test_the_recipe_asks_for_a_base_and_a_text(base, text, tmp_path):
    config = get_config()
    with pytest.raises(ValueError, match="init_from=''"):
        check_settings(config, tmp_path)
    config.init_from = str(base / "export")
    with pytest.raises(ValueError, match=r"data.sources=\(\)"):
        check_settings(config, tmp_path)
    config.data.sources = (str(text),)
    check_settings(config, tmp_path)


def test_an_unknown_argument_is_an_error():
    with pytest.raises(ValueError, match="smollm2:long is unknown: use :short, :smoke"):
        get_config("long")
