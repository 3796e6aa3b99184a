"""Model and beacon configuration, read from and written to HF `config.json`.

Every dataclass is frozen and hashable (lists become tuples). What cannot be represented
exactly is an error, never a silent default: a model with a wrong rotary type or sliding
window would run and be subtly wrong.
"""

import copy
import dataclasses
import logging
import math
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from beacon_jax.model import config_keys
from beacon_jax.names import check_choice, hinted_init, meant

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2")
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}
PROJECTIONS = ("q", "k", "v", "o")


def divisors(window: int) -> list[int]:
    """Lists the ratios that a window can be compressed by, ascending."""
    return [r for r in range(1, window + 1) if window % r == 0]


def ratio_choices(window: int) -> str:
    """Says which ratios there are: "one of 1, 2, 4, 8, or 0 to leave ..."."""
    numbers = ", ".join(map(str, divisors(window)))
    return f"one of {numbers}, or 0 to leave windows uncompressed"


def check_ratio(ratio: int, window: int) -> None:
    """Raises ValueError unless `ratio` is 0 (keep all) or divides `window`."""
    if ratio < 0 or (ratio and window % ratio):
        raise ValueError(
            f"ratio={ratio} does not divide window={window}: use "
            f"{ratio_choices(window)}."
        )


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
        if not (self.theta > 0 and self.factor >= 1):
            raise ValueError(
                f"rope theta={self.theta}, factor={self.factor}: theta must be "
                "positive and factor at least 1."
            )
        if self.kind in ("llama3", "yarn") and not self.original_max_position:
            raise ValueError(
                f"original_max_position={self.original_max_position}: rope kind "
                f"{self.kind!r} needs the number of positions of the pretraining."
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
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """Reads `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta`."""
        old, new = hf.get("rope_scaling"), hf.get("rope_parameters")
        if old and new and old != new:
            raise ValueError(
                f"config.json has rope_scaling={old} and rope_parameters={new}, which "
                "disagree: delete the one that is wrong."
            )
        given = dict(new or old or {})
        kinds = {given.pop(key) for key in ("rope_type", "type") if key in given}
        kind = kinds.pop() if kinds else "default"
        if kinds:
            raise ValueError(
                f"rope_type and type disagree ({kind!r}, {kinds.pop()!r}): "
                "keep only rope_type."
            )
        theta = given.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
        partial = given.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise ValueError(
                f"partial_rotary_factor={partial} is not supported: only models that "
                "rotate all of head_dim are."
            )
        if kind not in _ROPE_KEYS:
            return cls(kind=kind)  # raises, with the list of kinds
        if unknown := sorted(set(given) - {*_ROPE_KEYS[kind], _ORIGINAL}):
            raise ValueError(
                f"rotary settings {unknown} are not known for rope_type={kind!r} "
                f"(known: {', '.join(_ROPE_KEYS[kind]) or 'none'}): remove them from "
                "config.json if they have no effect."
            )
        # Null means "not given"; transformers lets a top-level value win.
        given = {key: value for key, value in given.items() if value is not None}
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


@hinted_init
@dataclasses.dataclass(frozen=True)
class BeaconConfig:
    """Settings of the beacons (docs/specification.md sections 1 to 3).

    Attributes:
      window: W, raw tokens of a window.
      ratios: raw tokens per beacon to draw from; 0 leaves a window uncompressed.
      ratio_mix: "step-random", "instance-random", "sequence" or "adapt-F".
      param: letters of the projections that beacons have of their own.
      embed_init: "eos" or "bos", the token whose embedding a beacon starts from.
      sink: entries of the first window that are kept for ever.
      placement: "interleave" (after every ratio tokens) or "append" (after the window).
      parallel_window: windows that may run at once; a speed hint, results are as for 1.
      rank: 0, beacons have projections of their own, the release's form; above 0 they
        have low-rank changes of the base's: x W + (x A) B, A [D, rank], B [rank, out].
      anchor: "last", the keys and values that a low-rank beacon changes are those of
        the token in front of it, the last one it stands for, in place of its own x W;
        or "none", the release's form.
    """

    window: int = 1024
    ratios: tuple[int, ...] = (2, 4, 8)
    ratio_mix: str = "step-random"
    param: tuple[str, ...] = ("q", "k", "v")
    embed_init: str = "eos"
    sink: int = 0
    placement: str = "interleave"
    parallel_window: int = 1
    rank: int = 0
    anchor: str = "none"

    def __post_init__(self):
        for name in ("ratios", "param"):
            given = getattr(self, name)
            if isinstance(given, str) and name == "ratios":
                given = None
            if not isinstance(given, Iterable):
                example = "(2, 4, 8)" if name == "ratios" else '("q", "k", "v")'
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be a list, as in {example}."
                )
            whole = lambda x: hasattr(x, "__index__") and not isinstance(x, bool)
            given = (operator.index(x) if whole(x) else x for x in given)
            object.__setattr__(self, name, tuple(given))
        _check_positive(self, "window", "parallel_window")
        if self.window > 2**20:
            raise ValueError(f"window={self.window} must be at most {2**20}.")
        if not self.ratios:
            raise ValueError("ratios=() is empty: give at least one ratio.")
        _check_ratios(self.ratios, self.window)
        mixes = ("step-random", "instance-random", "sequence")
        if self.ratio_mix not in mixes and not re.fullmatch(
            r"adapt-\d+", str(self.ratio_mix)
        ):
            raise ValueError(
                f"ratio_mix={self.ratio_mix!r} is unknown: "
                f"{meant(self.ratio_mix, mixes)}use "
                f"{', '.join(mixes)} or adapt-F with F a number of tokens."
            )
        different = all(isinstance(p, str) for p in self.param)
        different = different and len(set(self.param)) == len(self.param)
        if not different or not set(self.param) <= set(PROJECTIONS):
            raise ValueError(
                f"param={self.param} must be different letters of {PROJECTIONS}."
            )
        check_choice("embed_init", self.embed_init, ("eos", "bos"))
        check_choice("placement", self.placement, ("interleave", "append"))
        check_choice("anchor", self.anchor, ("none", "last"))
        whole = isinstance(self.sink, int) and not isinstance(self.sink, bool)
        if not whole or not 0 <= self.sink <= self.window:
            raise ValueError(
                f"sink={self.sink!r} must be between 0 and window={self.window}."
            )
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not whole or self.rank < 0:
            raise ValueError(
                f"rank={self.rank!r} must be a whole number: 0 for projections of the "
                "beacons' own, or the rank of their changes of the base's, as 64."
            )
        if self.rank and not self.param:
            raise ValueError(
                f"rank={self.rank} and param=() leave nothing to change: name "
                "projections in param, or use rank=0."
            )
        if self.anchor != "none" and not self.rank:
            raise ValueError(
                f"anchor={self.anchor!r} with rank=0: a beacon changes its anchor's "
                "keys and values by matrices of a rank. Set rank, as in rank=64, or "
                "anchor='none'."
            )
        if self.anchor != "none" and self.placement != "interleave":
            raise ValueError(
                f"anchor={self.anchor!r} with placement={self.placement!r}: a beacon's "
                "anchor is the token in front of it. Use placement='interleave' or "
                "anchor='none'."
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self | None:
        """Reads the `beacon_*` fields; None if there are none."""
        given = {k: v for k, v in hf.items() if k in _BEACON_KEYS and v is not None}
        if not given:
            return None
        window = given.get("beacon_window", cls.window)
        for key, only in (
            ("beacon_stride", window),
            ("beacon_attn", "full-coverage"),
            ("beacon_attend_prev", True),
        ):
            value = given.get(key, only)
            if (value[0] if isinstance(value, list) else value) != only:
                raise ValueError(
                    f"{key}={value!r} is not supported: only {only!r} is "
                    f"(beacon_window={window}); such a model must be retrained."
                )
        fields: dict[str, Any] = {
            name: tuple(given[key]) if isinstance(given[key], list) else given[key]
            for key, name in _BEACON_KEYS.items()
            if name and key in given
        }
        if isinstance(fields.get("ratios"), int):
            fields["ratios"] = (fields["ratios"],)
        # A checkpoint's list may hold ratios for other windows: the release draws
        # from those that divide W. None that does is an error (from the constructor).
        ratios = fields.get("ratios", cls.ratios)
        usable = tuple(r for r in ratios if r >= 0 and (r == 0 or window % r == 0))
        if usable and usable != ratios:
            logger.warning(
                "beacon_ratio=%s: only %s divide beacon_window=%d and are used.",
                list(ratios),
                list(usable),
                window,
            )
            fields["ratios"] = usable
        return cls(**fields)

    def unset(self) -> list[str]:
        """Lists fields that the release does not have and that are as if not there."""
        names = ("rank", "anchor")
        return [x for x in names if getattr(self, x) == getattr(type(self), x)]

    def to_hf(self) -> dict[str, Any]:
        """Writes the `beacon_*` fields of config.json."""
        fields = {
            key: getattr(self, name) for key, name in _BEACON_KEYS.items() if name
        }
        for name in self.unset():  # the release's form has no such key
            del fields[f"beacon_{name}"]
        return {
            "beacon_attend_prev": True,
            "beacon_attn": "full-coverage",
            "beacon_stride": self.window,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
        }


# config.json key -> field; "" for those with a single supported value.
_BEACON_KEYS = {
    "beacon_window": "window",
    "beacon_stride": "",
    "beacon_attn": "",
    "beacon_attend_prev": "",
    "beacon_ratio": "ratios",
    "beacon_ratio_mix": "ratio_mix",
    "beacon_param": "param",
    "beacon_embed_init": "embed_init",
    "beacon_sink_size": "sink",
    "beacon_pos": "placement",
    "beacon_parallel_window": "parallel_window",
    "beacon_rank": "rank",
    "beacon_anchor": "anchor",
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama, Mistral or Qwen2 decoder and its beacons (None: a plain decoder).

    Sizes are V, D, F, L, N, K, H in the order of the fields. `max_position` is what
    config.json says; see `trained_positions` for what rotary scaling makes of it.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    beacon: BeaconConfig | None = None

    def __post_init__(self):
        object.__setattr__(self, "bos_ids", tuple(self.bos_ids))
        object.__setattr__(self, "eos_ids", tuple(self.eos_ids))
        check_choice("family", self.family, FAMILIES)
        _check_positive(self, *_SIZES.values())
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary halves).")
        # What a config.json of the family cannot say could not be written back.
        biases = (self.qkv_bias, self.o_bias, self.mlp_bias)
        if biases not in _BIASES[self.family]:
            raise ValueError(
                f"qkv_bias, o_bias, mlp_bias={biases} do not exist in family "
                f"{self.family!r}: use one of {sorted(_BIASES[self.family])}."
            )

    @property
    def trained_positions(self) -> int:
        """P, the positions that the model with its rotary scaling was trained for.

        max_position x factor for linear scaling, else the larger of max_position and
        original_max_position x factor (docs/specification.md section 3).
        """
        if self.rope.kind == "linear":
            return int(self.max_position * self.rope.factor)
        original = (self.rope.original_max_position or 0) * self.rope.factor
        return max(self.max_position, int(original))

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, ignore_sliding_window: bool = False
    ) -> Self:
        """Reads a config.json. Raises ValueError naming what is not supported."""
        family = _family(hf)
        config_keys.check(hf)
        hf = {**_DEFAULTS[family], **hf}
        if family == "mistral" and (hf.get("max_position_embeddings") or 0) > 4096:
            hf.setdefault("sliding_window", 4096)
        if hf.get("num_key_value_heads") is None and family != "mistral":
            hf["num_key_value_heads"] = hf.get("num_attention_heads")
        needed = [key for key in _SIZES if key != "head_dim"]
        if missing := [key for key in needed if hf.get(key) is None]:
            raise ValueError(f"config.json lacks {missing}: add them.")
        if hf.get("head_dim") is None:
            if hf["hidden_size"] % hf["num_attention_heads"]:
                raise ValueError(
                    f"hidden_size={hf['hidden_size']} is not a multiple of "
                    f"num_attention_heads={hf['num_attention_heads']}: add head_dim."
                )
            hf["head_dim"] = hf["hidden_size"] // hf["num_attention_heads"]
        if hf["hidden_act"] not in ("silu", "swish"):
            raise ValueError(
                f"hidden_act={hf['hidden_act']!r} is not supported: only silu is."
            )
        sliding = hf.get("sliding_window") is not None and hf["use_sliding_window"]
        layers = set(hf.get("layer_types") or ()) - {"full_attention"}
        if (sliding or layers) and not ignore_sliding_window:
            raise ValueError(
                f"sliding_window={hf.get('sliding_window')} is on "
                f"(layer_types {sorted(layers)}): sliding windows are not computed. "
                "Pass ignore_sliding_window to attend to everything instead, as the "
                "authors' release does, or set it to null in config.json."
            )
        llama = family == "llama"
        bias = bool(hf.get("attention_bias")) if llama else family == "qwen2"
        return cls(
            family=family,
            **{name: hf[key] for key, name in _SIZES.items()},
            rms_norm_eps=hf["rms_norm_eps"],
            rope=RopeConfig.from_hf(hf),
            tie_embeddings=bool(hf["tie_word_embeddings"]),
            qkv_bias=bias,
            o_bias=bias and llama,
            mlp_bias=bool(hf.get("mlp_bias")) and llama,
            bos_ids=_ids(hf.get("bos_token_id")),
            eos_ids=_ids(hf.get("eos_token_id")),
            beacon=BeaconConfig.from_hf(hf),
        )

    def to_hf(self, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes a config.json.

        Args:
          base: the original config.json, whose other keys (auto_map, torch_dtype ...)
            and spelling are kept. If it already says the same, it is returned as it is.
        """
        result = copy.deepcopy(dict(base or {}))
        if base is not None:
            before = type(self).from_hf(base, ignore_sliding_window=True)
            if before == self:
                return result
            if before.beacon != self.beacon:
                for key in _BEACON_KEYS:
                    result.pop(key, None)
                result |= self.beacon.to_hf() if self.beacon else {}
            if dataclasses.replace(before, beacon=self.beacon) == self:
                return result
            result.pop("rope_parameters", None)
        result |= {key: getattr(self, name) for key, name in _SIZES.items()}
        result |= self.rope.to_hf()
        result |= {
            "architectures": [a for a, f in ARCHITECTURES.items() if f == self.family],
            "model_type": self.family,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": _unpack(self.bos_ids),
            "eos_token_id": _unpack(self.eos_ids),
        }
        if self.family == "llama":
            result |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        elif base is None:
            result |= {"sliding_window": None, "use_sliding_window": False}
        return result | (self.beacon.to_hf() if self.beacon else {})


# config.json key -> field of ModelConfig, all positive integers.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position",
}
# What transformers takes for a key that config.json does not have.
_SHARED_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED_DEFAULTS | {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": _SHARED_DEFAULTS | {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": _SHARED_DEFAULTS | {"use_sliding_window": False, "sliding_window": 4096},
}
# Family -> the possible (qkv_bias, o_bias, mlp_bias).
_BIASES = {
    "llama": {(b, b, m) for b in (False, True) for m in (False, True)},
    "mistral": {(False, False, False)},
    "qwen2": {(True, False, False)},
}


def _family(hf: Mapping[str, Any]) -> str:
    named = [ARCHITECTURES.get(a, a) for a in hf.get("architectures") or ()]
    named += [hf["model_type"]] if "model_type" in hf else []
    if len(set(named)) != 1 or named[0] not in FAMILIES:
        raise ValueError(
            f"architectures={hf.get('architectures')}, "
            f"model_type={hf.get('model_type')!r} is not supported: config.json must "
            f"name one of {', '.join(ARCHITECTURES)} and its model_type."
        )
    return named[0]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _unpack(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else (ids[0] if ids else None)


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")


def _check_ratios(ratios: tuple[int, ...], window: int) -> None:
    """Raises ValueError unless each ratio is 0 or divides the window."""
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 0:
            raise ValueError(
                f"ratios={ratios} has {ratio!r}: give whole numbers that divide "
                f"window={window}, or 0 for windows that are not compressed."
            )
    bad = [ratio for ratio in ratios if ratio and window % ratio]
    if not bad:
        return
    choices: list[object] = [*divisors(window)]
    if len(choices) > 12:
        choices = [*choices[:11], f"... {window}"]
    step = math.lcm(*(r for r in ratios if r))
    below = window // step * step
    near = [str(w) for w in (below, below + step) if w]
    raise ValueError(
        f"window={window} and ratios={ratios} do not go together, "
        f"{', '.join(map(str, bad))} {'does' if len(bad) == 1 else 'do'} not divide "
        f"the window: use window={' or '.join(near)}, or ratios of "
        f"{', '.join(map(str, choices))} (0: not compressed)."
    )
