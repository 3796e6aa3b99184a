"""Tells what a key of config.json means that this package does not read.

Models whose code comes with them have settings that no list knows. Their names say what
they are about: `rope_ratio`, `use_logn_attn`, `layer_scale`. Such a key counts as one
that a model computes with, unless its value is that of a plain decoder: none, off,
times one, or what the sizes of the model make of it.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

# Names of what is computed: parts of words, and whole words.
_STEMS = re.compile(
    "activation|atten|bidirection|capping|causal|chunk|clipping|embed|expert|factor|"
    "logit|mamba|multiplier|norm|position|quantiz|recurren|residual|rotary|routed|"
    "router|scale|scaling|sliding|softcap|softmax|sparse|swiglu|theta|window"
)
_WORDS = frozenset(
    """
    act alibi attn awq bias biases bit bits block blocks cap cla clamp clip conv depth
    emb ff ffn fraction gate gated gating geglu glu gptq group groups head heads kv
    limit ln logn mlp moe mu mup ntk pct percent qk qkv query ratio ratios rope share
    shared skip ssm tie tied tying width xpos yarn
    """.split()
)
# Words of training, files and speed, which say that no value changes.
_ELSEWHERE = frozenset(
    """
    aux bf16 cache cached checkpoint checkpointing coef coefficient decay device drop
    dropout dtype efficient file flash fp16 fp32 fp8 freeze frozen fused fusion grad
    gradient impl implementation init initialization initializer jitter kernel kernels
    label labels loss lr name noise optimizer pad padding path pdrop pipeline sdpa seed
    std summary tensor token tokenizer tokens train trained trainer training version
    xformers
    """.split()
)
# Numbers that are multiplied with, which 1 leaves as they are; groups of which 1 is
# all.
_FACTORS = re.compile(
    r"multiplier|scal(e|ing)|factor|fraction|percent|temperature"
    r"|(^|_)(pct|emb|alpha|beta|ratios?)(_|$)"
)
_GROUPS = re.compile(r"(^|_)groups?(_|$)")
# Whether true or false: the same values, but for rounding.
_EITHER = frozenset(
    """
    attention_softmax_in_fp32 norm_reduction_force_float32 rope_full_precision
    scale_attention_softmax_in_fp32
    """.split()
)
# What a plain decoder has and does.
_TRUE = frozenset(
    """
    add_final_layer_norm causal causal_attention do_layer_norm_before
    elementwise_affine ffn_with_glu final_norm gated_mlp gqa is_causal
    layer_norm_elementwise_affine mlp_gated no_bias pre_norm prenorm rmsnorm rope
    rotary scale_attn scale_attn_weights swiglu use_causal_mask use_final_norm
    use_gated_mlp use_glu use_gqa use_rms_norm use_rmsnorm use_rope use_rotary
    use_rotary_emb use_rotary_embedding use_rotary_embeddings
    use_rotary_position_embeddings use_swiglu
    """.split()
)
# Whether each head of q and k is normalised, as Qwen3's are.
_QK_NORM = frozenset(
    "qk_layernorm qk_ln qk_norm qk_rmsnorm use_qk_layernorm use_qk_norm".split()
)
# Of position_embedding_type, norm_type, attn_type and such, without signs.
_TEXTS = frozenset(
    """
    causal causalattention default full fullattention gated global gqa
    groupedqueryattention llamarmsnorm none rms rmsnorm rope rotary rotaryembedding
    rotarypositionembedding silu siluglu swiglu swish
    """.split()
)


def _heads(hf: Mapping[str, Any]) -> float:
    return hf.get("head_dim") or hf["hidden_size"] / hf["num_attention_heads"]


def _kv_heads(hf: Mapping[str, Any]) -> int:
    return hf.get("num_key_value_heads") or hf["num_attention_heads"]


def _biased(hf: Mapping[str, Any]) -> bool:
    return hf.get("model_type") == "qwen2" or bool(hf.get("attention_bias"))


type _Size = Callable[[Mapping[str, Any]], Any]

# Keys -> the value that a decoder of these sizes has without them.
_OF_SIZES: dict[str, _Size] = {
    **dict.fromkeys(
        (
            *("d_head", "qk_head_dim", "query_pre_attn_scalar", "rope_dim"),
            *("rotary_dim", "rotary_emb_dim", "rotary_ndims", "swa_head_dim"),
            "v_head_dim",
        ),
        _heads,
    ),
    **dict.fromkeys(
        ("attention_multiplier", "attention_scale", "attn_scale", "softmax_scale"),
        lambda hf: _heads(hf) ** -0.5,
    ),
    **dict.fromkeys(
        (
            *("dim_model_base", "emb_dim", "embedding_dim", "embedding_size"),
            "input_embedding_size",
        ),
        lambda hf: hf["hidden_size"],
    ),
    **dict.fromkeys(
        ("expansion_ratio", "mlp_ratio"),
        lambda hf: hf["intermediate_size"] / hf["hidden_size"],
    ),
    **dict.fromkeys(("add_qkv_bias", "qkv_bias", "use_qkv_bias"), _biased),
    **dict.fromkeys(
        ("add_bias_linear", "bias", "use_bias"),
        lambda hf: _biased(hf) and bool(hf.get("mlp_bias")),
    ),
    **dict.fromkeys(
        ("padded_vocab_size", "unpadded_vocab_size"), lambda hf: hf["vocab_size"]
    ),
    "multi_query": lambda hf: _kv_heads(hf) == 1,
    "num_key_value_groups": lambda hf: hf["num_attention_heads"] / _kv_heads(hf),
    "num_query_groups": _kv_heads,
    "scale_depth": lambda hf: math.sqrt(hf["num_hidden_layers"]),
}


def computes(key: str) -> bool:
    """Tells whether the name of a key is one of what a model computes with."""
    words = set(key.lower().split("_"))
    if key in _OF_SIZES:
        return True
    if key.startswith("beacon_") or words & _ELSEWHERE:
        return False
    return bool(words & _WORDS or _STEMS.search(key.lower()))


def neutral(key: str, value: Any, hf: Mapping[str, Any]) -> bool:
    """Tells whether a value of such a key is that of a plain decoder.

    Args:
      hf: the whole config, for keys that repeat a size of it.
    """
    if value is None or key in _EITHER:
        return True
    if key in _OF_SIZES:
        return value is False or _equal(value, key, hf)
    if isinstance(value, bool):
        plain = hf.get("model_type") == "qwen3" if key in _QK_NORM else key in _TRUE
        return value == plain
    if isinstance(value, str):
        return not value or re.sub(r"[\W_]", "", value.lower()) in _TEXTS
    if isinstance(value, Mapping):
        return all(neutral(str(name), x, hf) for name, x in value.items())
    factor = bool(_FACTORS.search(key))
    if isinstance(value, list | tuple):
        ones = factor and all(type(x) in (int, float) and x == 1 for x in value)
        return ones or all(x is None or x is False for x in value)
    if _GROUPS.search(key):
        return value in (0, 1)
    return value == (1 if factor else 0)


def _equal(value: Any, key: str, hf: Mapping[str, Any]) -> bool:
    try:
        expected = _OF_SIZES[key](hf)
    except (KeyError, TypeError, ZeroDivisionError):  # a size that is not there either
        return False
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    known = isinstance(value, int | float)
    return known and math.isclose(value, expected, rel_tol=1e-6)
