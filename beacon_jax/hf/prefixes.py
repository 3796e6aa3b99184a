"""Names of tensors as wrappers and base-model classes save them.

A wrapper of PyTorch puts its name in front of all others, or inside of them:
`module.model.layers.0...` (DataParallel), `_orig_mod.` (torch.compile), or of two of
them. A class without a head (LlamaModel) leaves `model.` away.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from beacon_jax.names import short

_LAYER = re.compile(
    r"(?P<head>.*?)layers\.\d+\.(?P<inner>.*?)(self_attn|mlp|\w+_layernorm)\."
)
_BARE = ("layers.", "embed_tokens.", "norm.", "beacon_embed_tokens.")


def stripped(name: str, strip_prefix: str) -> str:
    """Returns a tensor's name without prefixes, and with the `model.` that it lacks.

    Args:
      strip_prefix: what is left out in front of the name and of its parts, several
        separated by commas or blanks; each ends at a dot, also one without its own.
        Empty: nothing.
    """
    parts = (part.strip(".") for part in re.split(r"[,\s]+", strip_prefix))
    for prefix in [f"{part}." for part in parts if part]:
        name = name.removeprefix(prefix).replace(f".{prefix}", ".")
    return f"model.{name}" if name.startswith(_BARE) else name


def advice(
    found: Iterable[str], expected: Mapping[str, Any], *, adapter: bool = False
) -> str:
    """Says which prefix to strip; "" if that does not make more names fit.

    Args:
      found: names of a checkpoint's tensors.
      expected: those of the model, as keys.
      adapter: they are beacons alone, which are always named by `convert`.
    """
    found = list(found)
    prefix = _guess(found)
    if prefix is None:
        return ""
    new = {stripped(name, prefix) for name in found}
    if len(new & expected.keys()) <= len(expected.keys() & set(found)):
        return ""
    changed = next(name for name in found if stripped(name, prefix) != name)
    if prefix:
        said = f"with {prefix} in front or inside, as a wrapper of PyTorch saves them"
    else:
        said = "without model. in front, as a class without a head saves them"
    said = f"tensors are named {said} (the first is {short(changed)}): "
    head = "lm_head.weight"
    if head in expected and head not in new and not prefix:
        return f"{said}there is no {head} either. Save the model as ...ForCausalLM."
    if adapter:
        return f"{said}write the folder again (convert to-hf --adapter)."
    option = f"--strip_prefix={prefix}"
    return (
        f"{said}pass {option} to `convert from-hf`, or strip_prefix={prefix!r} to load."
    )


def _guess(names: list[str]) -> str | None:
    """Returns what layers have in front, "" if they lack `model.`, None for nothing."""
    prefixes: dict[str, None] = {}
    bare = False
    for match in filter(None, map(_LAYER.match, names)):
        head = match["head"]
        outer = "" if head == "model." else head.removesuffix("model.")
        prefixes |= dict.fromkeys(part for part in (outer, match["inner"]) if part)
        bare |= not head
    return ",".join(prefixes) if prefixes else "" if bare else None
