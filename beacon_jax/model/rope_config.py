"""Rotary embedding's settings, read from and written to HF `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

from beacon_jax.model.config_keys import check_value
from beacon_jax.model.foreign_keys import neutral

MOST_FACTOR = 2**20
MOST_THETA = 1e15  # models for a million tokens have up to 4e9


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (docs/specification.md section 5); a `kind` uses some fields.

    Attributes:
      theta: base of the frequencies.
      kind: "default", "linear", "llama3" or "yarn".
      factor: how many times the positions are stretched.
      low_freq_factor, high_freq_factor: llama3 bands.
      original_max_position: positions of the pretraining before stretching.
      beta_fast, beta_slow, truncate: yarn's ramp between kept and divided frequencies.
      attention_factor, mscale, mscale_all_dim: yarn, see `attention_scale`.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.kind not in _ROPE_KEYS:
            raise ValueError(
                f"rope kind {self.kind!r} is not supported: use one of "
                f"{', '.join(_ROPE_KEYS)} (`rope_type` or `type` in config.json)."
            )
        if not (1 <= self.theta <= MOST_THETA and 1 <= self.factor <= MOST_FACTOR):
            raise ValueError(
                f"rope theta={self.theta}, factor={self.factor}: theta must be at "
                f"least 1 and at most {MOST_THETA:g}, factor at least 1 and at most "
                f"{MOST_FACTOR}."
            )
        bands = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and not 0 < bands[0] < bands[1] < math.inf:
            raise ValueError(
                f"low_freq_factor={bands[0]}, high_freq_factor={bands[1]}: both must "
                "be positive, the second the larger one."
            )
        ramp = self.beta_slow, self.beta_fast
        if self.kind == "yarn" and not 0 < ramp[0] <= ramp[1] < math.inf:
            raise ValueError(
                f"beta_slow={ramp[0]}, beta_fast={ramp[1]}: both must be positive, the "
                "second the larger one."
            )
        original = self.original_max_position
        scaled = self.kind in ("llama3", "yarn")
        if (scaled and not original) or (original is not None and original < 1):
            raise ValueError(
                f"original_max_position={original}: rope kind {self.kind!r} needs the "
                "number of positions of the pretraining."
            )
        if self.kind == "yarn" and self.theta == 1:
            raise ValueError(
                "rope theta=1.0 with yarn: all frequencies are equal, and there is no "
                "ramp between them. Mend rope_theta in config.json."
            )
        if not 0 < self.attention_scale < math.inf:
            raise ValueError(
                f"attention_factor={self.attention_factor}, mscale={self.mscale}, "
                f"mscale_all_dim={self.mscale_all_dim}: what keys and queries are "
                f"multiplied with, {self.attention_scale:g}, must be above 0. Mend the "
                "rotary settings in config.json."
            )

    @property
    def attention_scale(self) -> float:
        """What cos and sin are multiplied with; 1 for all kinds but yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        scale = lambda m: 0.1 * m * math.log(self.factor) + 1.0
        if self.mscale and self.mscale_all_dim:
            whole = scale(self.mscale_all_dim)
            return scale(self.mscale) / whole if whole > 0 else 0.0
        return scale(1.0)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Reads `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta`."""
        old, new = hf.get("rope_scaling"), hf.get("rope_parameters")
        if old and new and _differ(old, new):
            raise ValueError(
                f"config.json has rope_scaling={old} and rope_parameters={new}, which "
                "disagree: delete the one that is wrong."
            )
        given = dict(new or old or {})
        for key in ("rope_type", "type", *_NOTES):
            if given.get(key) is None or key in _NOTES:
                given.pop(key, None)
        for key in ("rope_type", "type"):
            if not isinstance(given.get(key, ""), str):
                raise ValueError(
                    f"config.json has {key}={given[key]!r}, which is no name: use one "
                    f"of {', '.join(_ROPE_KEYS)}."
                )
        kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
        kind = kinds.pop() if kinds else "default"
        if kinds:
            raise ValueError(
                f"rope_type and type disagree ({kind!r}, {kinds.pop()!r}): "
                "keep only rope_type."
            )
        _check_numbers(given, "rope_parameters" if new else "rope_scaling")
        where = "rope_parameters" if new else "rope_scaling"
        for key in ("rope_theta", _ORIGINAL):
            inner, outer = given.get(key), hf.get(key)
            if None not in (inner, outer) and inner != outer:
                raise ValueError(
                    f"config.json has {key}={outer} and {where}.{key}={inner}, two "
                    "spellings of one value: delete the wrong one."
                )
        theta = given.pop("rope_theta", None)
        theta = hf.get("rope_theta", 10000.0) if theta is None else theta
        factor = "partial_rotary_factor"
        for partial in (given.pop(factor, None), hf.get(factor)):
            if partial not in (None, 1, 1.0):
                raise ValueError(
                    f"partial_rotary_factor={partial} is not supported: only models "
                    "that rotate all of head_dim are."
                )
        if kind not in _ROPE_KEYS:
            return cls(kind=kind)  # raises, with the list of kinds
        foreign = given.keys() - {*_ROPE_KEYS[kind], _ORIGINAL}
        numbers = {key for key in foreign if type(given[key]) in (int, float)}
        off = {key for key in numbers if neutral(key, given[key], hf)}
        if unknown := sorted(foreign - off):
            raise ValueError(
                f"rotary settings {unknown} are not known for rope_type={kind!r} "
                f"(known: {', '.join(_ROPE_KEYS[kind]) or 'none'}): remove them from "
                "config.json if they have no effect."
            )
        # Null means "not given".
        given = {
            key: value
            for key, value in given.items()
            if value is not None and key not in off
        }
        original = hf.get(_ORIGINAL) or given.pop(_ORIGINAL, None)
        given.pop(_ORIGINAL, None)
        if kind in ("llama3", "yarn"):
            original = original or hf["max_position_embeddings"]
        if kind == "yarn" and "factor" not in given:
            given["factor"] = max(hf["max_position_embeddings"] / original, 1.0)
        if kind != "default" and "factor" not in given:
            raise ValueError(
                f"rope_type={kind!r} without factor: add it to config.json."
            )
        return cls(theta=theta, kind=kind, original_max_position=original, **given)

    def to_hf(self) -> dict[str, Any]:
        """Writes `rope_theta` and `rope_scaling`, which every release reads."""
        if self.kind == "default" and self.original_max_position is None:
            return {"rope_theta": self.theta, "rope_scaling": None}
        scaling: dict[str, Any] = {"rope_type": self.kind}
        for key in _ROPE_KEYS[self.kind]:
            if (value := getattr(self, key)) is not None:
                scaling[key] = value
        if self.original_max_position is not None:
            scaling[_ORIGINAL] = self.original_max_position
        return {"rope_theta": self.theta, "rope_scaling": scaling}


_ORIGINAL = "original_max_position_embeddings"
_NOTES = ("finetuned",)  # nothing is computed with them


def _differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Tells whether two spellings of rotary settings have different values.

    A theta that only one of them has is that of both.
    """
    names = {"type": "rope_type"}
    a, b = ({names.get(k, k): x for k, x in one.items()} for one in (old, new))
    if "rope_theta" not in a or "rope_theta" not in b:
        a.pop("rope_theta", None)
        b.pop("rope_theta", None)
    return a != b


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def _check_numbers(given: Mapping[str, Any], key: str) -> None:
    """Raises ValueError for a rotary setting of another type; null is not given."""
    for name, value in given.items():
        if value is None:
            continue
        if name == "truncate":
            check_value(f"{key}.{name}", value, "switch")
        elif name == _ORIGINAL:
            check_value(f"{key}.{name}", value, "whole")
        elif name in _NUMBERS:
            check_value(f"{key}.{name}", value, "number")


_NUMBERS = {"rope_theta", *(name for names in _ROPE_KEYS.values() for name in names)}
