"""Compares the JAX decoder on a converted folder with a second path on the HF files.

The second path is plain numpy in float32 and shares nothing with the decoder but the
config: full causal attention, no windows, no beacons, HF tensors as they lie in the
file. Both paths need the whole model in float32, so this is for models that fit.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from beacon_jax.hf.checkpoint import load
from beacon_jax.hf.conversion import model_config, open_weights, read_manifest
from beacon_jax.hf.reader import Reader
from beacon_jax.model.config import ModelConfig, RopeConfig

MAX_KL = 1e-4  # nats per token; the same weights in float32 differ by rounding, 1e-6
MAX_KL_CAST = 0.015  # after --dtype; MaxText's bound for converted checkpoints
TOP = 5


def numpy_logits(
    config: ModelConfig, reader: Reader, tokens: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T V"]:
    """Returns logits of a plain causal forward pass on HF tensors, in float32."""

    def get(name: str) -> np.ndarray:
        return reader.read(name).astype(np.float32)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        y = x @ get(f"{name}.weight").T
        return y + get(f"{name}.bias") if f"{name}.bias" in reader.tensors else y

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        variance = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(variance + config.rms_norm_eps) * get(f"{name}.weight")

    length, heads = len(tokens), config.num_heads
    groups = heads // config.num_kv_heads
    angles = np.arange(length)[:, None] * inverse_frequencies(
        config.rope, config.head_dim
    )
    scale = config.rope.attention_scale
    cos, sin = (np.float32(f(angles) * scale) for f in (np.cos, np.sin))
    future = np.triu(np.full((length, length), -np.inf, np.float32), 1)

    def rotate(x: np.ndarray) -> np.ndarray:  # [N, T, H]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def split(x: np.ndarray) -> np.ndarray:  # [T, N*H] -> [N, T, H]
        return x.reshape(length, -1, config.head_dim).transpose(1, 0, 2)

    x = get("model.embed_tokens.weight")[tokens]
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k = (split(linear(y, f"{layer}.self_attn.{p}_proj")) for p in "qk")
        if config.qk_norm:
            q = norm(q, f"{layer}.self_attn.q_norm")
            k = norm(k, f"{layer}.self_attn.k_norm")
        q, k = rotate(q), rotate(k).repeat(groups, 0)
        v = split(linear(y, f"{layer}.self_attn.v_proj")).repeat(groups, 0)
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(config.head_dim)
        mixed = (softmax(scores + future) @ v).transpose(1, 0, 2).reshape(length, -1)
        x = x + linear(mixed, f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        # silu as tanh, which does not overflow
        gate = gate * (1 + np.tanh(gate / 2)) / 2 * linear(y, f"{layer}.mlp.up_proj")
        x = x + linear(gate, f"{layer}.mlp.down_proj")
    head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
    return norm(x, "model.norm") @ get(f"{head}.weight").T


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " H/2"]:
    """Returns angles per position in float32.

    All kinds of docs/specification.md section 5 are supported.
    """
    powers = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    kept = (1.0 / rope.theta**powers).astype(np.float32)
    divided = kept / np.float32(rope.factor)
    if rope.kind == "default":
        return kept
    if rope.kind == "linear":
        return divided
    original = rope.original_max_position or 0
    if rope.kind == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        turns = original * kept / (2 * math.pi)  # over the original positions
        share = np.clip((turns - low) / (high - low), 0, 1)  # of the kept one
    else:

        def dimension(turns: float) -> float:
            ratio = original / (turns * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

        first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = np.arange(head_dim // 2) - first
        share = 1 - np.clip(ramp / (last - first if last != first else 0.001), 0, 1)
    return ((1 - share) * divided + share * kept).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    """Computes probabilities along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of the two paths on the same tokens.

    Attributes:
      kl: KL(reference || ours) of every token, in nats [T].
      reference, ours: both distributions [T, V].
      bound: the largest KL of a token that passes.
    """

    kl: np.ndarray
    reference: np.ndarray
    ours: np.ndarray
    bound: float = MAX_KL

    @property
    def passed(self) -> bool:
        """Whether the largest KL is within the bound."""
        return bool(self.kl.max() <= self.bound)

    def table(self) -> str:
        """Returns a text: KL and both top-1 per token, and how far the top k agree.

        It ends with the top of both distributions at the last token, and the verdict.
        """
        orders = [np.argsort(-p, axis=-1) for p in (self.reference, self.ours)]
        lines = ["token         KL  top-1 HF  top-1 ours"]
        lines += [
            f"{t:5d} {kl:10.2e} {orders[0][t, 0]:9d} {orders[1][t, 0]:11d}"
            for t, kl in enumerate(self.kl)
        ]
        lines += ["", "  k  same tokens in the top k (mean over the tokens)"]
        for k in range(1, TOP + 1):
            pairs = zip(orders[0][:, :k], orders[1][:, :k], strict=True)
            same = np.mean([len(set(a) & set(b)) / k for a, b in pairs])
            lines.append(f"{k:3d}  {same:.4f}")
        lines += ["", "last token: rank  HF id  probability  ours id  probability"]
        for rank in range(TOP):
            a, b = (order[-1, rank] for order in orders)
            lines.append(
                f"{rank + 1:16d} {a:6d} {self.reference[-1, a]:12.4f} {b:8d} "
                f"{self.ours[-1, b]:12.4f}"
            )
        verdict = "ok" if self.passed else "FAILED"
        lines.append(
            f"\n{verdict}: KL per token mean {self.kl.mean():.2e}, max "
            f"{self.kl.max():.2e} nats (bound {self.bound})"
        )
        return "\n".join(lines)


def jax_logits(
    config: ModelConfig, variables: Mapping[str, Any], tokens: Int[np.ndarray, " T"]
) -> Float[np.ndarray, "T V"]:
    """Returns logits of the JAX decoder, full causal, without beacons."""
    from beacon_jax.model.decoder import Decoder
    from beacon_jax.model.layout import Layout
    from beacon_jax.model.net import Net

    shape = (config.num_layers, 1, len(tokens), config.num_kv_heads, config.head_dim)
    buffer = jnp.zeros(shape, jnp.float32)
    model = Decoder(Net(config), Layout(1, len(tokens), 0))

    def run(variables):
        ids, start = jnp.asarray(tokens)[None], jnp.zeros((1,), jnp.int32)
        return model.apply(variables, ids, buffer, buffer, start, method="everything")

    with jax.default_matmul_precision("highest"):
        out = jax.jit(run)(jax.tree.map(jnp.asarray, dict(variables)))
    return np.asarray(out)[0]


def compare(
    src: Path,
    dst: Path,
    logits: Callable[..., np.ndarray] | None = None,
    *,
    length: int = 32,
    seed: int = 0,
    strip_prefix: str | None = None,
) -> Comparison:
    """Runs both paths on `length` random tokens and compares them.

    Args:
      src: the HF folder or GGUF file, read by the second path.
      dst: the converted folder, loaded in float32 and given to `logits`.
      logits: (config, variables, tokens [T]) -> [T, V]; None: `jax_logits`.
      strip_prefix: as `src` was converted with.
    """
    config = model_config(src, ignore_sliding_window=True)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length)
    weights = open_weights(src, strip_prefix)
    reference = softmax(numpy_logits(config, weights, tokens))
    model = load(dst, dtype="float32")
    ours = softmax((logits or jax_logits)(model.config, model.variables, tokens))
    ratio = np.log(np.maximum(reference, 1e-30)) - np.log(np.maximum(ours, 1e-30))
    bound = MAX_KL if read_manifest(dst)["dtype"] is None else MAX_KL_CAST
    return Comparison(np.sum(reference * ratio, axis=-1), reference, ours, bound)
