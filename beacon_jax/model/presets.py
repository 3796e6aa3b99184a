"""Published models by name, so that shapes, memory and speed need no checkpoint.

`PARAMETERS` are the published parameter counts of the base models (the sum over the
tensors of the released safetensors files, tied embeddings counted once). Beacon windows
are the paper's (section 4.1): 1024 for Llama-2, 2048 for Qwen2; Llama-3 needs a sink.
"""

import math
from typing import Any

from beacon_jax.model.config import (
    BeaconConfig,
    ModelConfig,
    RopeConfig,
    param_shapes,
)
from beacon_jax.names import meant

PARAMETERS = {
    "tiny": 557_696,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
}

_RATIOS = (2, 4, 8, 16, 32)


def _llama2(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int
) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        max_position=4096,
        rms_norm_eps=1e-5,
        bos_ids=(1,),
        eos_ids=(2,),
        beacon=BeaconConfig(window=1024, ratios=_RATIOS),
    )


def _qwen2(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    head_dim: int = 128,
    vocab: int = 152064,
    max_position: int = 32768,
    tie: bool = False,
) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        tie_embeddings=tie,
        qkv_bias=True,
        bos_ids=(151643,),
        eos_ids=(151645,),
        beacon=BeaconConfig(window=2048, ratios=_RATIOS),
    )


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        family="llama",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position=512,
        bos_ids=(1,),
        eos_ids=(2,),
        beacon=BeaconConfig(window=32, ratios=(2, 4, 8)),
    ),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, head_dim=64, vocab=151936, tie=True),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tie=True),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8),
    "llama2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama3-8b": ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=5e5),
        bos_ids=(128000,),
        eos_ids=(128001,),
        beacon=BeaconConfig(window=1024, ratios=_RATIOS, sink=1),
    ),
    "mistral-7b": ModelConfig(
        family="mistral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position=32768,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
        bos_ids=(1,),
        eos_ids=(2,),
        beacon=BeaconConfig(window=2048, ratios=_RATIOS),
    ),
}


def get_preset(name: str) -> ModelConfig:
    """The configuration called `name`; ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(
            f"preset={name!r} is unknown: {meant(name, PRESETS)}use "
            f"{', '.join(PRESETS)}."
        )
    return PRESETS[name]


def count_params(config: ModelConfig) -> tuple[int, int]:
    """Counts base and beacon parameters."""

    def count(tree: Any) -> int:
        if isinstance(tree, dict):
            return sum(map(count, tree.values()))
        return math.prod(tree)

    shapes = param_shapes(config)
    return count(shapes["params"]), count(shapes["beacon"])
