"""A name that is nearly right is answered with the right one."""

import pytest

from beacon_jax.data.examples import Rules
from beacon_jax.data.grouped import GroupConfig
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.inputs import RunSettings
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.model.partition import make_partition
from beacon_jax.model.presets import get_preset
from beacon_jax.names import meant


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: make_tasks(["perplexty"]), "perplexity"),
        (lambda: make_tasks(["longbnch"]), "longbench"),
        (lambda: make_methods(["beakon"], [2]), "beacon"),
        (lambda: get_preset("qwen-7b"), "qwen2-7b"),
        (lambda: RunSettings(chat="aut"), "auto"),
        (lambda: Rules(chat_template="lama-2"), "llama-2"),
        (lambda: Rules(long="splitt"), "split"),
        (lambda: GroupConfig(window=8, batch_size=1, group="strickt"), "strict"),
        (lambda: make_partition("tensr:1"), "tensor"),
    ],
)
def test_the_nearest_name_is_told(call, name):
    with pytest.raises(ValueError, match=f"did you mean {name}\\?"):
        call()


def test_nothing_is_told_where_nothing_is_near():
    assert meant("zzz", ["beacon", ""]) == meant("", ["a"]) == meant(3, ["a"]) == ""
