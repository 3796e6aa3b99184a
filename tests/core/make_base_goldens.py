"""Makes golden cases of plain models: random weights, logits of transformers.

  python tests/core/make_base_goldens.py tests/goldens

Needs torch and transformers, in an environment of their own: nothing of the package is
used. Weights of norms are drawn around one, so that one that is left out shows. The
format is that of docs/specification.md section 7.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # 4 x 12 are not 32
    "max_position_embeddings": 128,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "use_sliding_window": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "b3_qwen3_v5_tied": (
        "Qwen3 with tied embeddings, heads of 12 beside a hidden size of 32",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        True,
    ),
    "b4_qwen3_v5_biases_yarn": (
        "Qwen3 with attention_bias and yarn, embeddings not tied",
        {"rope_parameters": YARN, "attention_bias": True},
        False,
    ),
}


def make(folder: Path, seed: int) -> None:
    """Writes one case: config.json, model.safetensors, case.json and case.npz."""
    description, fields, tied = CASES[folder.name]
    torch.manual_seed(seed)
    config = Qwen3Config(**SIZES, **fields, tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name
            weight.normal_(1.0 if norm else 0.0, 0.3 if norm else 0.15)
    tokens = torch.randint(6, SIZES["vocab_size"], (2, 32))
    with torch.no_grad():
        out = model(tokens, labels=tokens)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {
        "input_ids": tokens.numpy().astype(np.int32),
        "logits": out.logits.numpy(),
        "loss": out.loss.numpy(),
    }
    np.savez_compressed(folder / "case.npz", **arrays)
    case = {
        "name": folder.name,
        "description": f"{description}, transformers 5",
        "kind": "base",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "files": ["config.json", "model.safetensors"],
        "arrays": {
            "input_ids": "[batch, tokens] int32",
            "logits": "[batch, tokens, vocab] float32, plain causal LM, fp32 eager "
            "attention, weights as stored",
            "loss": "HF shifted mean cross entropy with labels=input_ids",
        },
        "tied": tied,
    }
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")


if __name__ == "__main__":
    for number, name in enumerate(CASES):
        make(Path(sys.argv[1]) / name, number)
