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
