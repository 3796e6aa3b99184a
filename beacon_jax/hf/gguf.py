"""A GGUF file as an HF checkpoint: its config.json and its tensors.

llama.cpp turns neighbouring pairs of a head in arch "llama", and halves, as we do, in
"qwen2" and "qwen3". Files of the first kind have the rows of q and k in another order,
which is undone here.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from beacon_jax.gguf.file import Header, Stored
from beacon_jax.hf.keys import table
from beacon_jax.hf.reader import Tensor, aligned_empty
from beacon_jax.model.config import STATE_BIASES, ModelConfig
from beacon_jax.model.foreign_keys import neutral
from beacon_jax.model.rotary import inverse_frequencies
from beacon_jax.names import meant

# Arch of a file -> family, and whether q and k are permuted.
ARCHS = {
    "llama": ("llama", True),
    "mistral": ("mistral", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
ROPE_FREQS = "rope_freqs.weight"
FILE = "model.safetensors"  # what the tensors' file is called in an HF folder
CHUNK = 1 << 18  # elements that are dequantised at a time: 1 MiB of float32

# Keys after the arch. Those of the second group change nothing of what is computed, or
# say twice what others say. A key that is in neither may change it: an error.
_USED = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def config(path: Path) -> dict[str, Any]:
    """Returns the config.json that an HF folder of the file's model would have.

    Raises:
      ValueError: something in the file is missing or not supported; the message names
        the file, it and the remedy.
    """
    return _config(Header(path))


class GgufReader:
    """The tensors of a GGUF file under their HF names, dequantised as they are read.

    All of them have one dtype: that of the matrices if it is bfloat16 or float16 for
    each, else float32, in which the library computes those of quantised tensors.

    Attributes:
      tensors: by HF name, in the order of the file.
      metadata: of the safetensors file that would hold them.

    Raises:
      ValueError: tensors are missing, unknown, wrongly shaped, of an unknown type, or
        reach beyond the end of the file.
    """

    def __init__(self, path: Path):
        header = Header(path)
        config = ModelConfig.from_hf(_config(header), ignore_sliding_window=True)
        self._path, self._head = path, config.head_dim
        self._stored = _matched(header, config)
        permuted = ARCHS[header.values["general.architecture"]][1]
        heads = ("q_proj", "k_proj") if permuted else ()
        self._permuted = {k for k in self._stored if k.split(".")[-2] in heads}
        dtype = _dtype(header)
        self.tensors = {
            key: Tensor(tensor.shape, dtype, FILE)
            for key, tensor in self._stored.items()
        }
        self.metadata: dict[str, dict[str, str] | None] = {FILE: {"format": "pt"}}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns the rows start:stop of axis 0, dequantised a chunk at a time."""
        stored, tensor = self._stored[name], self.tensors[name]
        start, stop, _ = slice(start, stop).indices(tensor.shape[0])
        values = aligned_empty((max(stop - start, 0), *tensor.shape[1:]), tensor.dtype)
        unit = self._head if name in self._permuted else 1
        for first, rows in _chunks(self._path, stored, unit, start, stop):
            low, high = max(first, start), min(first + len(rows), stop)
            if unit > 1:
                pairs = rows.reshape(-1, unit // 2, 2, rows.shape[-1])
                rows = pairs.swapaxes(1, 2).reshape(rows.shape)
            part = values[low - start : high - start]
            found = _dequantised(rows[low - first : high - first], stored.type)
            part[...] = found.reshape(part.shape)
        return values


def _chunks(
    path: Path, stored: Stored, unit: int, start: int, stop: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows [n, bytes]) that cover start:stop in whole units."""
    width = math.prod(stored.shape[1:])
    row = nbytes(stored) // stored.shape[0]
    step = unit * max(1, CHUNK // (width * unit))
    stop = min(math.ceil(stop / unit) * unit, stored.shape[0])
    with path.open("rb") as file:
        for first in range(start // unit * unit, stop, step):
            rows = np.empty((min(step, stop - first), row), np.uint8)
            file.seek(stored.offset + first * row)
            if file.readinto(rows.reshape(-1)) < rows.nbytes:
                raise ValueError(f"{path} became shorter while it was read.")
            yield first, rows


def _dequantised(rows: np.ndarray, kind: int) -> np.ndarray:
    """Returns the values of rows of bytes [n, bytes], in a row of their own."""
    import gguf

    name = gguf.GGMLQuantizationType(kind).name
    flat = np.ascontiguousarray(rows).reshape(-1)
    if name in _PLAIN:
        return flat.view(_PLAIN[name])
    # As one row: the library works on 16 rows at a time, and blocks know no rows.
    return gguf.dequantize(flat[None], gguf.GGMLQuantizationType(kind))[0]


def nbytes(stored: Stored) -> int:
    """Returns the bytes that a tensor has in the file."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(stored.type)]
    return math.prod(stored.shape) // block * size


@functools.cache
def _problem(kind: int) -> str | None:
    """Says what keeps a tensor type from being read; None: nothing."""
    import gguf

    try:
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)][1]
        _dequantised(np.zeros((1, size), np.uint8), kind)
    except ValueError:
        return f"has type {kind}, which is not known"
    except (NotImplementedError, KeyError):
        name = gguf.GGMLQuantizationType(kind).name
        return f"has type {name}, which cannot be dequantised"
    return None


def _matched(header: Header, config: ModelConfig) -> dict[str, Stored]:
    """Returns the file's tensors by HF name, all checked."""
    import gguf

    config = dataclasses.replace(config, beacon=None)
    llama = ARCHS[header.values["general.architecture"]][1]
    arch = gguf.MODEL_ARCH["LLAMA" if llama else config.family.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_layers)
    wanted = {
        names.get_name(key, (".weight", ".bias")): (key, entry.hf_shape)
        for entry in table(config)
        for key in entry.keys
    }
    problems = [f"missing: {name}" for name in wanted if name not in header.tensors]
    for name, tensor in header.tensors.items():
        problem = _problem(tensor.type)
        if name not in wanted:
            if name != ROPE_FREQS:
                problems.append(f"unknown: {name}")
        elif tensor.shape != wanted[name][1]:
            problems.append(
                f"wrong shape: {name} is {list(tensor.shape)}, the metadata says "
                f"{list(wanted[name][1])}"
            )
        elif problem or not _whole_blocks(tensor):
            problems.append(f"{name} {problem or 'has no whole blocks in a row'}")
        elif tensor.offset + nbytes(tensor) > header.size:
            raise ValueError(
                f"{header.path} is truncated: {name} ends at byte "
                f"{tensor.offset + nbytes(tensor)}, the file has {header.size}. "
                "Download it again."
            )
    if problems:
        raise ValueError(
            f"{header.path}: {len(problems)} tensors are not those of a "
            f"{config.family} model that this program reads:\n  "
            + "\n  ".join(problems)
            + "\nUse a file of the whole model, in a type that the gguf library "
            "dequantises (Q8_0, Q4_K_M, F16, ...)."
        )
    found = header.tensors.items()
    return {wanted[name][0]: tensor for name, tensor in found if name in wanted}


def _whole_blocks(tensor: Stored) -> bool:
    import gguf

    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type)][0]
    return block == 1 or (len(tensor.shape) > 1 and tensor.shape[-1] % block == 0)


def _dtype(header: Header) -> np.dtype:
    """Returns the dtype of all tensors: see `GgufReader`."""
    import gguf

    kinds = {t.type for t in header.tensors.values() if len(t.shape) > 1}
    for name in ("BF16", "F16"):
        if kinds == {gguf.GGMLQuantizationType[name]}:
            return _PLAIN[name]
    return _PLAIN["F32"]


def _config(header: Header) -> dict[str, Any]:
    path = header.path
    kind = header.get("general.type", str, "model")
    if kind != "model":
        raise ValueError(f"{path} has general.type={kind!r}: give the file of a model.")
    arch = header.get("general.architecture", str)
    if arch not in ARCHS:
        raise ValueError(
            f"{path}: architecture {arch!r} is not supported: {meant(arch, ARCHS)}use "
            f"a model of {', '.join(ARCHS)}."
        )
    get = lambda key, kind, default=None: header.get(f"{arch}.{key}", kind, default)
    used = {f"{arch}.{key}" for key in _USED | _HARMLESS}
    keys = header.values.keys() | header.counts.keys()
    off = {k for k, x in header.values.items() if neutral(k.split(".")[-1], x, {})}
    keys = {k for k in keys - used - off if k.startswith(f"{arch}.")}
    if unknown := sorted(keys):
        raise ValueError(
            f"{path}: {', '.join(unknown)} may change what the model computes, and is "
            "not supported: use another file of the model."
        )
    heads, hidden = get("attention.head_count", int), get("embedding_length", int)
    head_dim = get("attention.key_length", int, hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, int, head_dim) != head_dim:
            raise ValueError(
                f"{path}: {arch}.{key}={get(key, int)} differs from the {head_dim} "
                "elements of a head, which is not supported: use another model."
            )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(
            f"{path} has no embedding (token_embd.weight): use a file of the whole "
            "model."
        )
    tokens = header.counts.get("tokenizer.ggml.tokens", embedding.shape[0])
    if tokens != embedding.shape[0]:
        raise ValueError(
            f"{path}: the tokenizer has {tokens} tokens, the embedding "
            f"{embedding.shape[0]} rows: download the file again."
        )
    layers = get("block_count", int)
    if layers > len(header.tensors):  # before names are made for all of them
        raise ValueError(
            f"{path}: {arch}.block_count={layers}, but there are only "
            f"{len(header.tensors)} tensors: download the file again."
        )
    window = get("attention.sliding_window", int, 0)
    family = ARCHS[arch][0]
    hf = {
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "model_type": family,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon", float)),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": _dtype(header).name,
        **special_ids(header),
    }
    if family in STATE_BIASES:
        hf["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if family == "llama":
        hf["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    if window or family != "llama":
        hf |= {"sliding_window": window or None, "use_sliding_window": window > 0}
    try:
        hf |= _rope(header, arch, hf)
        ModelConfig.from_hf(hf, ignore_sliding_window=True)
    except ValueError as error:
        said = f"{path}: {error}"
        if "config.json" in said:
            said += " (config.json is what `convert from-gguf` makes of its header.)"
        raise ValueError(said) from error
    return hf


def special_ids(header: Header) -> dict[str, Any]:
    """Returns bos_token_id and eos_token_id; eos is a list if a turn ends otherwise."""
    ids = {
        name: header.values.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "eot", "eom")
    }
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = list(dict.fromkeys(ends))
    return {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
    }


def _short(value: float) -> float:
    """Returns the shortest number that is the same in float32, as 1e-05."""
    return float(str(np.float32(value)))


def _rope(header: Header, arch: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns rope_theta and rope_scaling; llama.cpp's theta is 10000 if none is given.

    Llama-3.1's scaling is in no key: its factors are the tensor rope_freqs.
    """
    get = lambda key, default: header.get(f"{arch}.rope.{key}", float, default)
    rope: dict[str, Any] = {"rope_theta": _short(get("freq_base", 1e4))}
    factor = _short(get("scaling.factor", get("scale_linear", 1.0)))
    kind = header.get(
        f"{arch}.rope.scaling.type", str, "linear" if factor != 1 else "none"
    )
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{arch}.rope.scaling.type={kind!r} is not supported: only linear and yarn "
            "are."
        )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        key = "rope.scaling.original_context_length"
        if f"{arch}.{key}" in header.values:
            original = header.get(f"{arch}.{key}", int)
            scaling["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"{arch}.rope.scaling.yarn_{name}" in header.values:
                scaling[name] = _short(get(f"scaling.yarn_{name}", 0.0))
        if (scale := _short(get("scaling.attn_factor", 1.0))) != 1:
            # On top of yarn's own magnitude there, in place of it here.
            scaling["attention_factor"] = scale * (0.1 * math.log(factor) + 1)
    rope["rope_scaling"] = scaling if kind != "none" else None
    if ROPE_FREQS not in header.tensors:
        return rope
    if kind != "none":
        raise ValueError(
            f"both {ROPE_FREQS} and {arch}.rope.scaling.type={kind!r} scale positions, "
            "which is not supported: use another file of the model."
        )
    return rope | {"rope_scaling": _llama3(header, {**hf, **rope})}


def _llama3(header: Header, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the rope_scaling whose frequencies are divided by rope_freqs."""
    stored, head_dim = header.tensors[ROPE_FREQS], hf["head_dim"]
    plain = inverse_frequencies(ModelConfig.from_hf(hf, ignore_sliding_window=True))
    if problem := _problem(stored.type):
        raise ValueError(f"{ROPE_FREQS} {problem}: use another file of the model.")
    if stored.shape != plain.shape or stored.offset + nbytes(stored) > header.size:
        raise ValueError(
            f"{ROPE_FREQS} has shape {list(stored.shape)} for heads of {head_dim} "
            "elements, or is not whole: download the file again."
        )
    chunks = _chunks(header.path, stored, 1, 0, len(plain))
    divisors = np.concatenate([_dequantised(rows, stored.type) for _, rows in chunks])
    divisors = divisors.astype(np.float64)
    for scaling in _candidates(plain, divisors):
        made = ModelConfig.from_hf(
            {**hf, "rope_scaling": scaling}, ignore_sliding_window=True
        )
        if np.allclose(inverse_frequencies(made) * divisors, plain, rtol=1e-5, atol=0):
            return scaling
    raise ValueError(
        f"the factors of {ROPE_FREQS} are not those of llama3 scaling, and no others "
        "are supported: use another model."
    )


def _candidates(
    plain: np.ndarray, divisors: np.ndarray
) -> Iterator[dict[str, Any] | None]:
    """Yields scalings that may have these divisors; theirs have to be compared.

    Between the bands 1/divisor is (1 - t)/factor + t with t = (p f/2pi - low)/(high -
    low) for the frequency f and p positions: a straight line, of which low = 1 fixes
    the rest.
    """
    factor = _short(divisors.max())
    if factor <= 1:
        yield None
        return
    if factor == divisors.min():
        yield {"rope_type": "linear", "factor": factor}
    bands = [(2**power, 4.0) for power in range(10, 21)]  # as Meta's: 8192 and 4
    t = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    inside = (t > 1e-4) & (t < 1 - 1e-4)
    if inside.sum() >= 2:
        slope, offset = np.polyfit(plain[inside] / (2 * np.pi), t[inside], 1)
        if offset < 0 < slope:
            high = 1 - 1 / offset
            bands.append((round(slope * (high - 1)), round(float(high), 3)))
    for original, high in bands:
        yield {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
