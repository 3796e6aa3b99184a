"""Tells in words, field by field, whether a memory fits a model or another memory."""

import dataclasses
from typing import Any

from beacon_jax.hf.identify import Identity
from beacon_jax.model.config import ModelConfig

# What no key or value depends on: tokens that end a text, and how ratios are drawn.
_FREE = ("bos_ids", "eos_ids", "beacon.ratios", "beacon.ratio_mix")
# Nor on how beacons are stored: the hash of their weights says whose they are.
_FREE_START = ("beacon.parallel_window", "beacon.embed_init", "beacon.rank")

Difference = tuple[str, Any, Any]  # (field, one value, the other)


def config_differences(a: ModelConfig, b: ModelConfig) -> list[Difference]:
    """Lists the fields that keys and values depend on and that are not equal."""
    if (a.beacon is None) != (b.beacon is None):
        return [("config.beacon", a.beacon, b.beacon)]
    x, y = _flat(a), _flat(b)
    return [(f"config.{name}", x[name], y[name]) for name in x if x[name] != y[name]]


def identity_differences(a: Identity, b: Identity) -> list[Difference]:
    """Lists the weights that are not known to be equal: base, beacon or both."""
    if a == b:
        return []
    pairs = (("base", a.base, b.base), ("beacon", a.beacon, b.beacon))
    return [(f"hash of the {part} weights", x, y) for part, x, y in pairs if x != y]


def other_model(found: list[Difference], where: str) -> str:
    """Says that another model wrote a memory, and what differs, in lines.

    Args:
      where: what has the first value of each difference: "memory" or "pack".
    """
    lines = [
        f"{name}: {known(x)} in the {where}, {known(y)} in the model"
        for name, x, y in found
    ]
    return "\n  ".join(["was written by another model:", *lines])


def known(value: Any) -> str:
    """Returns a value of a difference in words."""
    return "unknown" if value is None else str(value)


def _flat(config: ModelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        nested = value if isinstance(value, dict) else None
        fields |= {f"{name}.{k}": x for k, x in nested.items()} if nested else {}
        fields |= {} if nested else {name: value}
    return {k: x for k, x in fields.items() if k not in (*_FREE, *_FREE_START)}


def check_same_model(memory: Any, model: Any) -> None:
    """Raises ValueError unless the model wrote the memory, as far as can be known."""
    found = config_differences(memory.config, model.config)
    found += identity_differences(memory.identity, model.identity)
    if found:
        raise ValueError(
            f"memory {other_model(found, 'memory')}\n"
            "Compress the text again with this one, or load the pack with "
            "Memory.load(path, model, allow_other_model=True)."
        )
