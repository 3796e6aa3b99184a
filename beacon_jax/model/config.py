"""Model and beacon configuration, read from and written to HF `config.json`.

Every dataclass is frozen and hashable (lists become tuples). What cannot be represented
exactly is an error, never a silent default: a model with a wrong rotary type or sliding
window would run and be subtly wrong.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from beacon_jax.model import config_keys
from beacon_jax.model.rope_config import RopeConfig
from beacon_jax.names import check_choice, hinted_init, meant

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# The families as messages name them.
NAMED = "Llama, Mistral, Qwen2 or Qwen3"
# What to do with a model of such a base that has another head.
BASE = (
    "which writes no text: use its base model, the ...ForCausalLM it was trained from"
)
_HEADED = re.compile(r"For\w+(Classification|Answering)|Reward|Score|ValueHead|Critic")
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
                f"param={self.param} must be different letters of {PROJECTIONS}, as "
                "param=q,k,v."
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
        keys = config_keys.BEACON
        given = {k: hf[k] for k in keys if hf.get(k) is not None}
        if not given:
            return None
        window = given.get("beacon_window", cls.window)
        for key, only in (
            ("beacon_stride", window),
            ("beacon_attn", "full-coverage"),
            ("beacon_attend_prev", True),
        ):
            value = given.get(key, only)
            if (value[:1] if isinstance(value, list) else [value]) != [only]:
                raise ValueError(
                    f"{key}={value!r} is not supported: only {only!r} is "
                    f"(beacon_window={window}); such a model must be retrained."
                )
        fields: dict[str, Any] = {
            name: tuple(given[key]) if isinstance(given[key], list) else given[key]
            for key, name in keys.items()
            if name and key in given
        }
        if isinstance(fields.get("ratios"), int):
            fields["ratios"] = (fields["ratios"],)
        # A checkpoint's list may hold ratios for other windows: the release draws
        # from those that divide W. None that does is an error (from the constructor).
        ratios = fields.get("ratios", cls.ratios)
        usable = tuple(r for r in ratios if r <= 0 or window % r == 0)
        if usable and usable != ratios:
            logger.warning(
                "beacon_ratio=%s: only %s divide beacon_window=%d and are used.",
                list(ratios),
                list(usable),
                window,
            )
            fields["ratios"] = usable
        with _named(keys):
            return cls(**fields)

    def unset(self) -> list[str]:
        """Lists fields that the release does not have and that are as if not there."""
        names = ("rank", "anchor")
        return [x for x in names if getattr(self, x) == getattr(type(self), x)]

    def to_hf(self) -> dict[str, Any]:
        """Writes the `beacon_*` fields of config.json."""
        fields = {
            key: getattr(self, name) for key, name in config_keys.BEACON.items() if name
        }
        for name in self.unset():  # the release's form has no such key
            del fields[f"beacon_{name}"]
        return {
            "beacon_attend_prev": True,
            "beacon_attn": "full-coverage",
            "beacon_stride": self.window,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
        }


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama, Mistral, Qwen2 or Qwen3 decoder and its beacons (None: a plain one).

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
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
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
        if not 0 < self.rms_norm_eps < 1:
            raise ValueError(
                f"rms_norm_eps={self.rms_norm_eps!r} must be above 0 and below 1."
            )
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
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head, in front of rotary."""
        return self.family == "qwen3"

    @property
    def trained_positions(self) -> int:
        """P, the positions that the model with its rotary scaling was trained for.

        Linear and llama3 scaling: max_position if it is above original_max_position,
        so that it is the scaled length (Llama-3.1, 3.2), else that times the factor. A
        config with linear scaling mostly names no original, and max_position x factor
        is what it means by transformers' documentation and in the release. Yarn: the
        larger of both, as neither Qwen2.5 nor Yarn-Mistral has the scaled length
        (docs/specification.md section 3).
        """
        rope, stated = self.rope, self.max_position
        original = rope.original_max_position or 0
        if rope.kind == "linear" and not original:
            return int(stated * rope.factor)
        if rope.kind in ("linear", "llama3") and stated > original:
            return stated
        return max(stated, int(original * rope.factor))

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, ignore_sliding_window: bool = False
    ) -> Self:
        """Reads a config.json. Raises ValueError naming what is not supported."""
        hf = config_keys.spelt(hf)
        config_keys.check_types(hf)
        family = hf["model_type"] = _family(hf)
        config_keys.check(hf)
        hf = {**_DEFAULTS[family], **hf}
        if hf["use_sliding_window"] is None:
            hf["use_sliding_window"] = _DEFAULTS[family]["use_sliding_window"]
        if family == "mistral" and (hf.get("max_position_embeddings") or 0) > 4096:
            hf.setdefault("sliding_window", 4096)
        if hf.get("num_key_value_heads") is None and family != "mistral":
            hf["num_key_value_heads"] = hf.get("num_attention_heads")
        needed = [key for key in _SIZES if key != "head_dim"]
        if missing := [key for key in needed if hf.get(key) is None]:
            raise ValueError(f"config.json lacks {missing}: add them.")
        if hf.get("head_dim") is None:
            if hf["num_attention_heads"] < 1:
                raise ValueError(
                    f"config.json has num_attention_heads={hf['num_attention_heads']}: "
                    "it must be above 0."
                )
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
        if not ignore_sliding_window:
            _check_window(hf, family)
        bias = (
            bool(hf.get("attention_bias"))
            if family in STATE_BIASES
            else family == "qwen2"
        )
        beacon = BeaconConfig.from_hf(hf)
        with _named(_SIZES):
            return cls(
                family=family,
                **{name: hf[key] for key, name in _SIZES.items()},
                rms_norm_eps=hf["rms_norm_eps"],
                rope=RopeConfig.from_hf(hf),
                tie_embeddings=bool(hf["tie_word_embeddings"]),
                qkv_bias=bias,
                o_bias=bias and family in STATE_BIASES,
                mlp_bias=bool(hf.get("mlp_bias")) and family == "llama",
                bos_ids=_ids(hf, "bos_token_id"),
                eos_ids=_ids(hf, "eos_token_id"),
                beacon=beacon,
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
                for key in config_keys.BEACON:
                    result.pop(key, None)
                result |= self.beacon.to_hf() if self.beacon else {}
            if dataclasses.replace(before, beacon=self.beacon) == self:
                return result
            for key in ("rope_parameters", *sum(config_keys.ALIASES.values(), ())):
                result.pop(key, None)
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
        if self.family in STATE_BIASES:
            result["attention_bias"] = self.qkv_bias
        if self.family == "llama":
            result["mlp_bias"] = self.mlp_bias
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
    "qwen3": _SHARED_DEFAULTS
    | {"use_sliding_window": False, "sliding_window": 4096, "head_dim": 128},
}
# Families whose attention_bias says whether q, k, v and o have biases.
STATE_BIASES = ("llama", "qwen3")
# Family -> the possible (qkv_bias, o_bias, mlp_bias).
_BIASES = {
    "llama": {(b, b, m) for b in (False, True) for m in (False, True)},
    "mistral": {(False, False, False)},
    "qwen2": {(True, False, False)},
    "qwen3": {(b, b, False) for b in (False, True)},
}


@contextlib.contextmanager
def _named(keys: Mapping[str, str]) -> Iterator[None]:
    """Names keys of config.json in an error about fields.

    Args:
      keys: key -> field.
    """
    try:
        yield
    except ValueError as error:
        names = {field: key for key, field in keys.items() if field}
        text = str(error)
        for field, key in names.items():
            text = re.sub(rf"\b{field}=", f"{key}=", text)
        raise ValueError(text) from error


def _family(hf: Mapping[str, Any]) -> str:
    named = [str(ARCHITECTURES.get(a, a)) for a in hf.get("architectures") or ()]
    if (kind := hf.get("model_type")) is not None:
        named.append(kind)
    if len(set(named)) == 1 and named[0] in FAMILIES:
        return named[0]
    if headed := [name for name in named if _HEADED.search(name)]:
        raise ValueError(
            f"architectures={hf.get('architectures')}: {headed[0]} is a classifier or "
            f"a reward model, {BASE}."
        )
    experts = any("moe" in n.lower() or "mixtral" in n.lower() for n in named)
    kind = ", a mixture of experts," if experts else ""
    remedy = "give a model of one of these families"
    if not named or set(named) & set(FAMILIES):
        remedy = "config.json must name one of them and its model_type"
    raise ValueError(
        f"architectures={hf.get('architectures')}, "
        f"model_type={hf.get('model_type')!r}{kind} is not supported, only "
        f"{', '.join(ARCHITECTURES)} are: {remedy}."
    )


def _check_window(hf: Mapping[str, Any], family: str) -> None:
    """Raises ValueError if some layers attend to a window only.

    In Qwen2 and Qwen3 those from max_window_layers on do, or those that layer_types
    names.
    """
    qwen = family in ("qwen2", "qwen3")
    window = hf.get("sliding_window") if hf["use_sliding_window"] else None
    first, layers = hf.get("max_window_layers"), hf.get("layer_types")
    if qwen and layers is None:
        first = 28 if first is None else first  # of transformers
        window = None if first >= hf["num_hidden_layers"] else window
    elif qwen and "sliding_attention" not in (layers or ()):
        window = None
    layers = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    if window is not None and window < 1:
        raise ValueError(
            f"sliding_window={window} is no window, in which a token sees itself at "
            "least. If the model attends to everything, set it to null in config.json."
        )
    if window is not None or layers:
        of = f", layer_types has {', '.join(layers)}" if layers else ""
        raise ValueError(
            f"sliding_window={window} is on{of}: sliding windows are not computed. "
            "Pass ignore_sliding_window=True to attend to everything instead, as the "
            "authors' release does; commands read what `convert` writes with "
            "--ignore_sliding_window. Or set it to null in config.json."
        )


def _ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Reads tokens' ids; those that the model has no embedding of are left out."""
    value = hf.get(key)
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    known = tuple(i for i in ids if i < hf["vocab_size"])
    if known != ids:
        beyond = ", ".join(str(i) for i in ids if i not in known)
        _warn_once(
            f"config.json has {key}={beyond}, and ids below vocab_size="
            f"{hf['vocab_size']}: left out."
        )
    return known


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


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
