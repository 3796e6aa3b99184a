"""Files that weights are in: those that an index names, and those that are numbered.

A name such as model-00001-of-00003.safetensors says how many there are.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from beacon_jax.names import short
from beacon_jax.paths import LONGEST, is_there, read_object

# Kind -> the single file of that kind, and the beginning of its index's name.
STEMS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
_SHARD = re.compile(
    r"(.+)-(\d{1,5})-of-(\d{1,5})\.(safetensors|bin)", re.ASCII | re.DOTALL
)


def is_below(name: str) -> bool:
    """Tells whether a name is one of a file in a folder or below it, nowhere else."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and name.isprintable()
        and not name.startswith("/")
        and ".." not in parts
        and all(len(part.encode()) <= LONGEST for part in parts)
    )


def weight_map(index: Path) -> dict[str, str]:
    """Reads {tensor: file} of an index; files may lie in folders below it.

    Raises:
      ValueError: it is none, or names what is not below its folder.
    """
    found = read_object(index).get("weight_map")
    remedy = "Download it again, or delete it beside a complete file of weights."
    if not isinstance(found, dict):
        raise ValueError(
            f"{index}: weight_map must be an object of names of files. {remedy}"
        )
    for name in found.values():
        if not isinstance(name, str) or not is_below(name):
            raise ValueError(
                f"{index}: weight_map has {short(repr(name))}, which names no file in "
                f"the index's folder or below it. {remedy}"
            )
    return {key: PurePosixPath(name).as_posix() for key, name in found.items()}


@dataclasses.dataclass
class Shards:
    """Files of one model that are numbered.

    Attributes:
      model: "model-*-of-00003.safetensors".
      found, absent: names of those that are there, and are not, in order.
    """

    model: str
    found: list[str]
    absent: list[str]


def numbered(names: Iterable[str]) -> list[Shards]:
    """Finds the shards among the names of a folder's files, model by model."""
    models: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in sorted(names):
        if match := _SHARD.fullmatch(name):
            stem, number, count, kind = match.groups()
            if 1 <= int(number) <= int(count):
                models.setdefault((stem, count, kind), {})[int(number)] = name
    result = []
    for (stem, count, kind), found in models.items():
        model = f"{stem}-*-of-{count}.{kind}"
        absent = [
            f"{stem}-{str(i).zfill(len(count))}-of-{count}.{kind}"
            for i in range(1, int(count) + 1)
            if i not in found
        ]
        result.append(Shards(model, [found[i] for i in sorted(found)], absent))
    return result


def complete(folder: Path, kind: str) -> list[Path]:
    """Returns the shards of a model that are all there, though not their index.

    Args:
      kind: "safetensors" or "bin".

    Raises:
      ValueError: there are two such models, or a shard is a folder or a broken link.
    """
    names = [path.name for path in folder.glob(f"*.{kind}")]
    # "consolidated": of Mistral, in another layout.
    whole = [
        x
        for x in numbered(names)
        if not (x.absent or x.model.startswith("consolidated"))
    ]
    if len(whole) > 1:
        raise ValueError(
            f"{folder} has the shards of {len(whole)} models and no index, "
            f"{' and '.join(x.model for x in whole)}: move all but one away, or fetch "
            f"the index ({STEMS[kind]}.index.json) of the same repository."
        )
    found = [folder / name for x in whole for name in x.found]
    return [path for path in found if is_there(path)]


def incomplete(names: Iterable[str]) -> str:
    """Says which shards of a model are not there; "" if there is no such model."""
    for x in numbered(names):
        if x.absent:
            more = f" and {len(x.absent) - 4} more" if len(x.absent) > 4 else ""
            return (
                f"{len(x.found)} of the {len(x.found) + len(x.absent)} files "
                f"{x.model}, without {', '.join(x.absent[:4])}{more}"
            )
    return ""
