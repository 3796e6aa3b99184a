"""Keys of config.json that other decoders compute with.

`python -m tests.model.test_config_keys` writes the list anew from the transformers that
is installed; keys of earlier versions stay in it.
"""

import logging
import re
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from beacon_jax.model import config_keys
from beacon_jax.model.config import FAMILIES, ModelConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
# Keys of training, generation, tokens and speed, and those that are read elsewhere.
HARMLESS = re.compile(
    r"drop|pdrop|init|_std$|loss|token_id$|token_index$|^output_(?!multiplier)|^return_"
    r"|jitter|summary_|^seed$|^mask_|^num_logits_to_keep$|^is_(de|en)coder$|gradient"
    r"|cache|^original_max_position_embeddings$|^rope_(theta|scaling)$|suppress_tokens"
    r"|^partial_rotary_factor$|^n_(positions|ctx)$|^max_seq_len$|^model_max_length$"
    r"|^context_length$|^forced_|_kernels?$|^hash_seed$|^problem_type$|^lang_id$"
    r"|languages?$|no_repeat_ngram|^(start|end)_n_top$|^unk_index$|^kernel_"
)


def fields(name: str) -> set[str]:
    """Keys of a family's config class; none if it has no values of its own."""
    try:
        return set(CONFIG_MAPPING[name]().to_dict())
    except Exception:  # some need another config to be made
        return set()


def derived() -> set[str]:
    ours = set(PretrainedConfig().to_dict()).union(*map(fields, FAMILIES))
    found = set().union(*map(fields, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    aliases = {x for names in config_keys.ALIASES.values() for x in names}
    return {k for k in found - ours - aliases if not HARMLESS.search(k)}


def test_the_list_has_every_key_of_the_library_that_is_installed():
    missing = derived() - config_keys.COMPUTING
    assert not missing, f"python -m tests.model.test_config_keys adds {missing}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("logit_scale", 0.0625),
        ("rotary_dim", 32),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("num_local_experts", 8),
        ("use_qk_norm", True),
        ("attention_chunk_size", 8192),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("rope_interleaved", True),
    ],
)
def test_a_key_that_others_compute_with_is_an_error_unless_it_is_off(key, value):
    with pytest.raises(ValueError, match=rf"{key}=.*delete it from config\.json"):
        ModelConfig.from_hf({**LLAMA, key: value})
    for off in (None, False):
        ModelConfig.from_hf({**LLAMA, key: off})


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        # Spelt by codes that come with models, and in no list.
        ("rotary_pct", 0.25, 1.0),
        ("rope_pct", 0.25, 1),
        ("rotary_percentage", 0.25, 1.0),
        ("rotary_emb_fraction", 0.5, 1.0),
        ("rope_scaling_factor", 4.0, 1.0),
        ("rope_ratio", 500, 1.0),
        ("rope_condense_ratio", 8, 1),
        ("rope_type", "linear", "default"),
        ("rotary", {"base": 10000, "type": "dynamic"}, True),
        ("qk_norm", True, False),
        ("normalize_qk_projections", True, False),
        ("qk_ln", True, None),
        ("logit_softcap", 30.0, 0),
        ("logit_softcap", 1.0, None),
        ("attn_softcap", 50.0, 0.0),
        ("residual_scale", 0.5, 1.0),
        ("residual_scale", 0, 1.0),
        ("layer_scale", True, False),
        ("output_multiplier_scale", 0.5, 1),
        ("max_attn_value", 30.0, None),
        ("mup_width_scale", 0.1, 1.0),
        ("scale_emb", 12, 1),
        ("scale_depth", 1.4, 2**0.5),
        ("scale_depth", 1, None),
        ("dim_model_base", 8, 32),
        ("attention_multiplier", 1.0, 8**-0.5),
        ("query_pre_attn_scalar", 32, 8),
        ("rotary_dim", 4, 8),
        ("padded_vocab_size", 128, 64),
        ("num_key_value_groups", 2, 1),
        ("mlp_ratio", 4, 2),
        ("use_dynamic_ntk", True, False),
        ("use_logn_attn", True, False),
        ("add_qkv_bias", True, False),
        ("multi_query_attention", True, False),
        ("position_encoding_2d", True, False),
        ("original_rope", True, False),
        ("no_bias", False, True),
        ("scale_attn_weights", False, True),
        ("position_embedding_type", "alibi", "rope"),
        ("norm_type", "layer_norm", "RMSNorm"),
        ("layer_norm_type", "default_ln", "rms_norm"),
        ("alibi_bias_max", 8, 0),
        ("ffn_multipliers", [0.5, 1.0], [1.0, 1.0]),
        ("moe_layer_freq", [0, 1], [False, False]),
        ("n_group", 8, 1),
        ("first_k_dense_replace", 1, 0),
        ("quantization_bit", 4, 0),
        ("gegelu_limit", 20.0, None),
        ("attn_config", {"alibi": True, "clip_qkv": None}, {"alibi": False}),
    ],
)
def test_a_key_whose_name_is_of_computing_is_an_error_unless_it_is_plain(
    key, value, plain
):
    with pytest.raises(ValueError, match=rf"^{key}=.* computes.*delete it from config"):
        ModelConfig.from_hf({**LLAMA, key: value})
    expected = ModelConfig.from_hf(LLAMA)
    assert ModelConfig.from_hf({**LLAMA, key: plain}) == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "flash_attention_2"),
        ("use_flash_attn", True),
        ("attention_softmax_in_fp32", True),
        ("fp32_residual_connection", True),
        ("initializer_scale", 0.5),
        ("aux_loss_alpha", 0.001),
        ("attn_dropout_prob", 0.1),
        ("z_loss_weight", 0.001),
        ("use_cache_quantization", True),
        ("tensor_parallel_size", 2),
        ("seq_length", 2048),
        ("n_positions", 64),
        ("model_max_length", 4096),
        ("tokenizer_padding_side", "left"),
        ("generation_config", {"top_k": 3}),
        ("trust_remote_code", True),
        ("beacon_rope_windw", 3),
    ],
)
def test_keys_of_training_speed_and_files_are_no_obstacle(key, value):
    assert ModelConfig.from_hf({**LLAMA, key: value}) == ModelConfig.from_hf(LLAMA)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_a_familys_config_class_is_known(family, caplog):
    sizes = {k: x for k, x in LLAMA.items() if k != "model_type"}
    hf = CONFIG_MAPPING[family](**sizes, num_key_value_heads=2).to_dict()
    hf["architectures"] = None
    with caplog.at_level(logging.WARNING):
        assert ModelConfig.from_hf(hf, ignore_sliding_window=True).family == family
        config_keys.warn_unknown(hf)
    assert not caplog.text


@pytest.mark.parametrize("key", ["qk_norm", "use_qk_norm", "qk_layernorm"])
def test_norms_of_queries_and_keys_are_those_of_the_family(key):
    qwen3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": None}
    assert ModelConfig.from_hf({**qwen3, key: True}) == ModelConfig.from_hf(qwen3)
    with pytest.raises(ValueError, match=f"^{key}=False changes|^{key}=False is not"):
        ModelConfig.from_hf({**qwen3, key: False})


def test_biases_that_the_family_has_are_no_obstacle():
    qwen2 = LLAMA | {"model_type": "qwen2", "qkv_bias": True, "no_bias": True}
    ModelConfig.from_hf(qwen2)
    for family in ("llama", "qwen3"):
        biased = LLAMA | {"model_type": family, "attention_bias": True}
        ModelConfig.from_hf(biased | {"use_qkv_bias": True})


@pytest.mark.parametrize("key", config_keys.ALIASES)
def test_another_spelling_is_read_as_ours(key):
    values = {"hidden_act": "swish", "tie_word_embeddings": True, "rope_theta": 5e5}
    values |= {"rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 16}
    value = (LLAMA | values)[key]
    less = {k: x for k, x in LLAMA.items() if k != key}
    expected = ModelConfig.from_hf(less | {key: value})
    for name in config_keys.ALIASES[key]:
        assert name not in config_keys.COMPUTING
        hf = less | {name: value}
        config = ModelConfig.from_hf(hf)
        assert config == expected
        assert ModelConfig.from_hf(hf | {key: None}) == expected
        assert config.to_hf(hf) == hf
        other = ModelConfig.from_hf(LLAMA)
        assert ModelConfig.from_hf(other.to_hf(hf)) == other
        with pytest.raises(ValueError, match=rf"config\.json has {name}=\[1, 2\]"):
            ModelConfig.from_hf(less | {name: [1, 2]})
    first, *more = config_keys.ALIASES[key]
    for name in more[:1]:
        with pytest.raises(ValueError, match=rf"{name}='x' and {first}=.*two spell"):
            ModelConfig.from_hf(less | {first: value, name: "x"})


def test_multipliers_of_one_and_counts_of_zero_are_off():
    changes = {"embedding_multiplier": 1.0, "logit_scale": 1, "num_local_experts": 0}
    ModelConfig.from_hf({**LLAMA, **changes})


def test_equal_values_in_two_spellings_are_one():
    both = {**LLAMA, "n_embd": 32, "num_layers": 2.0, "layer_norm_eps": 1e-6}
    assert ModelConfig.from_hf(both) == ModelConfig.from_hf(LLAMA)
    with pytest.raises(ValueError, match="n_embd=48 and hidden_size=32"):
        ModelConfig.from_hf({**LLAMA, "n_embd": 48})


def test_keys_that_nobody_knows_are_one_line_of_warning(caplog):
    hf = {**LLAMA, "is_llama_config": True, "wibble": 3, "wobble": {}}
    hf |= {"_name_or_path": "x", "torch_dtype": "bfloat16", "use_cache": True}
    hf |= {"pad_token_id": 2, "initializer_range": 0.02, "beacon_window": 16}
    with caplog.at_level(logging.WARNING):
        config_keys.warn_unknown(hf)
    (record,) = caplog.records
    assert "is_llama_config, wibble, wobble" in record.getMessage()
    caplog.clear()
    config_keys.warn_unknown({**LLAMA, "pretraining_tp": 1, "temperature": 1.0})
    assert not caplog.records


if __name__ == "__main__":
    path = Path(config_keys.__file__)
    text = path.read_text(encoding="utf-8")
    words = " ".join(sorted(derived() | config_keys.COMPUTING)).split()
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) + 5 > 88:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    block = "\n    ".join([*lines, line])
    new = re.sub(
        r'COMPUTING = frozenset\(\n    """.*?"""\.split\(\)',
        lambda _: f'COMPUTING = frozenset(\n    """\n    {block}\n    """.split()',
        text,
        flags=re.DOTALL,
    )
    path.write_text(new, encoding="utf-8")
    print(f"{len(words)} keys in {path.name}")
