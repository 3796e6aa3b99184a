"""A tiny random model with a tokenizer, as an ordinary HF folder written by hand."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from beacon_jax.inference import feeding
from beacon_jax.inference.loading import load
from beacon_jax.inference.model import Model
from tests.inference.memories import Fed

V, D, F, L, N, K, H, W = 257, 16, 24, 2, 2, 1, 8, 8
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
BEACON = {
    "beacon_window": W,
    "beacon_stride": W,
    "beacon_ratio": [2, 4],
    "beacon_ratio_mix": "step-random",
    "beacon_param": ["q", "k", "v"],
}


def write_tokenizer(folder: Path) -> None:
    """One token per byte; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>"
    ).save_pretrained(str(folder))


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory) -> Callable[..., Path]:
    def make(*, beacons: bool = True, **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        hf = CONFIG | (BEACON if beacons else {}) | changes
        rng = np.random.default_rng(0)
        v, n, k = (
            hf[name]
            for name in ("vocab_size", "num_attention_heads", "num_key_value_heads")
        )
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (v, D),
            "model.norm.weight": (D,),
            "lm_head.weight": (v, D),
        }
        for i in range(L):
            layer = f"model.layers.{i}"
            for norm in ("input", "post_attention"):
                shapes[f"{layer}.{norm}_layernorm.weight"] = (D,)
            for own in ("", "beacon_") if beacons else ("",):
                for name, o in (("q", n * H), ("k", k * H), ("v", k * H)):
                    shapes[f"{layer}.self_attn.{own}{name}_proj.weight"] = (o, D)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (D, n * H)
            if hf["model_type"] == "qwen3":
                for letter in "qk":
                    shapes[f"{layer}.self_attn.{letter}_norm.weight"] = (H,)
            shapes[f"{layer}.mlp.gate_proj.weight"] = (F, D)
            shapes[f"{layer}.mlp.up_proj.weight"] = (F, D)
            shapes[f"{layer}.mlp.down_proj.weight"] = (D, F)
        if beacons:
            shapes["model.beacon_embed_tokens.weight"] = (1, D)
        tensors = {
            name: np.float32(rng.normal(size=shape) * 0.5)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(hf))
        write_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folder(make_folder) -> Path:
    return make_folder()


@pytest.fixture(scope="session")
def model(folder) -> Model:
    return load(folder)


@pytest.fixture(scope="session")
def plain(make_folder) -> Model:
    return load(make_folder(beacons=False))


@pytest.fixture(scope="session")
def plain_text(model):
    """The tiny model without tokens beyond ASCII: its text is tokenised again to its
    own tokens, and never ends by itself."""
    variables = copy.copy(model.variables)
    kernel = variables["params"]["lm_head"]["kernel"]
    params = variables["params"] | {"lm_head": {"kernel": kernel.at[:, 94:].set(0)}}
    return dataclasses.replace(model, variables=variables | {"params": params})


@pytest.fixture
def nothing_is_fed(monkeypatch):
    """Ends a call by `Fed` where the device would begin to work."""

    def fed(*args, **options):
        raise Fed

    monkeypatch.setattr(feeding, "_feed_group", fed)
