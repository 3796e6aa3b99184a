"""Memories for tests: of random numbers, and of a random model that read something."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from beacon_jax.core.feed import feed
from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState, init_memory
from beacon_jax.hf import Identity
from beacon_jax.inference.history import History
from beacon_jax.inference.memory import Memory
from beacon_jax.model.buffers import biased, entries_of
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.net import Net
from tests.tiny import tiny

W = 8
CONFIG = tiny(vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8)


# Of a state: arrays with rows, then slots, behind the layers.
PARTS: dict[str, Callable[[MemoryState], Any]] = {
    "k": lambda state: entries_of(state.k),
    "v": lambda state: state.v,
    "bias": lambda state: jnp.swapaxes(biased(state.k).bias, 2, 3),
}


class Fed(Exception):
    """The arguments passed, and the device would work now (`nothing_is_fed`)."""


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, count])
    return rng.integers(3, CONFIG.vocab_size, count).astype(np.int32)


def random_memory(
    lengths: Sequence[int],
    *,
    config: ModelConfig = CONFIG,
    plan: Sequence[int] = (2, 4),
    capacity: int = 40,
    dtype: Any = "float32",
    seed: int = 0,
    identity: Identity | None = None,
    keep_tokens: bool = True,
) -> Memory:
    """Of rows that read `lengths` tokens, with random keys and values everywhere."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(lengths):
        tokens = tokens_of(n, seed + i)
        row = History.empty().feed(Law.of(config), np.asarray(plan), tokens)
        rows.append(row if keep_tokens else row.forget_tokens())
    shape = init_memory(config, len(rows), capacity).k.shape
    numbers = lambda values: jnp.asarray(list(values), jnp.int32)
    state = MemoryState(
        k=jnp.asarray(rng.normal(size=shape), dtype),
        v=jnp.asarray(rng.normal(size=shape), dtype),
        slots=numbers(row.slots for row in rows),
        sinks=numbers(0 for _ in rows),
        raw=numbers(row.raw for row in rows),
        ratio=numbers(row.ratio for row in rows),
        windows=numbers(row.windows for row in rows),
        tokens=jnp.asarray(rng.integers(3, 60, (len(rows), W)), jnp.int32),
    )
    return Memory(config, state, tuple(rows), identity or Identity("a" * 64, "b" * 64))


def with_biases(memory: Memory, seed: int = 3) -> Memory:
    """Gives random biases to all entries of the buffer, also those of no use."""
    k = biased(memory.state.k)
    draws = np.random.default_rng(seed).normal(size=k.bias.shape)
    k = k.replace(bias=jnp.asarray(draws, jnp.float32))
    return dataclasses.replace(memory, state=memory.state.replace(k=k))


def read(
    config: ModelConfig,
    variables: dict[str, Any],
    texts: Sequence[np.ndarray],
    plan: Sequence[int],
    memory: Memory | None = None,
    capacity: int = 64,
) -> tuple[np.ndarray, Memory]:
    """Logits [B, V] after the texts, and the memory that they went into."""
    if memory is None:
        state = init_memory(config, len(texts), capacity)
        rows = tuple(History.empty() for _ in texts)
    else:
        state, rows = memory.state, memory.rows
    state = state.resized(capacity)
    pairs = zip(rows, texts, strict=True)
    whole = [np.concatenate([row.pending, text]) for row, text in pairs]
    lengths = np.asarray([len(text) for text in whole])
    padded = np.zeros((len(texts), lengths.max()), np.int32)
    for i, text in enumerate(whole):
        padded[i, : len(text)] = text
    ratios = np.asarray(plan)
    out, state = feed(Net(config), variables, state, padded, lengths, ratios)
    pairs, law = zip(rows, whole, strict=True), Law.of(config)
    rows = tuple(row.feed(law, ratios, text) for row, text in pairs)
    return np.asarray(out.last_logits), Memory(config, state, rows, Identity("a", "b"))


def assert_same_live(a: Memory, b: Memory) -> None:
    """Everything of two memories that means something is bit-identical."""
    for name in ("slots", "sinks", "raw", "windows"):
        x, y = getattr(a.state, name), getattr(b.state, name)
        np.testing.assert_array_equal(x, y, err_msg=name)
    beacon = a.config.beacon
    placement = beacon.placement if beacon else "interleave"
    live = np.asarray(a.state.slots + a.state.open_entries(placement))
    for i, n in enumerate(live):
        raw = int(a.state.raw[i])
        if raw:
            assert a.state.ratio[i] == b.state.ratio[i]
        np.testing.assert_array_equal(a.state.tokens[i, :raw], b.state.tokens[i, :raw])
        assert a.state.biased == b.state.biased
        for name, part in PARTS.items():
            x, y = (np.asarray(part(m.state)) for m in (a, b))
            assert x.dtype == y.dtype
            kind = f"u{x.itemsize}"
            np.testing.assert_array_equal(
                x[:, i, :n].view(kind), y[:, i, :n].view(kind), err_msg=name
            )
    for x, y in zip(a.rows, b.rows, strict=True):
        for name in ("spans", "ratios", "marks", "fed"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name), name)
        assert (x.tokens is None) == (y.tokens is None)
        if x.tokens is not None:
            np.testing.assert_array_equal(x.tokens, y.tokens)
