"""Small HF checkpoints with random weights. Names and shapes are written out here, by
hand, so that the tests do not lean on the tables they test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

V, D, F, L, N, K, H = 40, 16, 24, 3, 4, 2, 6  # N * H != D on purpose

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
BEACON = {
    "beacon_window": 16,
    "beacon_stride": 16,
    "beacon_ratio": [2, 4],
    "beacon_param": ["q", "k", "v"],
}


def hf_config(family: str, **changes: Any) -> dict[str, Any]:
    return {
        **CONFIGS[family],
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "head_dim": H,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **changes,
    }


def hf_tensors(hf: dict[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    qkv = hf["model_type"] == "qwen2" or hf.get("attention_bias", False)
    sizes = {
        "q_proj": (N * H, D, qkv),
        "k_proj": (K * H, D, qkv),
        "v_proj": (K * H, D, qkv),
        "o_proj": (D, N * H, hf.get("attention_bias", False)),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
    }
    if not hf["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    if "beacon_param" in hf:
        shapes["model.beacon_embed_tokens.weight"] = (1, D)
    for i in range(L):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (D,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        for name, (o, d, bias) in sizes.items():
            own = name[0] in hf.get("beacon_param", [])
            for prefix in ("", "beacon_") if own else ("",):
                shapes[f"{layer}.self_attn.{prefix}{name}.weight"] = (o, d)
                if bias:
                    shapes[f"{layer}.self_attn.{prefix}{name}.bias"] = (o,)
        if hf["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{name}.weight"] = (H,)
        for name, o, d in (("gate", F, D), ("up", F, D), ("down", D, F)):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (o, d)
            if hf.get("mlp_bias"):
                shapes[f"{layer}.mlp.{name}_proj.bias"] = (o,)
    return {
        name: (rng.normal(size=shape) * 0.3).astype(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture
def config_of() -> Callable[..., dict[str, Any]]:
    return hf_config


@pytest.fixture
def tensors_of() -> Callable[..., dict[str, np.ndarray]]:
    return hf_tensors


@pytest.fixture
def beacon_fields() -> dict[str, Any]:
    return dict(BEACON)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes an HF folder as the safetensors library writes it."""

    def make(
        hf: dict[str, Any],
        tensors: dict[str, np.ndarray] | None = None,
        *,
        shards: int = 1,
        dtype: Any = np.float32,
        name: str = "hf",
    ) -> Path:
        folder = tmp_path / name
        (folder / "additional_chat_templates").mkdir(parents=True)
        tensors = hf_tensors(hf, dtype) if tensors is None else tensors
        (folder / "config.json").write_text(json.dumps(hf, indent=3) + "\n\n")
        (folder / "tokenizer.json").write_bytes(b'{"odd":  "bytes \xc3\xa9"}\r\n')
        (folder / "generation_config.json").write_text("{}")
        (folder / "additional_chat_templates" / "chat.jinja").write_text(
            "{{ messages }}"
        )
        names = list(tensors)
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            return folder
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            part = {key: tensors[key] for key in names[i::shards]}
            save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        size = sum(x.nbytes for x in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return make


BFLOAT16 = ml_dtypes.bfloat16
