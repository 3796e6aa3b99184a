"""Published models by name, so that shapes, memory and speed need no checkpoint.

`PARAMETERS` are the published parameter counts of the base models (the sum over the
tensors of the released safetensors files, tied embeddings counted once). Beacon windows
are the paper's (section 4.1): 1024 for Llama-2, 2048 for Qwen2; Llama-3 needs a sink.
The paper has no Qwen3: its window here is that of Qwen2.
"""

import math
from typing import Any

from beacon_jax.model.config import BeaconConfig, ModelConfig, RopeConfig
from beacon_jax.model.shapes import param_shapes
from beacon_jax.names import meant

PARAMETERS = {
    "tiny": 557_696,
    "smollm2-135m": 134_515_008,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "mistral-7b": 7_241_732_096,
}

_RATIOS = (2, 4, 8, 16, 32)


def _model(
    family: str, vocab: int, sizes: tuple[int, ...], **fields: Any
) -> ModelConfig:
    """Makes a config; sizes: D, F, L, N, K. fields: the others, H = 128 by default."""
    d, f, layers, heads, kv_heads = sizes
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=d,
        intermediate_size=f,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **{"head_dim": 128, "bos_ids": (1,), "eos_ids": (2,)} | fields,
    )


def _llama2(*sizes: int) -> ModelConfig:
    fields = {"max_position": 4096, "rms_norm_eps": 1e-5}
    beacon = BeaconConfig(window=1024, ratios=_RATIOS)
    return _model("llama", 32000, sizes, beacon=beacon, **fields)


def _qwen(
    family: str, vocab: int, sizes: tuple[int, ...], **fields: Any
) -> ModelConfig:
    return _model(
        family,
        vocab,
        sizes,
        rope=RopeConfig(theta=1e6),
        bos_ids=(151643,),
        eos_ids=(151645,),
        beacon=BeaconConfig(window=2048, ratios=_RATIOS),
        **fields,
    )


def _qwen2(*sizes: int, vocab: int = 152064, **fields: Any) -> ModelConfig:
    return _qwen("qwen2", vocab, sizes, max_position=32768, qkv_bias=True, **fields)


def _qwen3(*sizes: int, tied: bool = False) -> ModelConfig:
    return _qwen("qwen3", 151936, sizes, max_position=40960, tie_embeddings=tied)


_SMALL: dict[str, Any] = {"vocab": 151936, "tie_embeddings": True}
PRESETS: dict[str, ModelConfig] = {
    "tiny": _model(
        "llama",
        1024,
        (128, 256, 2, 4, 2),
        head_dim=32,
        max_position=512,
        beacon=BeaconConfig(window=32, ratios=(2, 4, 8)),
    ),
    # Beacons as configs/smollm2.py trains them.
    "smollm2-135m": _model(
        "llama",
        49152,
        (576, 1536, 30, 9, 3),
        head_dim=64,
        tie_embeddings=True,
        max_position=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e5),
        beacon=BeaconConfig(
            window=256, ratios=(2, 4, 8), sink=1, rank=64, anchor="last"
        ),
    ),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, head_dim=64, **_SMALL),
    "qwen2-1.5b": _qwen2(1536, 8960, 28, 12, 2, **_SMALL),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32, 8),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40, 8),
    "qwen3-32b": _qwen3(5120, 25600, 64, 64, 8),
    "llama2-7b": _llama2(4096, 11008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28672, 80, 64, 8),
    "llama3-8b": _model(
        "llama",
        128256,
        (4096, 14336, 32, 32, 8),
        max_position=8192,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=5e5),
        bos_ids=(128000,),
        eos_ids=(128001,),
        beacon=BeaconConfig(window=1024, ratios=_RATIOS, sink=1),
    ),
    "mistral-7b": _model(
        "mistral",
        32000,
        (4096, 14336, 32, 32, 8),
        max_position=32768,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
        beacon=BeaconConfig(window=2048, ratios=_RATIOS),
    ),
}


def get_preset(name: str) -> ModelConfig:
    """Returns the config called `name`; ValueError lists the names there are."""
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
