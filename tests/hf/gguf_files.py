"""Small GGUF files. Names and the order of q's and k's rows are those of llama.cpp's
converter, written out by hand, so that the tests do not lean on what they test."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
F32 = gguf.GGMLQuantizationType.F32


def gguf_name(key: str) -> str:
    module, leaf = key.rsplit(".", 1)
    if module in WHOLE:
        return f"{WHOLE[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{leaf}"


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter: pairs (i, i + H/2) of a head become neighbours."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def gguf_tensors(
    hf: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    result = {}
    for key, x in tensors.items():
        module = key.split(".")[-2]
        if hf["model_type"] == "llama" and module in heads:
            x = permute(x, hf[heads[module]])
        result[gguf_name(key)] = x
    return result


def metadata(hf: Mapping[str, Any]) -> dict[str, Any]:
    arch = hf["model_type"]
    ours = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"],
        "attention.value_length": hf["head_dim"],
        "rope.dimension_count": hf["head_dim"],
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "rope.freq_base": hf["rope_theta"],
        "vocab_size": hf["vocab_size"],
    }
    return {
        **{f"{arch}.{key}": value for key, value in ours.items()},
        "tokenizer.ggml.bos_token_id": hf["bos_token_id"],
        "tokenizer.ggml.eos_token_id": hf["eos_token_id"],
    }


def write_gguf(
    path: Path,
    arch: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """Writes a file.

    Args:
      values: metadata; None leaves a key out.
      kinds: type of each tensor, else float32. uint8 tensors are bytes of their type.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, list(value))
    for name, x in tensors.items():
        kind = (kinds or {}).get(name, F32)
        if x.dtype != np.uint8:
            x = gguf.quantize(x.astype(np.float32), kind)
        writer.add_tensor(name, x, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(pieces: Sequence[str], pre: str | None) -> dict[str, Any]:
    """A byte-level tokenizer whose tokens are the pieces, and each two neighbours.

    A text is cut into just these pieces only if its pre-tokenizer cuts it there: else
    neighbours are merged, or parts of a piece are not.
    """
    merges: list[str] = []
    spelt = [spell(piece) for piece in pieces]
    for piece in spelt:
        merges += [f"{piece[:i]} {piece[i]}" for i in range(1, len(piece))]
    merges += [f"{a} {b}" for a, b in itertools.pairwise(spelt)]
    merges = list(dict.fromkeys(merges))
    tokens = ["<s>", "</s>", "<think>", *sorted(BYTES.values())]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens = list(dict.fromkeys(tokens))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's: printable bytes are themselves, the others characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {
        b: chr(256 + i) for i, b in enumerate(others)
    }


BYTES = _byte_alphabet()


def spell(text: str) -> str:
    return "".join(BYTES[b] for b in text.encode())
