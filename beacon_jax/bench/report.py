"""Tables from the rows of a bench.json, and their place in docs/benchmarks.md."""

import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beacon_jax.bench.records import Row
from beacon_jax.evaluation.report import table

Columns = dict[str, Callable[[Row], Any]]
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# Shown per key, in this order; what is not in a key is left out.
NAMES = ("preset", "way", "implementation", "method", "length", "queries")
SIZES = ("memory", "live", "batch", "window")


def by_column(columns: Columns, rows: Sequence[Row]) -> str:
    """Makes a Markdown table; a column has a title and what it shows of a row."""
    cells = [[show(row) for show in columns.values()] for row in rows]
    return table(list(columns), cells)


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Groups rows by what their keys say of `names`; None where one says nothing."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row["key"].get(n) for n in names), []).append(row)
    return found


def line(row: Row) -> str:
    """Says a row in one line, for the terminal."""
    key = row["key"]
    what = [str(key[name]) for name in NAMES if name in key]
    what += [f"{name}={key[name]}" for name in SIZES if name in key]
    text = " ".join([key["part"], *what])
    if row["status"] != "ok":
        return f"{text}: {row['status']}: {row['reason']}"
    if key["part"] == "peaks":
        return f"{text}: {_flops(row['tflops'])}, {row['bandwidth_gbs']:.4g} GB/s"
    if key["part"] == "parity":
        return f"{text} {key['dtype']}: {_error(row)}"
    return f"{text}: {_seconds(row)}, {_rate(row)}"


def _error(row: Row) -> str:
    """Says the largest error and what is allowed for it."""
    shares = {k: error / row["allowed"][k] for k, error in row["errors"].items()}
    worst = max(shares, key=shares.__getitem__)
    return f"{worst} {row['errors'][worst]:.2g} of {row['allowed'][worst]:.2g} allowed"


def unit_of(seconds: float) -> tuple[float, str]:
    """Returns how many of the unit that fits are a second, and its name."""
    units = ((1, "s", 1.0), (1e3, "ms", 1e-3), (1e6, "µs", 0.0))
    return next((scale, unit) for scale, unit, least in units if seconds >= least)


def _seconds(row: Row) -> str:
    """Says median and spread in the unit that fits."""
    t = row["seconds"]
    scale, unit = unit_of(t["median_s"])
    low, middle, high = (scale * t[k] for k in ("min_s", "median_s", "max_s"))
    return f"{middle:.3g} {unit} [{low:.3g}, {high:.3g}]"


def _rate(row: Row) -> str:
    part, way = row["key"]["part"], row["key"].get("way")
    if part == "decode" or way == "decode":
        rate = f"{row['gbs']:.3g} GB/s"
        tokens = row.get("tokens_per_second")
        return f"{tokens:,.4g} tokens/s, {rate}" if tokens else rate
    return _flops(row["tflops"])


def _flops(tflops: float) -> str:
    """Writes a rate in the unit that fits: a CPU has 0.1 TFLOP/s."""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.3g} GFLOP/s"


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["key"]["part"] == part]


def peaks(rows: Sequence[Row]) -> dict[str, Row]:
    """Returns the measured peaks by dtype."""
    found = [row for row in _of(rows, "peaks") if row["status"] == "ok"]
    return {row["key"]["dtype"]: row for row in found}


def _share(row: Row, known: dict[str, Row], rate: str, peak: str) -> str:
    top = known.get(row["key"]["dtype"])
    return f"{row[rate] / top[peak]:.0%}" if top else "–"


def _bytes(value: float | None) -> str:
    """Writes a size in the unit that fits; a dash for what nobody tells."""
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size / 10:
            return f"{value / size:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def sections(rows: Sequence[Row]) -> list[str]:
    """Makes Markdown tables of the parts that were measured."""
    known = peaks(rows)
    made = [_peaks(known), _parity(rows), _prefill(rows, known), _decode(rows, known)]
    made += [_train(rows, known), _kernels(rows, known)]
    return [text for text in made if text]


def _peaks(known: dict[str, Row]) -> str:
    return "\n".join(
        f"Measured in the same run, {dtype}: matrix product of {row['matmul']} squared "
        f"{_flops(row['tflops'])}, copy of {_bytes(row['copied_bytes'])} "
        f"{row['bandwidth_gbs']:.4g} GB/s (what fits into a cache can be faster)."
        for dtype, row in known.items()
    )


def _part(title: str, rows: Sequence[Row], what: Columns, found: Columns) -> str:
    """Makes the table of a part.

    Args:
      what: columns that say what was measured, from a row's key.
      found: those of what was found; of other rows the first says why there is none.
    """
    lines = []
    for row in rows:
        start = [show(row["key"]) for show in what.values()]
        none = [_status(row), *"–" * (len(found) - 1)]
        good = row["status"] == "ok"
        lines.append(start + ([show(row) for show in found.values()] if good else none))
    return _titled(title, [*what, *found], lines)


def _status(row: Row) -> str:
    reason = f": {row['reason'][:80]}" if row["reason"] else ""
    return row["status"] + reason.replace("|", "/")


def _parity(rows: Sequence[Row]) -> str:
    names = {"model": "preset", "": "way", "implementation": "implementation"}
    names |= {"numbers": "dtype"}
    what: Columns = {title: operator.itemgetter(n) for title, n in names.items()}
    found = {"largest error": _error}
    return _part("Parity with the reference", _of(rows, "parity"), what, found)


def _prefill(rows: Sequence[Row], known: dict[str, Row]) -> str:
    what = {"model": _model, "tokens": _length, "method": _method}
    found = {"first token": _seconds} | _against(rows, "prefill")
    found["of matmul peak"] = lambda row: _share(row, known, "tflops", "tflops")
    sizes = {"KV": "kv_bytes", "by formula": "formula_bytes"}
    sizes |= {"compiled": "program_bytes", "peak": "peak_bytes"}
    found |= {title: lambda row, n=n: _bytes(row[n]) for title, n in sizes.items()}
    found["compile s"] = lambda row: f"{row['compile_s']:.0f}"
    return _part("Prefill", _sorted(rows, "prefill"), what, found)


def _decode(rows: Sequence[Row], known: dict[str, Row]) -> str:
    what = {"model": _model, "tokens before": _length}
    what |= {"rows": lambda key: str(key["batch"]), "method": _method}
    found: Columns = {"tokens/s": lambda row: f"{row['tokens_per_second']:,.4g}"}
    found |= {"a step": _seconds} | _against(rows, "decode")
    found["of bandwidth"] = lambda row: _share(row, known, "gbs", "bandwidth_gbs")
    found["KV"] = lambda row: _bytes(row["kv_bytes"])
    return _part("Decoding", _sorted(rows, "decode"), what, found)


def _train(rows: Sequence[Row], known: dict[str, Row]) -> str:
    what = {"model": lambda key: key["preset"], "tokens": _length}
    found = {
        "step": _seconds,
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "MFU": lambda row: "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "of matmul peak": lambda row: _share(row, known, "tflops", "tflops"),
        "memory": lambda row: _bytes(row["program_bytes"]),
        "remat": lambda row: row["remat"],
    }
    return _part("Training step", _of(rows, "train"), what, found)


def _model(key: Row) -> str:
    return key["preset"] + (f", W {key['window']:,}" if "window" in key else "")


def _length(key: Row) -> str:
    return f"{key['length']:,}"


def _method(key: Row) -> str:
    return key["method"]


def _sorted(rows: Sequence[Row], part: str) -> list[Row]:
    """Sorts the rows of a part by model, length, batch and ratio."""

    def place(row: Row) -> tuple[Any, ...]:
        key = row["key"]
        ratio = int(key["method"][1:]) if key["method"].startswith("x") else 0
        return key["preset"], key["length"], key.get("batch", 1), ratio

    return sorted(_of(rows, part), key=place)


def _against(rows: Sequence[Row], part: str) -> Columns:
    """Makes the columns of what a part is compared with.

    It is full attention, and every other library that was measured.
    """
    others = [row["key"]["method"] for row in _of(rows, part) if "library" in row]
    columns = {}
    for name in dict.fromkeys(["full", *others]):
        best: dict[tuple[Any, ...], float] = {}  # seconds of its fastest method
        for row in rows:
            method = row["key"].get("method", "")
            if method.startswith(name) and row["status"] == "ok":
                seconds = row["seconds"]["median_s"]
                best[_where(row)] = min(best.get(_where(row), seconds), seconds)
        columns[f"against {name}"] = lambda row, best=best: (
            f"{best[_where(row)] / row['seconds']['median_s']:.2f}×"
            if _where(row) in best
            else "–"
        )
    return columns


def _where(row: Row) -> tuple[Any, ...]:
    names = ("part", "preset", "window", "dtype", "length", "batch")
    return tuple(row["key"].get(name) for name in names)


def _kernels(rows: Sequence[Row], known: dict[str, Row]) -> str:
    """Makes a line per shape and implementation, a column per fill."""
    names = ("preset", "dtype", "way", "batch", "queries", "memory", "implementation")
    groups = grouped(_of(rows, "kernels"), *names)
    lines, refusals = [], {}
    for name, found in groups.items():
        preset, _, way, batch, queries, memory, implementation = name
        if all(row["status"] == "refused" for row in found):
            why = f"{implementation}: {_why(found[0]['reason'], implementation)}"
            refusals.setdefault(why, {})[way] = None
            continue
        cells = [_kernel_cell(row, known) for row in found]
        lines.append(
            [preset, way, f"{batch} × {queries} × {memory:,}", implementation, *cells]
        )
    head = ["model", "", "rows × queries × slots", "implementation"]
    width = max((len(x) for x in lines), default=0) - len(head)
    fills = ["empty", "1/4 full", "1/2 full", "full"][:width]
    text = _titled("Attention", [*head, *fills], lines)
    refused = [f"- {', '.join(ways)}: {why}" for why, ways in refusals.items()]
    return "\n".join([text, "\nRefused:\n", *refused] if refused else [text])


def _why(reason: str, implementation: str) -> str:
    """Drops what was asked for, which stands in front of it already."""
    name = implementation.removesuffix(", int8 memory")
    asked = f"implementation='{name}'"
    return reason.removeprefix(f"{asked}: {name}: ").removeprefix(f"{asked} ")


def _kernel_cell(row: Row, known: dict[str, Row]) -> str:
    if row["status"] != "ok":
        return row["status"]
    decode = row["key"]["way"] == "decode"
    names = ("gbs", "bandwidth_gbs") if decode else ("tflops", "tflops")
    share = _share(row, known, *names)
    return f"{_seconds(row).split(' [')[0]}, {_rate(row)}, {share}"


def _titled(title: str, head: list[str], lines: list[list[str]]) -> str:
    return f"**{title}**\n\n{table(head, lines)}" if lines else ""


def readme_text(content: dict[str, Any], source: str) -> str:
    """Makes what stands between the markers: where it comes from, then the tables.

    Args:
      content: of a bench.json.
      source: path of it, from the folder of the page.
    """
    run = content["run"]
    commit = (run["commit"] or "unknown")[:12]
    intro = (
        f"{run['device']}, jax {run['jax']}, commit {commit}: medians [least, most], "
        f"compilation apart ([raw figures]({source}), plots beside them)."
    )
    return "\n\n".join([intro, *map(_folded, sections(content["rows"]))])


def _folded(section: str) -> str:
    """Folds the long table of the kernels: it is shown when it is asked for."""
    title = "**Attention**"
    if not section.startswith(title):
        return section
    summary = "<summary>Attention alone: every implementation, shape and fill</summary>"
    rest = section.removeprefix(title).strip()
    return f"<details>{summary}\n\n{rest}\n\n</details>"


def update_readme(page: Path, text: str) -> None:
    """Puts `text` between the markers of a page.

    Raises:
      ValueError: the page is not there, or has not both markers once.
    """
    if not page.is_file():
        raise ValueError(f"{page}: no such page here; run this in the repository.")
    old = page.read_text(encoding="utf-8")
    markers = re.findall(f"{re.escape(BEGIN)}|{re.escape(END)}", old)
    if markers != [BEGIN, END]:
        raise ValueError(
            f"{page} must have the line {BEGIN} once and {END} once behind it: the "
            "table goes in between."
        )
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
