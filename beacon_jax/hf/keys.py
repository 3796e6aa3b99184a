"""HF tensor names and layouts, one table per family, and the checks against a file.

A linear layer is [out, in] in HF files; here it is [in, out] with the head axis
split and all layers stacked, so that einsums need no reshape and layers can be scanned.
"""

import contextlib
import dataclasses
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from beacon_jax.hf.prefixes import advice
from beacon_jax.hf.relatives import of_tensors
from beacon_jax.model.config import NAMED, STATE_BIASES, ModelConfig
from beacon_jax.model.shapes import param_shapes

logger = logging.getLogger(__name__)

# Our name -> HF name; {} is the layer. Leaves: kernel, scale, embedding = .weight.
_LLAMA = {
    "params/embed": "model.embed_tokens",
    "params/layers/input_norm": "model.layers.{}.input_layernorm",
    "params/layers/attention/q_proj": "model.layers.{}.self_attn.q_proj",
    "params/layers/attention/k_proj": "model.layers.{}.self_attn.k_proj",
    "params/layers/attention/v_proj": "model.layers.{}.self_attn.v_proj",
    "params/layers/attention/o_proj": "model.layers.{}.self_attn.o_proj",
    "params/layers/post_norm": "model.layers.{}.post_attention_layernorm",
    "params/layers/mlp/gate_proj": "model.layers.{}.mlp.gate_proj",
    "params/layers/mlp/up_proj": "model.layers.{}.mlp.up_proj",
    "params/layers/mlp/down_proj": "model.layers.{}.mlp.down_proj",
    "params/final_norm": "model.norm",
    "params/lm_head": "lm_head",
    "beacon/embed": "model.beacon_embed_tokens",
    "beacon/layers/attention/q_proj": "model.layers.{}.self_attn.beacon_q_proj",
    "beacon/layers/attention/k_proj": "model.layers.{}.self_attn.beacon_k_proj",
    "beacon/layers/attention/v_proj": "model.layers.{}.self_attn.beacon_v_proj",
    "beacon/layers/attention/o_proj": "model.layers.{}.self_attn.beacon_o_proj",
}
_QWEN3 = _LLAMA | {
    "params/layers/attention/q_norm": "model.layers.{}.self_attn.q_norm",
    "params/layers/attention/k_norm": "model.layers.{}.self_attn.k_norm",
}
KEYS = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _QWEN3}
# Our leaf -> the end of the HF name; the release knows no low-rank beacons.
_ENDS = {"bias": ".bias", "lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}

# Buffers, which are no weights: tables of rotary embeddings and masks that the config
# determines, counts of profilers. Old releases of transformers saved some of them.
_BUFFER = re.compile(
    r"(^|\.)(\w*(rotary|rope)\w*\.(cos|sin|freqs)\w*|(original_)?inv_freq"
    r"|(cos|sin)_cached?|freqs_cis|freqs_(cos|sin)|position_ids|causal_mask"
    r"|attn_mask|attention_mask|masked_bias|total_ops|total_params)$"
)
_MASK = re.compile(r"(^|\.)(self_)?att(entio)?n\.(bias|mask|tril)$")
MOST_SHOWN = 12  # lines about tensors that do not fit
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One of our tensors and the HF tensors it is made of.

    Attributes:
      name: our name, the path in the variables joined with "/".
      shape: our shape, with L in front if stacked.
      keys: HF names, one per layer if stacked, else one.
      linear: whether the HF tensor is transposed.
      hf_shape: shape of each HF tensor.
      stacked: whether axis 0 is the layer.
    """

    name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    linear: bool
    hf_shape: tuple[int, ...]
    stacked: bool


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Tells whether an HF tensor is no weight but made of the config, or of no use."""
    square = len(shape) > 1 and shape[-1] == shape[-2]
    return bool(_BUFFER.search(name) or (square and _MASK.search(name)))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b/c", leaf) of nested dicts, in the order of the dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dicts of which `flatten` gives these leaves."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def table(config: ModelConfig) -> list[Entry]:
    """Lists all tensors of the model, derived from `param_shapes`."""
    entries = []
    for name, shape in flatten(param_shapes(config)):
        module, leaf = name.rsplit("/", 1)
        key = KEYS[config.family][module] + _ENDS.get(leaf, ".weight")
        stacked = "/layers/" in name
        layer = shape[1:] if stacked else shape
        linear = leaf in ("kernel", "lora_a", "lora_b")
        if linear:  # [in, out], where o_proj's input and q/k/v's output are two axes
            inputs = 2 if "o_proj" in module and leaf != "lora_b" else 1
            hf_shape = (math.prod(layer[inputs:]), math.prod(layer[:inputs]))
        else:
            hf_shape = layer if leaf != "bias" else (math.prod(layer),)
        keys = tuple(key.format(i) for i in range(config.num_layers if stacked else 1))
        entries.append(Entry(name, shape, keys, linear, hf_shape, stacked))
    return entries


def resolve(
    config: ModelConfig,
    found: Mapping[str, tuple[int, ...]],
    *,
    quiet: bool = False,
    only: str = "",
) -> tuple[list[Entry], list[str]]:
    """Checks a checkpoint's tensors and says where each of ours comes from.

    Args:
      config: the model.
      found: HF name -> shape of every tensor in the checkpoint.
      quiet: no warning about parts of the beacons that start from the base.
      only: "beacon/" if the checkpoint has beacons alone, all of them.

    Returns:
      The table, and the parts of the beacon that any layer lacks: of ["embed", "q",
      "k", "v", "o"]. In the table these parts point to the base's keys
      (docs/specification.md section 1), or are left out if the base has none for them
      (A and B of low-rank beacons).

    Raises:
      ValueError: some tensors are missing, unknown or wrongly shaped; lists the first
        of them, or says in one line why they are.
    """
    entries = _entries(config, found, only)
    shapes = _shapes(config, entries, only)
    problems, unknown = _problems(config, found, shapes, only)
    if problems:
        if known := of_tensors(unknown) or advice(found, shapes, adapter=bool(only)):
            raise ValueError(known)
        shown = problems[:MOST_SHOWN]
        if len(problems) > MOST_SHOWN:
            shown.append(f"and {len(problems) - MOST_SHOWN} more")
        count = len(problems)
        tensors = "1 tensor does" if count == 1 else f"{count} tensors do"
        raise ValueError(
            f"{tensors} not fit config.json (family {config.family}):\n  "
            + "\n  ".join(shown)
            + f"\n{_remedy(config, found, only)}"
        )
    parts: dict[str, list[str]] = {}
    for e in entries:
        if part := beacon_part(e.name):
            parts.setdefault(part, []).extend(e.keys)
    absent = {part: [k for k in keys if k not in found] for part, keys in parts.items()}
    from_base = [part for part, keys in absent.items() if keys]
    if from_base and not quiet:
        missing = [k for part in from_base for k in absent[part]]
        logger.warning(
            "beacon %s: start from the base model, since %d of %d tensors are not in "
            "the checkpoint (the first is %s).",
            ", ".join(from_base),
            len(missing),
            sum(len(parts[part]) for part in from_base),
            missing[0],
        )
    base_keys = {e.name: e.keys for e in entries if e.name.startswith("params/")}
    resolved = [
        dataclasses.replace(e, keys=base_keys[e.name.replace("beacon/", "params/", 1)])
        if beacon_part(e.name) in from_base
        else e
        for e in entries
        if not (low_rank(e.name) and beacon_part(e.name) in from_base)
    ]
    return resolved, from_base


def _entries(config: ModelConfig, found: Collection[str], only: str) -> list[Entry]:
    """Lists our tensors, with the names that a checkpoint has of them."""
    entries = [e for e in table(config) if e.name.startswith(only)]
    if config.tie_embeddings and LM_HEAD in found and EMBEDDING not in found:
        # `safetensors.torch.save_model` keeps one name of a tensor, the first by abc.
        entries = [
            dataclasses.replace(e, keys=(LM_HEAD,)) if e.keys == (EMBEDDING,) else e
            for e in entries
        ]
    return entries


def _shapes(
    config: ModelConfig, entries: list[Entry], only: str
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all HF tensors that a model may have."""
    shapes = {key: e.hf_shape for e in entries for key in e.keys}
    if config.tie_embeddings and not only and EMBEDDING in shapes:
        shapes[LM_HEAD] = shapes[EMBEDDING]  # allowed, compared when it is read
    return shapes


def _problems(
    config: ModelConfig,
    found: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    only: str,
) -> tuple[list[str], list[str]]:
    """Lists what does not fit, and the names that are unknown."""
    unknown = {k for k in found if k not in shapes}
    unknown -= {k for k in unknown if is_buffer(k, tuple(found[k]))}
    foreign = {k for k in unknown if re.search(r"\bbeacon_", k)}
    optional = {
        k for e in table(config) if e.name.startswith("beacon/") for k in e.keys
    }
    optional |= {LM_HEAD} if config.tie_embeddings else set()
    optional = set() if only else optional
    problems = [f"missing: {k}" for k in shapes if k not in found and k not in optional]
    problems += [f"unknown: {k}" for k in sorted(unknown - foreign)]
    problems += [foreign_beacon(config, k) for k in sorted(foreign)]
    problems += [
        f"wrong shape: {k} is {list(found[k])}, config.json says {list(shape)}"
        for k, shape in shapes.items()
        if k in found and tuple(found[k]) != tuple(shape)
    ]
    return problems, sorted(unknown - foreign)


def _remedy(
    config: ModelConfig, found: Mapping[str, tuple[int, ...]], only: str
) -> str:
    """Says what to do with tensors that do not fit."""
    if only:
        return "Write the folder again (convert to-hf --adapter)."
    again = "download config.json and the weights again, from one repository"
    wanted = _fitting(config, found)
    with contextlib.suppress(ValueError):  # no model has these sizes
        fits = dataclasses.replace(config, **{x: v for x, (_, v) in wanted.items()})
        shapes = _shapes(fits, _entries(fits, found, only), only)
        problems, _ = _problems(fits, found, shapes, only)
        if not problems:
            given = [f"{key}={str(v).lower()}" for key, v in wanted.values() if key]
            return (
                f"They fit {', '.join(given)}: set that in config.json if the model "
                f"was made so. If not, {again}."
            )
        if all(problem.startswith("unknown: ") for problem in problems):
            return (
                "Tensors that are unknown change what a model computes: give a "
                f"{NAMED} model; or, if it computes the same without them, save it "
                "without."
            )
    return f"Is config.json of another model? {again[0].upper()}{again[1:]}."


def _fitting(
    config: ModelConfig, found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, Any]]:
    """Returns {field: (key of config.json, value)} of what tensors have otherwise."""
    layers = [
        int(x[1]) for x in (re.match(r"model\.layers\.(\d+)\.", k) for k in found) if x
    ]
    first = "model.layers.0."
    rows = lambda name: (found.get(name) or (None,))[0]
    heads = lambda name: (
        (rows(f"{first}self_attn.{name}.weight") or 0) / config.head_dim
    )
    whole = lambda x: int(x) if x and x == int(x) else None
    has = lambda name: f"{first}{name}.bias" in found
    sizes = {
        "vocab_size": ("vocab_size", rows(EMBEDDING)),
        "intermediate_size": ("intermediate_size", rows(f"{first}mlp.up_proj.weight")),
        "num_layers": ("num_hidden_layers", max(layers, default=-1) + 1 or None),
        "num_kv_heads": ("num_key_value_heads", whole(heads("k_proj"))),
        "tie_embeddings": ("tie_word_embeddings", LM_HEAD not in found),
    }
    if config.family in STATE_BIASES:
        biased = has("self_attn.q_proj")
        sizes["qkv_bias"] = ("attention_bias", biased)
        sizes["o_bias"] = ("", biased)
    if config.family == "llama":
        sizes["mlp_bias"] = ("mlp_bias", has("mlp.up_proj"))
    wanted = {
        field: (key, x)
        for field, (key, x) in sizes.items()
        if x is not None and x != getattr(config, field)
    }
    if config.tie_embeddings:  # lm_head may be in the file, too
        wanted.pop("tie_embeddings", None)
    return wanted


def foreign_beacon(config: ModelConfig, name: str) -> str:
    """Says why a model's beacons have no tensor of that name, HF's or ours."""
    rank = config.beacon.rank if config.beacon else 0
    if config.beacon and low_rank(name) and not rank:
        return f"not in beacons of beacon_rank=0: {name} (give the rank of this tensor)"
    if rank and not low_rank(name):
        return (
            f"not in beacons of beacon_rank={rank}: {name} (projections of the "
            "beacons' own have beacon_rank=0)"
        )
    return (
        f"not in beacon_param={list(config.beacon.param) if config.beacon else None}: "
        f"{name} (add its letter and the beacon_* fields to config.json, or remove the "
        "tensor)"
    )


def low_rank(name: str) -> bool:
    """Tells whether a name, HF's or ours, is that of an A or B of low-rank beacons."""
    return ".lora_" in name or "/lora_" in name


def beacon_part(name: str) -> str | None:
    """Returns "embed", "q", "k", "v" or "o" if our name is a beacon's, else None."""
    if name.startswith("beacon/embed"):
        return "embed"
    match = re.match(r"beacon/layers/attention/(\w)_proj/", name)
    return match[1] if match else None
