"""Sizes by formula against the arrays of a small model."""

import jax
import jax.numpy as jnp
import pytest

from beacon_jax.bench.device import random_variables
from beacon_jax.bench.sizes import (
    entries_after,
    slots_after,
    weight_bytes,
)
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory, slot_nbytes
from beacon_jax.inference.plan import plan_ratios
from beacon_jax.model.net import Net
from tests.bench.nano import NANO, SINK


@pytest.mark.parametrize("config, ratio", [(NANO, 0), (NANO, 2), (SINK, 2)])
@pytest.mark.parametrize("length", [16, 21])
def test_slots_and_entries_are_those_of_a_real_memory(config, ratio, length):
    variables = random_variables(config, "float32")
    memory = init_memory(config, 1, 64)
    plan = plan_ratios(config, ratio, length=length)
    tokens = jnp.ones((1, length), int)
    _, memory = feed(Net(config), variables, memory, tokens, None, plan)
    entries = memory.slots + memory.open_entries("interleave")
    assert entries_after(config, length, ratio) == int(entries[0])
    open_tokens = int(memory.raw[0]) if ratio == 0 else 0
    assert slot_nbytes(config, "float32") == memory.slot_nbytes
    assert slots_after(config, length, ratio) == int(memory.slots[0]) + open_tokens


def test_weights_have_the_shapes_and_bytes_of_the_config():
    variables = random_variables(NANO, "bfloat16")
    found = sum(x.nbytes for x in jax.tree.leaves(variables))
    assert found == weight_bytes(NANO)
    base = sum(x.nbytes for x in jax.tree.leaves(variables["params"]))
    assert base == weight_bytes(NANO, beacon=False)


def test_weights_are_of_the_usual_size_and_norms_are_1():
    params = random_variables(NANO, "float32")["params"]
    assert float(params["embed"]["embedding"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(params["layers"]["mlp"]["up_proj"]["kernel"].std()) == pytest.approx(
        0.02, rel=0.1
    )
    assert jnp.all(params["final_norm"]["scale"] == 1)
