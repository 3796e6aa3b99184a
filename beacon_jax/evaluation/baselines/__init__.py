"""What beacons are compared with: a file per kind of method.

Each is a `Method`: it says which memory a past leaves, and nothing else. The decoder
reads that memory as it reads one of beacons, without knowing whose it is. Methods with
a ratio keep the bytes that beacons of this ratio keep, which `methods.remember` asserts
for every example.

    streaming, snapkv, kvzip,    what `Model.compress(method=...)` leaves without
    expected-attention,          beacons (`inference.compressors`)
    attention-matching,
    mean-pool, retention:FOLDER
    keep_head, _tail, _ends      only the first, the last, or half of each are read
    random, strided              some tokens, chosen blindly
    snapkv_aware                 what the question attends to: it alone sees it
    selective                    the tokens that the model would not have guessed
    text:module.function         what a compressor of text leaves (`baselines.text`)
    int8, beacon_int8            everything, or beacons, at their own bytes
    NAME_recent                  beacon or beacon_int8 with the last full window raw;
                                 others at the bytes of these beacons
                                 (retention_recent:FOLDER)

A method of one's own is a class in a file where the command is run, say `mine.py`:

    class Last(Method):
        family, per_ratio = "last", True

        def remember(self, model, past, following):
            last = [row[len(row) - len(row) // self.number :] for row in past]
            return select.read(model, last)

    python -m beacon_jax.evaluate --methods=beacon,mine:Last ...
"""

import functools
from collections.abc import Callable, Sequence

from beacon_jax.evaluation.baselines.sampling import Random, Strided
from beacon_jax.evaluation.baselines.shortened import (
    KeepEnds,
    KeepHead,
    KeepTail,
    Selective,
)
from beacon_jax.evaluation.baselines.text import (
    TextCompressor,
    text_compressor,
)
from beacon_jax.evaluation.baselines.untrained import (
    AttentionMatching,
    ExpectedAttention,
    KVzip,
    MeanPool,
    Retention,
    SnapKV,
    SnapKVAware,
    Streaming,
)
from beacon_jax.evaluation.methods import (
    RECENT,
    Beacon,
    BeaconInt8,
    Full,
    Int8,
    Method,
    WindowOnly,
)
from beacon_jax.names import imported, meant

FAMILIES: dict[str, type[Method]] = {
    m.family: m
    for m in (
        Beacon,
        Full,
        WindowOnly,
        Streaming,
        KeepHead,
        KeepTail,
        KeepEnds,
        Random,
        Strided,
        MeanPool,
        SnapKV,
        ExpectedAttention,
        KVzip,
        AttentionMatching,
        SnapKVAware,
        Selective,
        Int8,
        BeaconInt8,
    )
}

__all__ = ["FAMILIES", "Retention", "TextCompressor", "make_methods"]


def make_methods(names: Sequence[str], ratios: Sequence[int | str]) -> list[Method]:
    """The methods of --methods; those with a ratio once per ratio.

    Args:
      names: of FAMILIES, some also with "_recent" behind them; "text:module.function",
        a compressor of text (`baselines.text`); "module:Class", a `Method` of one's
        own.
      ratios: numbers, or "adapt": the release's rule by the length of each text.

    Raises:
      ValueError: an unknown name, a method that needs ratios and gets none, or two
        methods with one name.
    """
    made: list[Method] = []
    for name in names:
        make, per_ratio = _maker(name)
        if per_ratio and not ratios:
            raise ValueError(f"--methods={name} needs --ratios, for example 2,4,8.")
        made += [make(r) for r in ratios] if per_ratio else [make()]
    same = sorted({m.name for m in made if [o.name for o in made].count(m.name) > 1})
    if same:
        raise ValueError(
            f"--methods={','.join(names)} has several called {', '.join(same)}: name "
            "each once; results are kept by name."
        )
    return made


def _maker(name: str) -> tuple[Callable[..., Method], bool]:
    """What makes a method from its ratio, and whether it wants one."""
    if name.startswith("text:"):
        compress, label = text_compressor(name)
        return lambda ratio: TextCompressor(compress, label, ratio), True
    module, colon, attribute = name.partition(":")
    if module.removesuffix(RECENT) == Retention.family and attribute:
        kept = functools.partial(Retention, attribute)
        if module == Retention.family:
            return kept, True
        return lambda ratio: kept(ratio).with_recent(), True
    if module.removesuffix(RECENT) == Retention.family:
        raise ValueError(
            f"--methods={name} has weights of the model, which it does not name: give "
            f"{module}:FOLDER, a folder that `beacon-jax retain` wrote."
        )
    if colon:
        found = imported(f"--methods={name}", module, attribute, "module:Class")
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise ValueError(
                f"--methods={name} is no subclass of beacon_jax.evaluation.Method."
            )
        return found, found.per_ratio
    base = name.removesuffix(RECENT)
    if base != name and base in FAMILIES:
        found = FAMILIES[base]
        if not found.takes_recent:
            fit = [x for x, made in sorted(FAMILIES.items()) if made.takes_recent]
            raise ValueError(
                f"--methods={name}: {base} cannot have the bytes of beacons with a raw "
                f"last window: use one of {', '.join(x + RECENT for x in fit)}."
            )
        return lambda ratio: found(ratio).with_recent(), True
    if name not in FAMILIES:
        raise ValueError(
            f"--methods names {name!r}: {meant(name, FAMILIES)}Known are "
            f"{', '.join(sorted(FAMILIES))}, NAME_recent, retention:FOLDER, "
            "text:module.function and module:Class."
        )
    return FAMILIES[name], FAMILIES[name].per_ratio
