"""Mounts memories behind each other, of documents that were compressed separately.

No document has seen the others: what attention across them would have added is lost. On
assets/tiny-beacon, with halves of one text of 256 tokens, this costs 0.000 to 0.001
nats per token of what follows, and passkeys are found as often
(`bench/mount_loss.py`). A model of 0.7 M parameters that gains at most 0.004 from
the first half says little about large ones.

A row's keys are turned to their new slots. Of an open window the raw entries are kept,
as if its ratio were 0. Its beacons go, because a beacon of a part of a window is
nothing the model was trained on. A full window that lies raw (`recent`) stays so.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from beacon_jax.core import move
from beacon_jax.core.law import Law, default_window
from beacon_jax.core.memory import MemoryState, buffer_size
from beacon_jax.inference.compatible import (
    config_differences,
    identity_differences,
    known,
)
from beacon_jax.inference.history import join
from beacon_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from beacon_jax.inference.memory import Memory


def concatenate(memories: "Sequence[Memory]") -> "Memory":
    """Joins memories into one with the slots of all, in this order.

    A new window begins behind them.

    Args:
      memories: of the same number of rows (row i goes behind row i), by the same model,
        in the same dtype, all or none with `recent`; capacities may differ.

    Returns:
      A memory whose source tokens are those of the memories in a row. Sinks of later
      memories are ordinary slots. It has token ids if all of them have.

    Raises:
      TypeError: no list of memories.
      ValueError: no memory, tokens that are still to be fed, or memories that differ
        in rows, dtype, recent, config or weights (says which and how).
    """
    memories = list(memories)
    _check(memories)
    parts = [closed(memory) for memory in memories]
    first, rest = parts[0], parts[1:]
    if not rest:
        return first
    needed = int(np.sum([part.slots for part in parts], axis=0).max())
    size = buffer_size(needed, default_window(first.config))
    state = first.state.resized(size)
    for part in rest:
        state = move.append(first.config, state, part.state)
    rows = zip(*(part.rows for part in parts), strict=True)
    return dataclasses.replace(first, state=state, rows=tuple(map(join, rows)))


def closed(memory: "Memory") -> "Memory":
    """Closes every open window: its raw tokens become slots, one each.

    Its beacons are dropped. Full windows that lie raw stay so. A memory without open
    windows or such is returned as it is.
    """
    raw = np.asarray([row.raw for row in memory.rows], np.int32)
    state = memory.state
    if not raw.any() and state.recent is None:
        return memory
    if raw.any():
        place = raw_places(memory.config, state)
        state = move.keep_entries(memory.config, state, place, jnp.asarray(raw))
    if state.recent is not None:
        length = jnp.zeros_like(state.recent.length)
        state = state.replace(recent=state.recent.replace(length=length))
    rows = tuple(row.close() for row in memory.rows)
    return dataclasses.replace(memory, state=state, rows=rows)


def raw_places(config: ModelConfig, state: MemoryState) -> Int[np.ndarray, "B W"]:
    """Returns where the raw tokens lie among the entries of each row's open window."""
    law = Law.of(config)
    token = np.arange(law.window, dtype=np.int32)
    return law.entries(np.asarray(state.ratio)[:, None], token).astype(np.int32)


def _check(memories: "list[Memory]") -> None:
    if not memories:
        raise ValueError("memories=[] is empty: give at least one memory.")
    for i, memory in enumerate(memories):
        if pending := sum(len(row.pending) for row in memory.rows):
            raise ValueError(
                f"memories[{i}] has {pending} tokens still to be fed (after truncate): "
                "continue it with them first, or truncate where a window ends "
                f"(rows end theirs at {[row.start for row in memory.rows]})."
            )
    first = memories[0]
    for i, other in enumerate(memories[1:], 1):
        if differences := _differences(first, other):
            raise ValueError(
                f"memories[{i}] does not fit memories[0]: {'; '.join(differences)}. "
                "Mount memories of the same model, dtype and number of rows."
            )


def _differences(a: "Memory", b: "Memory") -> list[str]:
    """Says in words what keeps two memories from being mounted."""
    both = [("rows", len(a), len(b)), ("dtype", a.dtype, b.dtype)]
    both += [("recent", a.recent, b.recent)]
    found = [(name, x, y) for name, x, y in both if x != y]
    found += config_differences(a.config, b.config)
    found += identity_differences(a.identity, b.identity)
    return [f"{name} {known(y)}, not {known(x)}" for name, x, y in found]
