"""Values of config.json that are of another type, or beyond what can be."""

import logging

import pytest

from beacon_jax.model import config_keys
from beacon_jax.model.config import ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
}
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("rope_theta", "10000", "a number of at least 1, without quotes"),
        ("rope_theta", None, "a number of at least 1, or leave the key out"),
        ("rope_theta", True, "a number of at least 1"),
        ("rope_theta", 0, "a number of at least 1"),
        ("rope_theta", float("nan"), "a number of at least 1"),
        ("rms_norm_eps", "1e-5", "a number, without quotes"),
        ("rms_norm_eps", None, "a number, or leave the key out"),
        ("rms_norm_eps", {"value": 1e-5}, "a number"),
        ("rms_norm_eps", 10**400, "a number"),
        ("max_position_embeddings", 2**31, "a whole number below 2147483648"),
        ("eos_token_id", 10**30, "a token's id"),
        ("vocab_size", "512", "a whole number below .*, without quotes"),
        ("hidden_size", 96.0, "a whole number below 2147483648, 96 without a point"),
        ("hidden_size", 96.5, r"a whole number below 2147483648\."),
        ("vocab_size", 1e400, r"a whole number below 2147483648\."),
        ("sliding_window", "4096", "a whole number below .*, without quotes"),
        ("hidden_act", None, "a text, or leave the key out"),
        ("tie_word_embeddings", "false", "true or false, without quotes"),
        ("tie_word_embeddings", 7, "true or false"),
        ("attention_bias", [[1]], "true or false"),
        ("mlp_bias", "", "true or false"),
        ("model_type", [1, 2], "a text"),
        ("architectures", "LlamaForCausalLM", "a list of texts"),
        ("layer_types", [1], "a list of texts"),
        ("eos_token_id", "0", "a token's id, or a list of them, without quotes"),
        ("eos_token_id", -1, "a token's id"),
        ("eos_token_id", {}, "a token's id"),
        ("bos_token_id", [0, 1.0], "a token's id"),
        ("rope_scaling", "linear", "an object"),
        ("rope_parameters", [None], "an object"),
        ("beacon_window", "32", "a whole number below .*, without quotes"),
        ("beacon_ratio", ["2"], "a whole number, or a list of them"),
        ("beacon_param", "qkv", "a list of texts"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_it_must_be(key, value, wanted):
    with pytest.raises(ValueError, match=f"^config.json has {key}=.*must be {wanted}"):
        ModelConfig.from_hf(LLAMA | {key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": LINEAR | {"factor": "2"}}, r"rope_scaling\.factor='2'"),
        (
            {"rope_scaling": LINEAR | {"original_max_position_embeddings": 64.0}},
            r"original_max_position_embeddings=64\.0: .* 64 without a point",
        ),
        ({"rope_scaling": LINEAR | {"factor": float("inf")}}, r"rope_scaling\.factor="),
        (
            {"rope_parameters": {"rope_theta": "5", "rope_type": "default"}},
            r"rope_parameters\.rope_theta='5'",
        ),
        (
            {"rope_parameters": {"rope_theta": 0.5, "rope_type": "default"}},
            "rope theta=0.5,.*theta must be at least 1",
        ),
        ({"rope_scaling": LINEAR | {"factor": 2.0**64}}, "and at most 1048576"),
        (
            {"rope_scaling": {"rope_type": ["yarn"]}},
            r"rope_type=\['yarn'\], which is no",
        ),
        ({"model_type": ""}, "model_type='' is not supported"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be above 0 and below 1"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "low_freq_factor=4.0, high_freq_factor=4.0",
        ),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000: at most"),
        ({"beacon_window": 16, "beacon_ratio": [2, -1]}, "has -1: give whole numbers"),
        ({"beacon_window": 16, "beacon_stride": []}, r"beacon_stride=\[\]"),
    ],
)
def test_a_number_beyond_what_can_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | changes)


def test_null_is_a_key_that_is_not_given_where_transformers_takes_it():
    nullable = ("head_dim", "num_key_value_heads", "rope_scaling", "sliding_window")
    config = ModelConfig.from_hf(LLAMA | dict.fromkeys(nullable))
    assert config == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4}},
            r"quantization_config \(awq\).*Give the checkpoint that they were made of",
        ),
        ({"ultragist_window": 1024}, "ultragist_window: this is an UltraGist model"),
        (
            {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
            "a mixture of experts, is not supported.*a model of one of these families",
        ),
        (
            {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"},
            "is not supported, only .*: give a model of one of these families",
        ),
        (
            {"architectures": None, "model_type": None},
            "config.json must name one of them",
        ),
    ],
)
def test_relatives_are_refused_by_name_with_what_to_do(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(LLAMA | changes)


def test_a_misspelt_beacon_key_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        config_keys.warn_unknown(LLAMA | {"beacon_windw": 4, "beacon_window": 16})
    assert caplog.text.count("beacon_windw") == 1
    assert "beacon_window," not in caplog.text
