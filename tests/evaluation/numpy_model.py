"""A float64 decoder of one row over any entries at any positions, in plain numpy: what
a cache policy leaves behind is said here as a list of entries, not as a buffer."""

import math
from typing import NamedTuple

import numpy as np

from beacon_jax.inference.verify import inverse_frequencies


class Entries(NamedTuple):
    """Un-rotated keys and values [L, n, K, H], positions and biases [L, n, K]."""

    k: np.ndarray
    v: np.ndarray
    at: np.ndarray
    bias: np.ndarray

    @classmethod
    def plain(cls, k, v, at):
        """Without biases."""
        return cls(k, v, at, np.zeros(at.shape))

    def take(self, index):
        """Those of these places [n], positions and all."""
        return Entries(*(x[:, index] for x in self))

    def compact(self):
        """At positions 0, 1, ..."""
        at = np.arange(self.k.shape[1])[None, :, None]
        return self._replace(at=np.broadcast_to(at, self.at.shape))

    def take_each(self, index):
        """Places [L, n, K] of each layer and head."""
        wide = index[..., None]
        k, v = (np.take_along_axis(x, wide, 1) for x in (self.k, self.v))
        at, bias = (np.take_along_axis(x, index, 1) for x in (self.at, self.bias))
        return Entries(k, v, at, bias)

    def then(self, other):
        return Entries(*(np.concatenate(p, 1) for p in zip(self, other, strict=True)))


class Pass(NamedTuple):
    """logits [T, V]; the tokens' entries; their rotated queries [L, T, N, H]."""

    logits: np.ndarray
    own: Entries
    queries: np.ndarray


def nothing(config):
    shape = (config.num_layers, 0, config.num_kv_heads)
    empty = np.zeros((*shape, config.head_dim))
    return Entries.plain(empty, empty, np.zeros(shape, int))


def rotated(config, x, at):
    """x [..., H] at positions of its leading shape."""
    angles = at[..., None] * inverse_frequencies(config.rope, config.head_dim)
    cos, sin = (f(angles) * config.rope.attention_scale for f in (np.cos, np.sin))
    a, b = np.split(x, 2, -1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True, initial=-np.inf))
    return e / e.sum(-1, keepdims=True)


def attention(config, queries, keys, seen, bias=0.0):
    """Weights [N, T, S] of rotated queries [T, N, H], keys [S, K, H]; seen [T, S].

    bias: of the keys, [S, K].
    """
    group = config.num_heads // config.num_kv_heads
    keys, bias = keys.repeat(group, 1), np.broadcast_to(bias, keys.shape[:2])
    scores = np.einsum("tnh,snh->nts", queries, keys) / math.sqrt(config.head_dim)
    scores = scores + bias.repeat(group, 1).T[:, None]
    return softmax(np.where(seen, scores, -np.inf))


def forward(config, variables, tokens, memory, start):
    """Tokens at positions start ... behind a memory all of which they see."""
    params = variables["params"]
    kept, size = memory.k.shape[1], len(tokens)
    seen = np.arange(kept + size) <= kept + np.arange(size)[:, None]
    at = np.broadcast_to(start + np.arange(size)[:, None], (size, config.num_kv_heads))
    x = np.asarray(params["embed"]["embedding"], float)[tokens]

    def norm(x, scale):
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
        return x / rms * np.asarray(scale, float)

    own, queries = [], []
    for i in range(config.num_layers):
        layer = lambda *path, i=i: np.asarray(_at(params["layers"], path)[i], float)
        y = norm(x, layer("input_norm", "scale"))
        project = lambda name, y=y, layer=layer: np.tensordot(
            y, layer("attention", name, "kernel"), 1
        )
        q, k, v = (project(f"{letter}_proj") for letter in "qkv")
        if config.qk_norm:
            q, k = (
                norm(x, layer("attention", f"{letter}_norm", "scale"))
                for letter, x in (("q", q), ("k", k))
            )
        q = rotated(config, q, at[:, :1])
        keys = np.concatenate(
            [rotated(config, memory.k[i], memory.at[i]), rotated(config, k, at)]
        )
        values = np.concatenate([memory.v[i], v])
        bias = np.concatenate([memory.bias[i], np.zeros(k.shape[:2])])
        weights = attention(config, q, keys, seen, bias)
        values = values.repeat(config.num_heads // config.num_kv_heads, 1)
        mixed = np.einsum("nts,snh->tnh", weights, values)
        x = x + np.tensordot(mixed, layer("attention", "o_proj", "kernel"), 2)
        y = norm(x, layer("post_norm", "scale"))
        gate, up = (y @ layer("mlp", f"{n}_proj", "kernel") for n in ("gate", "up"))
        gate = gate / (1 + np.exp(-gate))
        x = x + (gate * up) @ layer("mlp", "down_proj", "kernel")
        own.append((k, v, at, np.zeros(at.shape)))
        queries.append(q)
    logits = norm(x, params["final_norm"]["scale"]) @ np.asarray(
        params["lm_head"]["kernel"], float
    )
    return Pass(
        logits, Entries(*map(np.stack, zip(*own, strict=True))), np.stack(queries)
    )


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
