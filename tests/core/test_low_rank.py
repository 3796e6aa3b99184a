"""Low-rank beacons: x W + (x A) B is x (W + A B), in training, feeding and decoding."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from beacon_jax.core.decode import decode_step
from beacon_jax.core.feed import feed
from beacon_jax.core.memory import init_memory
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import init_variables, variable_axes
from beacon_jax.model.net import Net
from beacon_jax.model.presets import count_params, get_preset
from beacon_jax.model.shapes import param_shapes
from tests.tiny import tiny

pytestmark = pytest.mark.optimized

N, B, W, RANK = 3, 2, 8, 3
QKV, ALL = ("q", "k", "v"), ("q", "k", "v", "o")


def low_rank(
    family="llama",
    *,
    placement="interleave",
    param=QKV,
    tied=False,
    kv_heads=2,
    o_bias=False,
    sink=0,
) -> ModelConfig:
    return tiny(
        family=family,
        tie_embeddings=tied,
        num_kv_heads=kv_heads,
        qkv_bias=family == "qwen2" or o_bias,
        o_bias=o_bias,
        beacon=BeaconConfig(
            window=W,
            ratios=(2, 4),
            param=param,
            sink=sink,
            placement=placement,
            rank=RANK,
        ),
    )


def with_rank(config: ModelConfig, rank: int) -> ModelConfig:
    assert config.beacon is not None
    beacon = dataclasses.replace(config.beacon, rank=rank)
    return dataclasses.replace(config, beacon=beacon)


# Families, placements, tied or not, kv heads (4: as many as heads), biases, sinks.
CASES = {
    "llama": low_rank(),
    "llama-biases": low_rank(placement="append", param=ALL, o_bias=True, tied=True),
    "mistral": low_rank("mistral", placement="append", kv_heads=4, sink=3),
    "qwen2": low_rank("qwen2", param=ALL, tied=True, kv_heads=1, sink=2),
    "qwen3": low_rank("qwen3"),
}


@functools.cache
def variables(config):
    params = nn.unbox(init_variables(config, jax.random.key(0)))["params"]
    keys = iter(jax.random.split(jax.random.key(1), 200))
    noise = lambda x, size: x + size * jax.random.normal(next(keys), x.shape)
    params = jax.tree.map(lambda x: noise(3 * x, 0.03), params)  # biases, too
    beacon = jax.tree.map(lambda x: noise(x, 0.1), init_beacon(params, config))
    return {"params": params, "beacon": beacon}


def whole(config, variables):
    """The release's form: projections W + A B, and the base's biases."""
    base = variables["params"]["layers"]["attention"]
    own = {}
    for name, part in variables["beacon"]["layers"]["attention"].items():
        kernel = base[name]["kernel"]
        a = part["lora_a"].reshape(config.num_layers, -1, RANK)
        b = part["lora_b"].reshape(config.num_layers, RANK, -1)
        own[name] = {**base[name], "kernel": kernel + (a @ b).reshape(kernel.shape)}
    return with_rank(config, 0), {
        "params": variables["params"],
        "beacon": {**variables["beacon"], "layers": {"attention": own}},
    }


def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 31, (N, B, W)).astype(np.int32)
    valid = np.full((N, B), W, np.int32)
    valid[0, 1] = 0
    labels = np.where(valid[..., None] > 0, tokens, -100).astype(np.int32)
    return {"tokens": tokens, "labels": labels, "valid": valid}


def logits(config, variables):
    """Of three training windows, the first two with beacons."""
    _, aux = train_loss(
        Net(config),
        variables["beacon"],
        variables["params"],
        batch(),
        jnp.asarray((2, 4, 0)),
        outputs="logits",
    )
    return np.asarray(aux["logits"])


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_projections_w_plus_a_b(name):
    config = CASES[name]
    ours, theirs = variables(config), whole(config, variables(config))
    found, expected = logits(config, ours), logits(*theirs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * expected.std())
    fresh = {**ours, "beacon": init_beacon(ours["params"], config)}
    apart = np.abs(found - logits(config, fresh))[1:].max()
    assert apart > 1e-2 * expected.std()  # B is not zero, and it shows


def test_feeding_and_decoding_are_those_of_the_projections_w_plus_a_b():
    config = CASES["qwen2"]
    tokens = np.random.default_rng(1).integers(3, 31, (B, 3 * W + 6)).astype(np.int32)

    def run(config, variables):
        plan, net = np.asarray([2], np.int32), Net(config)
        memory = init_memory(config, B, 64)
        given = jnp.asarray(tokens[:, :-4])
        lengths = jnp.full(B, given.shape[1])
        out, memory = feed(
            net, variables, memory, given, lengths, plan, outputs="logits"
        )
        assert out.logits is not None
        found = [np.asarray(out.logits)[:, -1]]
        for token in tokens[:, -4:].T:
            one, memory = decode_step(
                net, variables, memory, jnp.asarray(token), plan, static=(2,)
            )
            found.append(np.asarray(one))
        return np.stack(found)

    expected = run(*whole(config, variables(config)))
    found = run(config, variables(config))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * expected.std())


def test_a_fresh_one_is_the_base_with_eos_in_place_of_beacons():
    config = CASES["llama"]
    params = variables(config)["params"]
    plain = with_rank(config, 0)
    expected = logits(plain, {"params": params, "beacon": init_beacon(params, plain)})
    fresh = init_beacon(params, config)
    found = logits(config, {"params": params, "beacon": fresh})
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * expected.std())


def test_a_is_drawn_from_its_seed_with_the_spread_of_the_inputs():
    config = with_rank(tiny(hidden_size=64, beacon=CASES["qwen2"].beacon), 64)
    params = nn.unbox(init_variables(config, jax.random.key(0)))["params"]
    draw = lambda seed: init_beacon(params, config, seed)["layers"]["attention"]
    one, again, other = draw(1), draw(1), draw(2)
    for name, inputs in (("q_proj", 64), ("o_proj", 16)):
        a = one[name]["lora_a"]
        assert a.std() == pytest.approx(inputs**-0.5, rel=0.05)
        np.testing.assert_array_equal(a, again[name]["lora_a"])
        assert not np.any(one[name]["lora_b"]) and np.any(a != other[name]["lora_a"])
    assert np.any(one["q_proj"]["lora_a"] != one["k_proj"]["lora_a"])


def test_shapes_and_axes_are_declared_and_the_parameters_are_few():
    config = CASES["llama-biases"]
    boxed = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    shapes = jax.tree.map(lambda x: tuple(x.shape), nn.unbox(boxed))
    assert shapes == param_shapes(config)
    axes = variable_axes(config)["beacon"]["layers"]["attention"]
    assert axes["k_proj"] == {
        "lora_a": ("layers", "embed", None),
        "lora_b": ("layers", None, "kv_heads", "head_dim"),
    }
    assert axes["o_proj"] == {
        "lora_a": ("layers", "heads", "head_dim", None),
        "lora_b": ("layers", None, "embed"),
    }
    llama = get_preset("llama2-7b")
    # 32 layers x 3 projections x 64 x (4096 + 4096), and the row.
    count = 32 * 3 * 64 * 8192 + 4096
    assert count_params(with_rank(llama, 64))[1] == count == 50_335_744
    assert count_params(llama)[1] == 1_610_616_832


def check_lean_modes(config, **settings):
    """Both lean modes have the bits of plain reverse mode; every gradient is there."""
    params, beacon = variables(config)["params"], variables(config)["beacon"]

    def gradient(remat):
        def loss(beacon):
            kind, plan = LossConfig(remat=remat, **settings), jnp.asarray((2, 4, 0))
            return train_loss(Net(config), beacon, params, batch(), plan, kind)[0]

        return jax.jit(jax.value_and_grad(loss))(beacon)

    expected, gradients = gradient("window")
    for path, x in jax.tree.leaves_with_path(gradients):
        assert np.any(x), jax.tree_util.keystr(path)
    for remat in ("lean", "lean-layer"):
        value, ours = gradient(remat)
        assert value == expected
        jax.tree.map(np.testing.assert_array_equal, ours, gradients)


@pytest.mark.parametrize(
    "name", ["llama-biases", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def test_both_lean_modes_have_the_bits_of_plain_reverse_mode(name):
    check_lean_modes(CASES[name])


def test_float16_with_a_change_of_o_is_close_to_float32():
    """Inputs of o are `shrunk` to a sixteenth, and so is what A and B make of them."""
    config = CASES["llama-biases"]
    half = jax.tree.map(lambda x: x.astype(jnp.float16), variables(config))
    same = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    def run(variables, dtype):
        _, aux = train_loss(
            Net(config, dtype),
            variables["beacon"],
            variables["params"],
            batch(),
            jnp.asarray((2, 4, 0)),
            outputs="logits",
        )
        return np.asarray(aux["logits"])

    exact = run(same, "float32")
    found = run(half, "float16")
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.02 * exact.std())
