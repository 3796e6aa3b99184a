"""Counts what a compiled program sends between devices, from its HLO text.

A loop counts as often as XLA says that it runs (`known_trip_count`), or as the one
constant says that its condition compares a counter with (TPU programs say no more); of
a conditional the branch that sends most. Bytes are those of the result on one device.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ARRAY = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TWO = re.compile(r"(?:true|false)_computation=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":(\{[^}]*\})')


@dataclasses.dataclass(frozen=True)
class Sent:
    """What a program sends: how often, and how many bytes, by the kind of collective.

    Attributes:
      loops: whether every loop that sends anything says how often it runs.
    """

    counts: Counter[str]
    bytes: Counter[str]
    loops: bool = True


def sent(text: str) -> Sent:
    """Counts the collectives of a compiled program.

    Raises:
      ValueError: `text` is no HLO module.
    """
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("text has no ENTRY computation: give compiled.as_text().")
    known: dict[str, Sent] = {}

    def of(name: str) -> Sent:
        if name not in known:
            counts, size, loops = Counter(), Counter(), True
            for line in bodies[name]:
                for part, times in _parts(line, of, bodies):
                    loops &= part.loops and (times is not None or not part.counts)
                    for kind in part.counts:
                        counts[kind] += part.counts[kind] * (times or 1)
                        size[kind] += part.bytes[kind] * (times or 1)
            known[name] = Sent(counts, size, loops)
        return known[name]

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Returns the lines of each computation, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry = name = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _parts(
    line: str, of: Callable[[str], Sent], bodies: dict[str, list[str]]
) -> Iterator[tuple[Sent, int | None]]:
    """Yields what a line sends, or what it calls, and how often (None: not known)."""
    found = _OPERATION.match(line)
    if not found:
        return
    shape, kind = found.groups()
    base = kind.removesuffix("-start")
    if base in COLLECTIVES:
        size = _bytes(shape)
        # What is started returns its operands, too.
        size //= 2 if kind != base and base != "all-reduce" else 1
        yield Sent(Counter({base: 1}), Counter({base: size})), 1
        return
    if kind == "conditional":
        names = [n.strip(" %") for x in _BRANCHES.findall(line) for n in x.split(",")]
        branches = [of(name) for name in names or _TWO.findall(line)]
        yield max(branches, key=lambda x: sum(x.bytes.values())), 1
        return
    times: int | None = 1
    if kind == "while":
        times = _trips(line, bodies)
    for name in _CALLED.findall(line):
        yield of(name), times


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """Returns how often a loop runs; None: it does not say."""
    if said := _TRIPS.search(line):
        return int(json.loads(said[1])["n"])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    body = "\n".join(bodies.get(condition[1], ()) if condition else ())
    numbers = re.findall(r"constant\((\d+)\)", body)
    counts_up = "direction=LT" in body and len(numbers) == 1
    return int(numbers[0]) if counts_up else None


def _bytes(shape: str) -> int:
    arrays = _ARRAY.findall(shape)
    sizes = (
        _SIZES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in arrays
    )
    return sum(sizes)
