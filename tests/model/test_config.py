"""config.json in, config.json out; what cannot be computed exactly is refused."""

import copy
import dataclasses
import json
import logging
from pathlib import Path

import pytest

from beacon_jax.model.config import (
    BeaconConfig,
    ModelConfig,
    RopeConfig,
    check_ratio,
)
from beacon_jax.model.presets import PRESETS

GOLDENS = Path(__file__).parents[1] / "goldens"

# As the authors publish them: remote code, fields of their transformers release.
QWEN2_BEACON = {
    "_name_or_path": "data/outputs/beacon-qwen2-7b",
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_qwen2.Qwen2Config",
        "AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM",
    },
    "beacon_attend_prev": True,
    "beacon_attn": "full-coverage",
    "beacon_embed_init": "eos",
    "beacon_parallel_window": 1,
    "beacon_param": ["q", "k", "v"],
    "beacon_pos": "interleave",
    "beacon_ratio": [2, 4, 8],
    "beacon_ratio_mix": "step-random",
    "beacon_sink_size": 0,
    "beacon_stride": 2048,
    "beacon_window": 2048,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.3",
    "trust_remote_code": True,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
}
MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
QWEN3 = {  # as Qwen3-8B's
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_published_beacon_checkpoint_is_read():
    config = ModelConfig.from_hf(QWEN2_BEACON)
    assert config == ModelConfig(
        family="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_position=32768,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        qkv_bias=True,
        bos_ids=(151643,),
        eos_ids=(151645,),
        beacon=BeaconConfig(window=2048, ratios=(2, 4, 8)),
    )
    assert config.to_hf(QWEN2_BEACON) == QWEN2_BEACON


def test_writing_other_beacons_keeps_every_other_key():
    config = ModelConfig.from_hf(QWEN2_BEACON)
    beacon = BeaconConfig(window=512, ratios=(4, 0), param=("k",), sink=2)
    before = copy.deepcopy(QWEN2_BEACON)
    hf = dataclasses.replace(config, beacon=beacon).to_hf(QWEN2_BEACON)
    assert before == QWEN2_BEACON
    changed = {key for key in hf if hf[key] != QWEN2_BEACON.get(key)}
    names = "window stride ratio param sink_size".split()  # noqa: SIM905
    assert changed == {f"beacon_{name}" for name in names}
    assert ModelConfig.from_hf(hf).beacon == beacon
    plain = dataclasses.replace(config, beacon=None).to_hf(QWEN2_BEACON)
    assert not [key for key in plain if key.startswith("beacon_")]


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("*/config.json")), ids=str)
def test_golden_configs_survive_both_ways_of_writing(path):
    hf = json.loads(path.read_text())
    config = ModelConfig.from_hf(hf)
    assert config.to_hf(hf) == hf
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert hash(config) == hash(ModelConfig.from_hf(hf))


def test_old_files_that_leave_keys_out_get_the_defaults_of_transformers():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim) == (32, 128)
    assert config.rope == RopeConfig(theta=10000.0)
    assert (config.bos_ids, config.eos_ids) == ((1,), (2,))
    assert not config.tie_embeddings and config.beacon is None


def test_head_dim_lists_of_eos_and_biases_are_honoured():
    extra = {"head_dim": 64, "eos_token_id": [9, 7], "attention_bias": True}
    config = ModelConfig.from_hf(LLAMA | extra | {"mlp_bias": True})
    assert (config.head_dim, config.eos_ids) == (64, (9, 7))
    assert config.qkv_bias and config.o_bias and config.mlp_bias
    assert ModelConfig.from_hf(config.to_hf()) == config
    qwen2 = ModelConfig.from_hf(QWEN2_BEACON)
    assert qwen2.qkv_bias and not qwen2.o_bias


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("kind", "scaling", "expected", "positions"),
    [
        ("default", {}, RopeConfig(theta=5e5), 4096),
        ("linear", {"factor": 2.0}, RopeConfig(5e5, "linear", 2.0), 8192),
        (
            "llama3",
            LLAMA3_SCALING,
            RopeConfig(5e5, "llama3", 8.0, original_max_position=8192),
            65536,
        ),
        (
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 512},
            RopeConfig(5e5, "yarn", 4.0, original_max_position=512),
            4096,
        ),
        (
            "yarn",
            {"original_max_position_embeddings": 1024, "beta_fast": 16},
            RopeConfig(5e5, "yarn", 4.0, original_max_position=1024, beta_fast=16),
            4096,
        ),
    ],
)
def test_rotary_scaling_is_read_in_every_spelling(
    key, spelling, kind, scaling, expected, positions
):
    config = ModelConfig.from_hf(
        LLAMA | {"rope_theta": 5e5, key: {spelling: kind, **scaling}}
    )
    assert config.rope == expected
    assert config.trained_positions == positions
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    ("stated", "scaling", "positions"),
    [
        (131072, LLAMA3_SCALING | {"factor": 32.0}, 131072),  # Llama-3.2
        (8192, LLAMA3_SCALING, 65536),
        (4096, {"factor": 4.0}, 16384),  # vicuna-v1.5-16k
        (4096, {"factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (16384, {"factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        (32768, YARN | {"original_max_position_embeddings": 32768}, 131072),  # Qwen2.5
        (32768, YARN | {"factor": 16.0, "finetuned": True}, 131072),  # Yarn-Mistral
        (65536, YARN | {"factor": 8.0}, 65536),
    ],
)
def test_trained_positions_are_those_that_families_mean(stated, scaling, positions):
    kind = "llama3" if "low_freq_factor" in scaling else "linear"
    given = {"rope_type": kind} | scaling
    hf = LLAMA | {"max_position_embeddings": stated, "rope_scaling": given}
    config = ModelConfig.from_hf(hf)
    assert config.trained_positions == positions
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize(
    "notes",
    [{"finetuned": True}, {"finetuned": None}, {"attn_factor": 1.0}, {"type": None}],
)
def test_notes_among_rotary_settings_change_nothing(notes):
    plain = ModelConfig.from_hf(LLAMA | {"rope_scaling": YARN})
    assert ModelConfig.from_hf(LLAMA | {"rope_scaling": YARN | notes}) == plain
    with pytest.raises(ValueError, match="'attn_factor'.* not known"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": YARN | {"attn_factor": 2.0}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"attention_factor": x}, "attention_factor=.*above 0") for x in (0.0, -1.0)),
        ({"mscale": -8.0, "mscale_all_dim": 1.0}, "mscale=-8.0.*above 0"),
        ({"mscale": 1.0, "mscale_all_dim": -8.0}, "mscale_all_dim=-8.0.*above 0"),
        ({"rope_theta": 1.0}, "theta=1.0 with yarn"),
        ({"original_max_position_embeddings": -4}, "original_max_position=-4"),
    ],
)
def test_rotary_settings_that_nothing_can_be_computed_with_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": YARN | changes})


@pytest.mark.parametrize("heads", [0, -2])
def test_no_heads_are_named(heads):
    hf = {k: x for k, x in LLAMA.items() if k != "head_dim"}
    with pytest.raises(ValueError, match=f"num_attention_heads={heads}"):
        ModelConfig.from_hf(hf | {"num_attention_heads": heads})


def test_ids_that_the_model_does_not_have_are_left_out_with_a_line(caplog):
    hf = LLAMA | {"eos_token_id": [2, 10**6], "bos_token_id": 10**6 + 1}
    for _ in range(2):
        config = ModelConfig.from_hf(hf)
    assert (config.eos_ids, config.bos_ids) == ((2,), ())
    assert caplog.text.count("eos_token_id=1000000, and ids below vocab_size") == 1
    assert caplog.text.count("bos_token_id=1000001, and ids below vocab_size") == 1
    assert config.to_hf(hf) == hf


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 7.0), ("original_max_position_embeddings", 2048)],
)
def test_a_rotary_setting_in_two_places_must_be_one_value(where, key, value):
    scaling = {"rope_type": "yarn", "factor": 2.0, key: value}
    config = ModelConfig.from_hf(LLAMA | {key: value, where: scaling})
    assert config == ModelConfig.from_hf(LLAMA | {where: scaling})
    with pytest.raises(ValueError, match=rf"{key}=.* and {where}\.{key}=.*delete the"):
        ModelConfig.from_hf(LLAMA | {key: 2 * value, where: scaling})


def test_equal_rotary_settings_in_two_spellings_are_one():
    old = {"type": "linear", "factor": 2.0}
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    hf = LLAMA | {"rope_scaling": old, "rope_parameters": new}
    assert ModelConfig.from_hf(hf).rope == RopeConfig(
        theta=7.0, kind="linear", factor=2.0
    )
    hf["rope_scaling"] = old | {"rope_theta": 8.0}
    with pytest.raises(ValueError, match="disagree"):
        ModelConfig.from_hf(hf)


def test_yarns_attention_scale_is_that_of_transformers():
    yarn = RopeConfig(kind="yarn", factor=4.0, original_max_position=64)
    replace = dataclasses.replace
    assert yarn.attention_scale == pytest.approx(1.1386294)  # 0.1 ln 4 + 1
    assert replace(yarn, attention_factor=0.8).attention_scale == 0.8
    both = replace(yarn, mscale=1.3, mscale_all_dim=0.7)
    assert both.attention_scale == pytest.approx(1.1802183 / 1.0970406)
    assert RopeConfig(kind="linear", factor=4.0).attention_scale == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"]}, "architectures=.*GPTNeoX.*must"),
        ({"model_type": "gemma"}, "model_type='gemma'.*LlamaForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only silu"),
        ({"vocab_size": None}, r"lacks \['vocab_size'\]: add"),
        ({"hidden_size": 4097}, "hidden_size=4097.*add head_dim"),
        (
            {"num_key_value_heads": 5},
            "num_attention_heads=32 must be a multiple of num_key_value_heads=5",
        ),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            {
                "partial_rotary_factor": 0.5,
                "rope_parameters": {
                    "rope_type": "default",
                    "partial_rotary_factor": 1.0,
                },
            },
            "partial_rotary_factor=0.5",
        ),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not.*use one of def"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supp"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' without factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor at least 1"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "spin": 1}},
            r"\['spin'\] are not known.*known: factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}},
            "rope_type and type disagree",
        ),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default"},
            },
            "disagree: delete the one",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "'full_attention'.*not known",
        ),
        ({"beacon_window": 32, "beacon_stride": 16}, "beacon_stride=16.*only 32"),
        ({"beacon_attn": "segmentation"}, "beacon_attn='segmentation'.*full-coverage"),
        ({"beacon_attend_prev": False}, "beacon_attend_prev=False.*only True"),
        (
            {"beacon_window": 32, "beacon_ratio": [3, 5]},
            "beacon_window=32 and beacon_ratio=.*3, 5 do not.* 1, 2, 4",
        ),
        ({"beacon_param": ["q", "mlp"]}, "param=.*'mlp'.*letters"),
        ({"beacon_pos": "prefix"}, "beacon_pos='prefix'.*interleave, append"),
        ({"sliding_window": 4096}, "sliding_window=4096 is on: .*ignore_sliding_windo"),
        ({"sliding_window": 0}, "sliding_window=0 is no window.*set it to null"),
        ({"sliding_window": -1}, "sliding_window=-1 is no window.*set it to null"),
    ],
)
def test_what_is_not_supported_is_named_with_its_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    "hf",
    [
        QWEN2_BEACON | {"use_sliding_window": True, "max_window_layers": 1},
        QWEN2_BEACON
        | {
            "use_sliding_window": True,
            "max_window_layers": 99,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        QWEN2_BEACON | {"layer_types": ["full_attention", "sliding_attention"]},
        QWEN3
        | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 9},
        QWEN3 | {"layer_types": ["full_attention", "sliding_attention"]},
        MISTRAL | {"sliding_window": 4096},
        {key: value for key, value in MISTRAL.items() if key != "sliding_window"},
    ],
)
def test_an_active_sliding_window_is_an_error_unless_ignored(hf):
    with pytest.raises(ValueError, match=r"is on.*ignore_sliding_window"):
        ModelConfig.from_hf(hf)
    config = ModelConfig.from_hf(hf, ignore_sliding_window=True)
    assert config.to_hf(hf) == hf


def test_qwen3s_config_json_is_read_and_written_back():
    config, preset = ModelConfig.from_hf(QWEN3), PRESETS["qwen3-8b"]
    assert config == dataclasses.replace(preset, beacon=None)
    assert config.qk_norm and not ModelConfig.from_hf(LLAMA).qk_norm
    assert config.to_hf(QWEN3) == QWEN3
    assert ModelConfig.from_hf(config.to_hf()) == config
    # Heads have 128 elements unless the file says otherwise: 5120 / 64 is 80.
    without = {k: x for k, x in QWEN3.items() if k != "head_dim"}
    large = without | {"hidden_size": 5120, "num_attention_heads": 64}
    assert ModelConfig.from_hf(large).head_dim == 128
    biased = ModelConfig.from_hf(QWEN3 | {"attention_bias": True})
    assert (biased.qkv_bias, biased.o_bias, biased.mlp_bias) == (True, True, False)
    assert ModelConfig.from_hf(biased.to_hf(QWEN3)) == biased
    scaling = YARN | {"original_max_position_embeddings": 32768}
    yarn = ModelConfig.from_hf(QWEN3 | {"rope_scaling": scaling})
    assert (yarn.rope.kind, yarn.trained_positions) == ("yarn", 131072)
    off = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 36}
    assert ModelConfig.from_hf(QWEN3 | off) == config


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Qwen3NextForCausalLM", "qwen3_next"),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"),
        ("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe"),
        ("Qwen3_5ForConditionalGeneration", "qwen3_5"),
        ("Qwen3ForCausalLM", "qwen3_moe"),
        ("Qwen3ForCausalLM", "qwen2"),
    ],
)
def test_relatives_of_qwen3_are_refused_by_name(name, kind):
    said = rf"architectures=\['{name}'\], model_type='{kind}'.*is not supported"
    with pytest.raises(ValueError, match=said):
        ModelConfig.from_hf(QWEN3 | {"architectures": [name], "model_type": kind})


@pytest.mark.parametrize("layers", [QWEN2_BEACON["num_hidden_layers"], 99, None])
def test_a_sliding_window_that_is_off_is_ignored(layers):
    ModelConfig.from_hf(QWEN2_BEACON)
    window = {"use_sliding_window": True, "max_window_layers": layers}
    ModelConfig.from_hf(QWEN2_BEACON | window)  # None: 28
    types = ["full_attention"] * QWEN2_BEACON["num_hidden_layers"]
    on = {"use_sliding_window": True, "layer_types": types, "max_window_layers": 0}
    ModelConfig.from_hf(QWEN2_BEACON | on)
    assert ModelConfig.from_hf(MISTRAL).family == "mistral"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"ratios": (2, 5)},
            r"window=16 and ratios=.*5 does not.* or ratios of 1, 2, 4",
        ),
        ({"ratios": (-2,)}, r"ratios=.* has -2: give whole numbers"),
        ({"ratios": ()}, "at least one ratio"),
        ({"ratio_mix": "random"}, "ratio_mix='random' is unknown.*adapt-F"),
        ({"ratio_mix": "adapt-"}, "ratio_mix='adapt-'"),
        ({"param": ("q", "q")}, "different letters"),
        ({"embed_init": "pad"}, "embed_init='pad' is unknown: use eos, bos"),
        ({"sink": -1}, "sink=-1 must be between 0 and window=16"),
        ({"window": 0}, "window=0 must be a positive"),
        ({"window": 16.0}, "window=16.0 must be a positive integer"),
        ({"parallel_window": 0}, "parallel_window=0 must"),
        ({"rank": -1}, "rank=-1 must be a whole number: 0 for projections"),
        ({"rank": 8.0}, "rank=8.0 must be a whole number"),
        ({"rank": True}, "rank=True must be a whole number"),
        ({"rank": 8, "param": ()}, r"rank=8 and param=\(\) leave nothing to change"),
    ],
)
def test_beacon_settings_that_cannot_work_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BeaconConfig(**{"window": 16, **fields})


def test_a_rank_comes_back_and_the_releases_form_has_no_such_key():
    config = ModelConfig.from_hf(LLAMA | {"beacon_window": 16, "beacon_ratio": [2]})
    assert config.beacon is not None and config.beacon.rank == 0
    assert "beacon_rank" not in config.to_hf()
    beacon = dataclasses.replace(config.beacon, rank=8)
    low = dataclasses.replace(config, beacon=beacon)
    assert low.to_hf()["beacon_rank"] == 8
    assert ModelConfig.from_hf(low.to_hf()) == low
    assert "beacon_rank" not in config.to_hf(low.to_hf())


def test_ratios_of_a_checkpoint_that_do_not_divide_its_window_are_dropped(caplog):
    caplog.set_level(logging.WARNING)
    config = ModelConfig.from_hf(
        LLAMA | {"beacon_window": 16, "beacon_ratio": [2, 32, 0]}
    )
    assert config.beacon == BeaconConfig(window=16, ratios=(2, 0))
    assert "only [2, 0] divide beacon_window=16" in caplog.text


def test_ratio_zero_and_one_are_ratios():
    check_ratio(0, 16)
    check_ratio(1, 16)
    with pytest.raises(ValueError, match="or 0 to leave"):
        check_ratio(32, 16)


@pytest.mark.parametrize(
    ("family", "biases"),
    [
        ("qwen2", {}),
        ("mistral", {"qkv_bias": True}),
        ("qwen3", {"qkv_bias": True}),
        ("qwen3", {"mlp_bias": True}),
    ],
)
def test_biases_that_no_config_json_can_state_are_refused(family, biases):
    config = ModelConfig.from_hf(LLAMA)
    with pytest.raises(ValueError, match=f"do not exist in family '{family}'"):
        dataclasses.replace(config, family=family, **biases)
