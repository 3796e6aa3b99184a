"""Counts what becomes of rows: in a shard, and in a prepared folder."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beacon_jax.data.examples import EXPECTED, LONGER, SHORTER, Made
from beacon_jax.data.fields import not_read
from beacon_jax.data.heldout import HELD_OUT
from beacon_jax.data.prepared import COUNTS, DROPPED_LINES
from beacon_jax.forms import Count, unlike
from beacon_jax.paths import read_object

FIRST = 5  # places that are named for every reason
BAD_ROWS = 1_000  # bad rows of a shard that dropped.jsonl may hold
# Of a source: reasons are told apart by what stands behind their colon, and unread
# fields by name, as long as there are so few.
KINDS = 50
OTHERS = "other fields"
EARLY_ROWS = 1_000  # after so many a run that drops too many stops at once
# Forms of what a shard counts.
_DROP = {"rows": Count, "tokens": Count, "bad": bool, "first": [str]}
_COUNTED = {
    **dict.fromkeys(COUNTS, Count),
    "drops": {str: _DROP},
    "unread?": {str: Count},
}


def _counts() -> dict[str, Any]:
    return {**dict.fromkeys(COUNTS, 0), "drops": {}, "unread": {}}


def _dropped(counts: dict[str, Any], reason: str, bad: bool) -> dict[str, Any]:
    """Returns the counts of one reason to leave out rows of a source."""
    new = {"rows": 0, "tokens": 0, "bad": bad, "first": []}
    if len(counts["drops"]) >= KINDS and reason not in counts["drops"]:
        reason = reason.partition(":")[0]
    return counts["drops"].setdefault(reason, new)


def _unread(counts: dict[str, Any], name: str, rows: int) -> None:
    """Counts rows of a source with a field that is not read."""
    unread = counts["unread"]
    name = name if name in unread or len(unread) < KINDS else OTHERS
    unread[name] = unread.get(name, 0) + rows


class ShardCounts:
    """The counts of a shard.

    Attributes:
      value: {"sources": {number: counts}, "bad": [[where, reason], ...], "largest":
        the largest token id, -1 without examples}, as JSON.
    """

    def __init__(self):
        self.value: dict[str, Any] = {"sources": {}, "bad": [], "largest": -1}

    def add(self, source: int, where: str, made: Made) -> None:
        """Counts a row and what became of it."""
        counts = self.value["sources"].setdefault(str(source), _counts())
        counts["rows"] += 1
        for name in made.unread:
            _unread(counts, name, 1)
        if not made.reason:
            counts["examples"] += len(made.examples)
            counts["tokens"] += sum(len(x.tokens) for x in made.examples)
            counts["labelled"] += sum(int(x.labelled.sum()) for x in made.examples)
            counts["cut"] += made.lost
            ends = [int(x.tokens.max()) for x in made.examples]
            self.value["largest"] = max(self.value["largest"], *ends)
            return
        bad = made.reason not in EXPECTED
        drop = _dropped(counts, made.reason, bad)
        drop["rows"] += 1
        drop["tokens"] += made.lost
        drop["first"] = [*drop["first"], where][:FIRST]
        if bad and len(self.value["bad"]) < BAD_ROWS:
            self.value["bad"].append([where, made.reason])


class Tally:
    """The counts of a folder, shard after shard, and the share of bad rows in them.

    Attributes:
      sources: counts of each source, with its URI.
      bad_rows: {"where", "reason"} of the first DROPPED_LINES bad rows.
      largest: the largest token id; None: a shard of an earlier version did not say.
    """

    def __init__(self, sources: Sequence[str], limit: float):
        self.sources = [{"uri": uri, **_counts()} for uri in sources]
        self.bad_rows: list[dict[str, str]] = []
        self.largest: int | None = -1
        self._limit = limit
        self._reports: dict[int, Path] = {}
        self._next = 0

    def add(self, shard: int, report: Path) -> None:
        """Adds a finished shard by its number and the file of its `ShardCounts`.

        Shards are counted in order, so that where a run stops does not depend on which
        worker was faster.
        """
        self._reports[shard] = report
        while self._next in self._reports:
            path = self._reports.pop(self._next)
            self._merge(self._read(path))
            self._next += 1
            self.check(final=False)

    def _read(self, path: Path) -> dict[str, Any]:
        """Reads the counts of a shard, which an interrupted run may have written."""
        report = read_object(path)
        names = {f"{i}?": _COUNTED for i in range(len(self.sources))}
        form = {"sources": names, "bad": [[str]], "largest?": int}
        wrong = unlike(report, form, "report")
        if not wrong and not {*report["sources"]} <= {x[:-1] for x in names}:
            wrong = "it counts rows of other sources"
        if wrong or any(len(row) != 2 for row in report["bad"]):
            raise ValueError(
                f"{path} is damaged{wrong and ', '}{wrong}: remove it, and the same "
                "command makes its shard again."
            )
        return report

    def _merge(self, report: dict[str, Any]) -> None:
        for source, counts in report["sources"].items():
            total = self.sources[int(source)]
            for key in COUNTS:
                total[key] += counts[key]
            for reason, drop in counts["drops"].items():
                merged = _dropped(total, reason, drop["bad"])
                merged["rows"] += drop["rows"]
                merged["tokens"] += drop["tokens"]
                merged["first"] = (merged["first"] + drop["first"])[:FIRST]
            for name, rows in counts.get("unread", {}).items():
                _unread(total, name, rows)
        if self.largest is not None:
            known = "largest" in report
            self.largest = max(self.largest, report["largest"]) if known else None
        room = DROPPED_LINES - len(self.bad_rows)
        for where, reason in report["bad"][:room]:
            self.bad_rows.append({"where": where, "reason": reason})

    def total(self) -> dict[str, int]:
        """Returns the sums over all sources of COUNTS and of "bad" rows."""
        total = {key: sum(source[key] for source in self.sources) for key in COUNTS}
        drops = (drop for source in self.sources for drop in source["drops"].values())
        return {**total, "bad": sum(drop["rows"] for drop in drops if drop["bad"])}

    def check(self, *, final: bool) -> None:
        """Raises ValueError with the table if too many rows are bad or none is left."""
        total, table = self.total(), drop_table({"sources": self.sources})
        rows, bad = total["rows"], total["bad"]
        if (final or rows >= EARLY_ROWS) and bad > self._limit * rows:
            raise ValueError(
                f"{bad:,} of {'' if final else 'the first '}{rows:,} rows "
                f"are bad, more than data.max_drop_fraction={self._limit} allows:\n"
                f"{table}\n"
                "Correct them, or raise data.max_drop_fraction."
            )
        if final and not total["examples"]:
            raise ValueError(
                f"no example is left of {rows:,} rows in data.sources="
                f"{[source['uri'] for source in self.sources]}"
                + (f":\n{table}" if table else ": they are empty.")
            )


def usage(manifest: dict[str, Any]) -> str:
    """Says what share of rows and tokens is used, and how to use more of them.

    Args:
      manifest: manifest of a prepared folder; an earlier version's does not count what
        was cut.
    """
    total, rules = manifest["total"], manifest["settings"]["rules"]
    rows_of, tokens_of = Counter[str](), Counter[str]()  # by the reason
    unread = Counter[str]()
    for source in manifest["sources"]:
        unread.update(source.get("unread", {}))
        for reason, drop in source["drops"].items():
            rows_of[reason] += drop["rows"]
            tokens_of[reason] += drop.get("tokens", 0)
    used = total["rows"] - rows_of.total()
    if "cut" not in total:
        return f"rows: {used:,} of {total['rows']:,}; tokens: {si(total['tokens'])}"
    cut = total["cut"]
    seen = total["tokens"] + cut + tokens_of.total()
    share = f" ({percent(total['tokens'], seen)})" if seen else ""
    lines = [
        f"rows: {used:,} of {total['rows']:,}; "
        f"tokens: {si(total['tokens'])} of {si(seen)}{share}"
    ]
    if cut and rules["long"] == "split":
        lines.append(
            f"{si(cut)} in ends of long texts shorter than min_length="
            f"{rules['min_length']:,}: data.min_length=0 keeps them"
        )
    elif cut:
        lines.append(
            f"{si(cut)} cut off beyond max_length={rules['max_length']:,}: "
            "data.long='split' keeps them"
        )
    for reason, key in ((LONGER, "max_length"), (SHORTER, "min_length")):
        if reason in rows_of:
            lines.append(
                f"{si(tokens_of[reason])} in {rows_of[reason]:,} rows "
                f"{reason}={rules[key]:,}, left out"
            )
    if HELD_OUT in rows_of:
        lines.append(
            f"{rows_of[HELD_OUT]:,} rows {HELD_OUT} (data.heldout={rules['heldout']})"
        )
    if unread:
        lines.append(f"not read: {not_read(unread)}")
    return "; ".join(lines)


def si(count: int) -> str:
    """Returns a count of tokens as people read it: 812, 36k, 2.1M."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit * 0.9995:
            value = count / unit
            return f"{value:.1f}{name}" if value < 9.95 else f"{value:.0f}{name}"
    return str(count)


def percent(part: int, whole: int) -> str:
    """Returns a share in percent, never 100 % or 0 % of what is not all or nothing."""
    percent = round(100 * part / whole)
    if 0 < part < whole:
        percent = min(max(percent, 1), 99)
    return f"{percent} %"


def drop_table(manifest: dict[str, Any]) -> str:
    """Lists rows left out by source and reason, most first, with the first places."""
    lines = []
    for source in manifest["sources"]:
        drops = source["drops"].items()
        for reason, drop in sorted(drops, key=lambda x: (-x[1]["rows"], x[0])):
            kind = "bad" if drop["bad"] else "rule"
            first = ", ".join(drop["first"][:3])
            lines.append(f"{drop['rows']:>10,}  {kind:<4}  {reason}  (first: {first})")
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """Returns a duration as "3:05", or "1:03:05" from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
