"""FLOPs from the config are those of the program, and of docs/design.md section 4."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from beacon_jax import flops
from beacon_jax.core.law import Law
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.decoder import Decoder, apply, init_variables
from beacon_jax.model.layout import Layout
from beacon_jax.model.net import Net
from beacon_jax.model.presets import PRESETS

W, MEMORY = 64, 16
# One layer: XLA counts the body of a loop once, however often it runs.
TINY = ModelConfig(
    family="qwen2",
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position=512,
    qkv_bias=True,
    eos_ids=(2,),
    beacon=BeaconConfig(window=W, ratios=(2, 8)),
)
LLAMA, QWEN = PRESETS["llama2-7b"], PRESETS["qwen2-7b"]
LENGTH = 128 * 1024


def with_beacon(config, **changes):
    beacon = dataclasses.replace(config.beacon, **changes)
    return dataclasses.replace(config, beacon=beacon)


def program(config, ratio):
    """A window behind MEMORY slots and the logits of its raw rows, and its inputs."""
    layout = Layout.of_window(W, ratio, config.beacon.placement)
    model = Decoder(Net(config, attention="reference"), layout)
    shape = (config.num_layers, 1, MEMORY + layout.length, 2, config.head_dim)
    variables = jax.eval_shape(
        lambda: nn.unbox(init_variables(config, jax.random.key(0)))
    )
    tokens = jax.ShapeDtypeStruct((1, W), jnp.int32)
    buffer = jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(beacon, params, k, v, tokens):
        both = {"params": params, "beacon": beacon}
        prefix = jnp.full((1,), MEMORY, jnp.int32)
        hidden, *_ = apply(model, both, tokens, k, v, prefix)
        return apply(model, both, hidden, method="logits")

    inputs = (variables["beacon"], variables["params"], buffer, buffer, tokens)
    return run, inputs, layout.length


def expected(config, ratio, entries):
    """The same from the config. The reference op computes the masked scores too."""
    spent = flops.window(config, ratio, MEMORY)
    seen = entries * MEMORY + entries * (entries + 1) // 2
    assert spent.attention % seen == 0
    computed = spent.attention // seen * entries * (MEMORY + entries)
    head = 2 * W * config.hidden_size * config.vocab_size
    return dataclasses.replace(spent, attention=computed, lm_head=head)


def products(jaxpr):
    """FLOPs of all dot_generals, a scan's body times its length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for part in jaxprs_in_params(eqn.params):
            total += times * products(part)
    return total


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("placement", ["interleave", "append"])
@pytest.mark.parametrize("ratio", [0, 2, 8])
def test_a_window_is_what_the_decoder_multiplies(ratio, placement, family):
    config = with_beacon(TINY, placement=placement)
    config = dataclasses.replace(config, family=family, qkv_bias=family == "qwen2")
    config = dataclasses.replace(config, num_layers=3)
    run, inputs, entries = program(config, ratio)
    spent = expected(config, ratio, entries)
    assert products(jax.make_jaxpr(run)(*inputs).jaxpr) == spent.total


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("ratio", [0, 2, 8])
def test_a_window_is_what_xla_counts_within_two_percent(ratio, family):
    config = dataclasses.replace(TINY, family=family, qkv_bias=family == "qwen2")
    run, inputs, entries = program(config, ratio)
    counted = jax.jit(run).lower(*inputs).cost_analysis()
    assert counted is not None
    # XLA also counts norms, rotary and softmax: 0.5 to 0.9 % here.
    assert 1 <= counted["flops"] / expected(config, ratio, entries).total < 1.02


@pytest.mark.parametrize("trainable", ["beacon", "all"])
@pytest.mark.parametrize("param", [("q", "k", "v"), ("k",), ("q", "k", "v", "o")])
def test_training_is_what_reverse_mode_multiplies(trainable, param):
    config = with_beacon(TINY, param=param)
    config = dataclasses.replace(config, num_layers=2)
    run, inputs, entries = program(config, 2)
    # The memory has a cotangent in training, whoever wrote it.
    trained = (0, 2, 3) if trainable == "beacon" else (0, 1, 2, 3)
    step = jax.value_and_grad(lambda *x: run(*x).sum(), trained)
    spent = expected(config, 2, entries).training(trainable)
    assert products(jax.make_jaxpr(step)(*inputs).jaxpr) == spent


@pytest.mark.parametrize("param", [("q", "k", "v"), ("q", "k", "v", "o")])
def test_low_rank_beacons_are_what_the_decoder_and_reverse_mode_multiply(param):
    config = with_beacon(TINY, param=param, rank=8)
    config = dataclasses.replace(config, num_layers=2)
    run, inputs, entries = program(config, 2)
    spent = expected(config, 2, entries)
    assert products(jax.make_jaxpr(run)(*inputs).jaxpr) == spent.total
    step = jax.value_and_grad(lambda *x: run(*x).sum(), (0, 2, 3))
    assert products(jax.make_jaxpr(step)(*inputs).jaxpr) == spent.training()
    # 32 beacons x 2 layers x rank 8 x inputs and outputs of q, k, v and o.
    ends = 256 + 128 + 2 * (256 + 64) + (128 + 256 if "o" in param else 0)
    assert spent.beacon == 2 * 32 * 2 * 8 * ends


def test_training_a_plain_model_is_three_forward_passes():
    plain = dataclasses.replace(TINY, beacon=None)
    spent = flops.full_attention(plain, 3 * W, scored=3 * W)
    assert spent.training("all") == 3 * spent.total
    step = flops.training_step(
        plain, np.zeros((3, 1), int), np.full((3, 2), W), trainable="all"
    )
    assert step == 2 * spent.training("all")


def test_llama_at_128k_costs_2_6_petaflop_instead_of_6_2():
    full = flops.full_attention(LLAMA, LENGTH).total
    compressed = flops.prefill(LLAMA, LENGTH, 8).total
    assert round(full / 1e15, 1) == 6.2
    assert round(compressed / 1e15, 1) == 2.6
    assert round(full / compressed, 1) == 2.4


def test_qwen_at_128k_x8_is_2_09_times_cheaper():
    full = flops.full_attention(QWEN, LENGTH).total
    assert round(full / flops.prefill(QWEN, LENGTH, 8).total, 2) == 2.09


@pytest.mark.parametrize(
    ("config", "ratio", "thousands"),
    [(LLAMA, 8, 9), (LLAMA, 4, 20), (QWEN, 8, 12), (QWEN, 4, 28)],
)
def test_break_even_lengths(config, ratio, thousands):
    found = flops.break_even(config, ratio)
    assert found == thousands * 1024
    window = config.beacon.window
    for length, cheaper in ((found, True), (found - window, False)):
        compressed = flops.prefill(config, length, ratio).total
        assert (compressed <= flops.full_attention(config, length).total) == cheaper


def test_x2_does_not_pay_on_qwen_up_to_128k():
    assert flops.break_even(QWEN, 2, LENGTH) is None


@pytest.mark.parametrize("placement", ["interleave", "append"])
@pytest.mark.parametrize(("sink", "ratio"), [(0, 8), (1, 8), (3, 2), (1, 0)])
def test_decoding_every_token_costs_what_prefill_does(sink, ratio, placement):
    config = with_beacon(TINY, sink=sink, placement=placement)
    for length in (1, W - 1, W, 2 * W + 13):
        spent, memory, opened = flops.Flops(), 0, 0
        for token in range(1, length + 1):
            raw = (token - 1) % W + 1
            due = bool(ratio) and raw % ratio == 0
            if placement == "append":
                due = W // ratio if ratio and raw == W else 0
            spent += flops.decode_step(config, memory + opened, beacons=int(due))
            opened += 1 + due
            if raw == W:
                memory += int(Law.of(config).kept(ratio, memory))
                opened = 0
        assert flops.prefill(config, length, ratio, scored=length) == spent


def test_ratio_0_is_full_attention():
    for length in (W, 3 * W, 3 * W + 5):
        assert flops.prefill(TINY, length, 0) == flops.full_attention(TINY, length)


def test_a_training_step_is_the_sum_of_its_rows():
    config = with_beacon(TINY, sink=2)
    plans = np.asarray([[2, 8], [8, 0], [2, 2], [8, 8]])
    valid = np.asarray([[W, 0], [W, W], [W, W], [W, W - 5]])
    whole = flops.training_step(config, plans[:, :1], valid[:, :1])
    short = flops.training_step(config, plans[1:, 1:], valid[1:, 1:])
    assert flops.training_step(config, plans, valid) == whole + short
    # The first row: three compressed windows, the last without beacons.
    spent = flops.Flops(lm_head=2 * 4 * W * config.hidden_size * config.vocab_size)
    for ratio, memory in ((2, 0), (8, 34), (2, 42), (0, 74)):
        spent += flops.window(config, ratio, memory)
    assert whole == spent.training()


def test_a_plan_serves_its_group_of_rows():
    valid = np.full((3, 4), W)
    step = lambda *columns: flops.training_step(TINY, np.stack(columns, axis=1), valid)
    low, high = np.asarray([2, 2, 2]), np.asarray([8, 8, 8])
    assert step(low) == step(low, low) == step(low, low, low, low)
    assert step(low, high) == step(low, low, high, high)
    assert 2 * step(low, high) == step(low) + step(high)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="ratio=3 does not divide window=64"):
        flops.window(TINY, 3, 0)
    with pytest.raises(ValueError, match="trainable='base' is unknown: use beacon or"):
        flops.Flops().training("base")
