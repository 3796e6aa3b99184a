"""Counts what a run of `data.prepare` makes, and shows how far the run is."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from beacon_jax.data.examples import LONGER, SHORTER
from beacon_jax.data.heldout import HELD_OUT
from beacon_jax.data.prepared import DROPPED_LINES
from beacon_jax.data.shards import BYTES, EXAMPLES, FIRST, TOKENS, Job

COUNTS = ("rows", "examples", "tokens", "labelled", "cut")
EARLY_ROWS = 1_000  # after so many a run that drops too many stops at once


class Tally:
    """Counts of a run, shard after shard, and the share of bad rows among them."""

    def __init__(self, sources: Sequence[str], limit: float):
        self.limit = limit
        self.sources = [{"uri": uri, **dict.fromkeys(COUNTS, 0)} for uri in sources]
        self.drops: list[dict[str, Any]] = [{} for _ in sources]
        self.bad_rows: list[dict[str, str]] = []
        self._reports: dict[int, Path] = {}
        self._next = 0

    def add(self, job: Job) -> None:
        """Adds a finished shard.

        Shards are counted in order, so that where a run stops does not depend on which
        worker was faster.
        """
        self._reports[job.index] = job.report_path
        while self._next in self._reports:
            path = self._reports.pop(self._next)
            self._merge(json.loads(path.read_text(encoding="utf-8")))
            self._next += 1
            self.check(final=False)

    def _merge(self, report: dict[str, Any]) -> None:
        for source, counts in report["sources"].items():
            total = self.sources[int(source)]
            for key in COUNTS:
                total[key] += counts[key]
            for reason, drop in counts["drops"].items():
                new = {"rows": 0, "tokens": 0, "bad": drop["bad"], "first": []}
                merged = self.drops[int(source)].setdefault(reason, new)
                merged["rows"] += drop["rows"]
                merged["tokens"] += drop["tokens"]
                merged["first"] = (merged["first"] + drop["first"])[:FIRST]
        room = DROPPED_LINES - len(self.bad_rows)
        for where, reason in report["bad"][:room]:
            self.bad_rows.append({"where": where, "reason": reason})

    @property
    def examples(self) -> int:
        return sum(source["examples"] for source in self.sources)

    @property
    def tokens(self) -> int:
        return sum(source["tokens"] for source in self.sources)

    @property
    def rows(self) -> int:
        return sum(source["rows"] for source in self.sources)

    @property
    def bad(self) -> int:
        drops = (drop for reasons in self.drops for drop in reasons.values())
        return sum(drop["rows"] for drop in drops if drop["bad"])

    def check(self, *, final: bool) -> None:
        """Raises ValueError with the table if too many rows are bad or none is left."""
        enough = final or self.rows >= EARLY_ROWS
        if enough and self.bad > self.limit * self.rows:
            raise ValueError(
                f"{self.bad:,} of {'' if final else 'the first '}{self.rows:,} rows "
                f"are bad, more than data.max_drop_fraction={self.limit} allows:\n"
                f"{drop_table(self.manifest())}\n"
                "Correct them, or raise data.max_drop_fraction."
            )
        if final and not self.examples:
            table = drop_table(self.manifest())
            raise ValueError(
                f"no example is left of {self.rows:,} rows in data.sources="
                f"{[source['uri'] for source in self.sources]}"
                + (f":\n{table}" if table else ": they are empty.")
            )

    def manifest(self) -> dict[str, Any]:
        """Returns the counts that become part of manifest.json."""
        sources = [
            {**source, "drops": drops}
            for source, drops in zip(self.sources, self.drops, strict=True)
        ]
        total = {key: sum(source[key] for source in sources) for key in COUNTS}
        return {"total": {**total, "bad": self.bad}, "sources": sources}


def usage(manifest: dict[str, Any]) -> str:
    """Says what share of rows and tokens is used, and how to use more of them.

    Args:
      manifest: manifest of a prepared folder; an earlier version's does not count what
        was cut.
    """
    total, rules = manifest["total"], manifest["settings"]["rules"]
    drops: dict[str, list[int]] = {}
    for source in manifest["sources"]:
        for reason, drop in source["drops"].items():
            counts = drops.setdefault(reason, [0, 0])
            counts[0] += drop["rows"]
            counts[1] += drop.get("tokens", 0)
    used = total["rows"] - sum(rows for rows, _ in drops.values())
    if "cut" not in total:
        return f"rows: {used:,} of {total['rows']:,}; tokens: {si(total['tokens'])}"
    cut = total["cut"]
    seen = total["tokens"] + cut + sum(tokens for _, tokens in drops.values())
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
        if reason in drops:
            rows, tokens = drops[reason]
            lines.append(
                f"{si(tokens)} in {rows:,} rows {reason}={rules[key]:,}, left out"
            )
    if HELD_OUT in drops:
        lines.append(
            f"{drops[HELD_OUT][0]:,} rows {HELD_OUT} (data.heldout={rules['heldout']})"
        )
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


class ShardProgress:
    """Shows a line every `interval` seconds: examples, tokens, rate, MB, ETA."""

    def __init__(
        self,
        jobs: Sequence[Job],
        counters: Any,
        show: Callable[[str], None],
        interval: float = 5.0,
    ):
        self._counters, self._show, self._interval = counters, show, interval
        self._total = sum(job.size for job in jobs)
        self._before = sum(job.size for job in jobs if job.finished())
        self._began = self._last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self._last >= self._interval:
            self._last = now
            self._show(self.line(now - self._began))

    def line(self, elapsed: float) -> str:
        counters = self._counters
        examples, tokens, size = counters[EXAMPLES], counters[TOKENS], counters[BYTES]
        left = self._total - self._before - size
        eta = clock(left * elapsed / size) if size else "?"
        return (
            f"{examples:,} examples  {tokens:,} tokens  {tokens / elapsed:,.0f} tok/s  "
            f"{(self._before + size) / 1e6:,.0f}/{self._total / 1e6:,.0f} MB  ETA {eta}"
        )

    @contextlib.contextmanager
    def every_second(self) -> Iterator[None]:
        """Shows progress while this process works on a shard itself."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(1.0):
                self.show()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
