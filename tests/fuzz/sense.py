"""What keys of config.json may be: a file with anything else must not load."""

import math
from collections.abc import Callable
from typing import Any

from beacon_jax.model.config import FAMILIES


def _whole(low: int, high: int = 2**31) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and low <= x < high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda x: type(x) in (int, float) and math.isfinite(x) and low <= x <= high


def _ids(x: Any) -> bool:
    every = x if isinstance(x, list) else [x]
    return all(_whole(0, VOCABULARY)(i) for i in every)


VOCABULARY = 512
_SWITCH = lambda x: x in (True, False)
# What the keys of config.json that decide about numbers may be: a file with anything
# else must not load. None is as if the key were not there.
SENSIBLE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        [
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
            *("max_position_embeddings", "original_max_position_embeddings"),
            *("beacon_window", "beacon_stride", "beacon_parallel_window"),
        ],
        _whole(1),
    ),
    **dict.fromkeys(
        ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"],
        _SWITCH,
    ),
    "rms_norm_eps": _real(1e-30, 1),
    "rope_theta": _real(1, 1e15),
    "factor": _real(1, 1e6),
    "low_freq_factor": _real(1e-6, 1e6),
    "high_freq_factor": _real(1e-6, 1e6),
    "rope_type": lambda x: x in ("default", "linear", "llama3", "yarn"),
    "hidden_act": lambda x: x in ("silu", "swish"),
    "model_type": lambda x: x in FAMILIES,
    "rope_scaling": lambda x: isinstance(x, dict),
    "rope_parameters": lambda x: isinstance(x, dict),
    "bos_token_id": _ids,
    "eos_token_id": _ids,
    "beacon_sink_size": _whole(0, 9),
    "beacon_ratio": lambda x: x and _ids(x),
    "beacon_param": lambda x: isinstance(x, list) and set(x) <= {*"qkvo"},
    "beacon_pos": lambda x: x in ("interleave", "append"),
    "beacon_embed_init": lambda x: x in ("eos", "bos"),
    "beacon_ratio_mix": lambda x: isinstance(x, str),
}


def nonsense(config: Any) -> str:
    """Names a key of a config.json that cannot be meant; "" if there is none."""
    for key, value in config.items() if isinstance(config, dict) else ():
        known = SENSIBLE.get(key)
        if known and value is not None and not known(value):
            return f"{key}={value!r:.60}"
        if key.startswith("rope_") and (found := nonsense(value)):
            return f"{key}.{found}"
    return ""
