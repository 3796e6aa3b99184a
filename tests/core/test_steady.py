"""Decoding by one program, whatever a row's neighbours do.

In bfloat16 SmolLM2-135M's logits differed by up to 0.2 where another row's beacon was
due (4 rows, 104 tokens, a buffer of 1,024 slots). Small models round alike, so that it
is the program that is tested here.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.model.decoder import init_variables
from beacon_jax.model.net import Net
from tests.tiny import tiny

ROWS, SLOTS = 4, 64


@pytest.fixture(scope="module", params=["interleave", "append"])
def model(request):
    config = tiny()
    if request.param == "append":
        config = tiny(beacon=config.beacon.__class__(8, (2, 4), placement="append"))
    variables = nn.unbox(init_variables(config, jax.random.key(0)))
    return config, Net.of(config, variables), variables


def step(model, memory, number, *, steady, call=decode_step):
    config, net, variables = model
    tokens = jnp.asarray((np.arange(ROWS) + 7 * number) % config.vocab_size)
    plans = jnp.asarray([[2], [4], [4], [0]])
    given = (net, variables, memory, tokens, plans)
    return call(*given, static=(0, 2, 4), steady=steady)


def read(model, lengths=(3, 9, 0, 20)):
    config, net, variables = model
    memory = init_memory(config, ROWS, SLOTS)
    tokens = np.arange(ROWS * 20).reshape(ROWS, 20) % config.vocab_size
    plan = np.asarray([4], np.int32)
    return feed(net, variables, memory, tokens, np.asarray(lengths), plan)[1]


def test_steady_steps_compute_what_others_do(model):
    one = other = read(model)
    for number in range(20):
        a, one = step(model, one, number, steady=True)
        b, other = step(model, other, number, steady=False)
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert one.slots.tolist() == other.slots.tolist()
        assert one.raw.tolist() == other.raw.tolist()


def test_no_row_takes_another_program_because_a_beacon_is_due(model):
    if model[0].beacon.placement == "append":
        pytest.skip("appended beacons are many, and run when they are due")
    products = [
        step(model, read(model), 0, steady=steady, call=decode_step.lower)
        .as_text()
        .count("dot_general")
        for steady in (True, False)
    ]
    # Without it there are two programs, with a beacon behind each token and without.
    assert products[1] > 1.5 * products[0] > 0
