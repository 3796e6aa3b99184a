"""Tables from the rows of a bench.json, and their place in docs/benchmarks.md."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from beacon_jax.bench.records import Row
from beacon_jax.evaluation.report import table

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
# Shown per key, in this order; what is not in a key is left out.
NAMES = ("preset", "way", "implementation", "method", "length", "queries")
SIZES = ("memory", "live", "batch", "window")


def by_column(
    columns: Mapping[str, Callable[[Row], object]], rows: Sequence[Row]
) -> str:
    """Makes a Markdown table; a column has a title and what it shows of a row."""
    cells = [[show(row) for show in columns.values()] for row in rows]
    return table(list(columns), cells)


def line(row: Row) -> str:
    """A row in one line, for the terminal."""
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
    """The largest error and what is allowed for it."""
    shares = {k: error / row["allowed"][k] for k, error in row["errors"].items()}
    worst = max(shares, key=shares.__getitem__)
    return f"{worst} {row['errors'][worst]:.2g} of {row['allowed'][worst]:.2g} allowed"


def unit_of(seconds: float) -> tuple[float, str]:
    """How many of the unit that fits are a second, and its name."""
    units = ((1, "s", 1.0), (1e3, "ms", 1e-3), (1e6, "µs", 0.0))
    return next((scale, unit) for scale, unit, least in units if seconds >= least)


def _seconds(row: Row) -> str:
    """Median and spread in the unit that fits."""
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
    """In the unit that fits: a CPU has 0.1 TFLOP/s."""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.3g} GFLOP/s"


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["key"]["part"] == part]


def peaks(rows: Sequence[Row]) -> dict[str, Row]:
    """The measured peaks by dtype."""
    found = [row for row in _of(rows, "peaks") if row["status"] == "ok"]
    return {row["key"]["dtype"]: row for row in found}


def _share(row: Row, known: dict[str, Row], rate: str, peak: str) -> str:
    top = known.get(row["key"]["dtype"])
    return f"{row[rate] / top[peak]:.0%}" if top else "–"


def _bytes(value: float | None) -> str:
    """In the unit that fits; a dash for what the platform does not tell."""
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size / 10:
            return f"{value / size:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def sections(rows: Sequence[Row]) -> list[str]:
    """Markdown tables of the parts that were measured."""
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


def _parity(rows: Sequence[Row]) -> str:
    lines = []
    for row in _of(rows, "parity"):
        key = row["key"]
        start = [key[n] for n in ("preset", "way", "implementation", "dtype")]
        good = row["status"] == "ok"
        lines.append([*start, _error(row) if good else _status(row)])
    head = ["model", "", "implementation", "numbers", "largest error"]
    return _titled("Parity with the reference", head, lines)


def _status(row: Row) -> str:
    reason = f": {row['reason'][:80]}" if row["reason"] else ""
    return row["status"] + reason.replace("|", "/")


def fastest(rows: Sequence[Row], start: str) -> dict[tuple[Any, ...], float]:
    """Seconds of the fastest method whose name begins so, by (part, preset, window,
    dtype, length, batch)."""
    best: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["key"].get("method", "").startswith(start) and row["status"] == "ok":
            where = _where(row)
            best[where] = min(best.get(where, 1e99), row["seconds"]["median_s"])
    return best


def _where(row: Row) -> tuple[Any, ...]:
    names = ("part", "preset", "window", "dtype", "length", "batch")
    return tuple(row["key"].get(name) for name in names)


def _against(row: Row, best: dict[tuple[Any, ...], float]) -> str:
    top = best.get(_where(row))
    return f"{top / row['seconds']['median_s']:.2f}×" if top else "–"


def _others(rows: Sequence[Row], part: str) -> dict[str, dict[tuple[Any, ...], float]]:
    """The columns of what a part is compared with: full attention, and every other
    library that was measured."""
    found = (row["key"]["method"] for row in _of(rows, part) if "library" in row)
    return {name: fastest(rows, name) for name in ("full", *dict.fromkeys(found))}


def _model(key: Row) -> str:
    return key["preset"] + (f", W {key['window']:,}" if "window" in key else "")


def _prefill(rows: Sequence[Row], known: dict[str, Row]) -> str:
    others, lines = _others(rows, "prefill"), []
    found = sorted(_of(rows, "prefill"), key=lambda r: (r["key"]["preset"], *_by(r)))
    for row in found:
        key = row["key"]
        start = [_model(key), f"{key['length']:,}", key["method"]]
        if row["status"] != "ok":
            lines.append([*start, _status(row), *"––––––", *("–" for _ in others)])
            continue
        lines.append(
            [
                *start,
                _seconds(row),
                *(_against(row, best) for best in others.values()),
                _share(row, known, "tflops", "tflops"),
                _bytes(row["kv_bytes"]),
                _bytes(row["formula_bytes"]),
                _bytes(row["program_bytes"]),
                _bytes(row["peak_bytes"]),
                f"{row['compile_s']:.0f}",
            ]
        )
    head = ["model", "tokens", "method", "first token"]
    head += [f"against {name}" for name in others]
    head += ["of matmul peak", "KV", "by formula", "compiled", "peak"]
    return _titled("Prefill", [*head, "compile s"], lines)


def _by(row: Row) -> tuple[Any, ...]:
    key = row["key"]
    ratio = int(key["method"][1:]) if key["method"].startswith("x") else 0
    return key["length"], key.get("batch", 1), ratio


def _decode(rows: Sequence[Row], known: dict[str, Row]) -> str:
    others, lines = _others(rows, "decode"), []
    found = sorted(_of(rows, "decode"), key=lambda r: (r["key"]["preset"], *_by(r)))
    for row in found:
        key = row["key"]
        start = [_model(key), f"{key['length']:,}", str(key["batch"]), key["method"]]
        if row["status"] != "ok":
            lines.append([*start, _status(row), *"–––", *("–" for _ in others)])
            continue
        lines.append(
            [
                *start,
                f"{row['tokens_per_second']:,.4g}",
                _seconds(row),
                *(_against(row, best) for best in others.values()),
                _share(row, known, "gbs", "bandwidth_gbs"),
                _bytes(row["kv_bytes"]),
            ]
        )
    head = ["model", "tokens before", "rows", "method", "tokens/s", "a step"]
    head += [f"against {name}" for name in others]
    head += ["of bandwidth", "KV"]
    return _titled("Decoding", head, lines)


def _train(rows: Sequence[Row], known: dict[str, Row]) -> str:
    lines = []
    for row in _of(rows, "train"):
        key = row["key"]
        start = [key["preset"], f"{key['length']:,}"]
        if row["status"] != "ok":
            lines.append([*start, _status(row), *"–––––"])
            continue
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            [
                *start,
                _seconds(row),
                f"{row['tokens_per_second']:,.0f}",
                mfu,
                _share(row, known, "tflops", "tflops"),
                _bytes(row["program_bytes"]),
                row["remat"],
            ]
        )
    head = ["model", "tokens", "step", "tokens/s", "MFU", "of matmul peak"]
    return _titled("Training step", [*head, "memory", "remat"], lines)


def _kernels(rows: Sequence[Row], known: dict[str, Row]) -> str:
    """One line per shape and implementation, one column per fill."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in _of(rows, "kernels"):
        key = row["key"]
        names = ("preset", "dtype", "way", "batch", "queries", "memory")
        name = *(key[n] for n in names), key["implementation"]
        groups.setdefault(name, []).append(row)
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
    """Without what was asked for, which stands in front of it already."""
    name = implementation.removesuffix(", int8 memory")
    asked = f"implementation='{name}'"
    return reason.removeprefix(f"{asked}: {name}: ").removeprefix(f"{asked} ")


def _kernel_cell(row: Row, known: dict[str, Row]) -> str:
    if row["status"] != "ok":
        return row["status"]
    names = ("tflops", "tflops")
    if row["key"]["way"] == "decode":
        names = ("gbs", "bandwidth_gbs")
    share = _share(row, known, *names)
    return f"{_seconds(row).split(' [')[0]}, {_rate(row)}, {share}"


def _titled(title: str, head: list[str], lines: list[list[str]]) -> str:
    return f"**{title}**\n\n{table(head, lines)}" if lines else ""


def readme_text(content: dict[str, Any], source: str) -> str:
    """What stands between the markers: where it comes from, then the tables.

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
    """The long table of the kernels is shown when it is asked for."""
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
    if (
        old.count(BEGIN) != 1
        or old.count(END) != 1
        or old.index(END) < old.index(BEGIN)
    ):
        raise ValueError(
            f"{page} must have the line {BEGIN} once and {END} once behind it: the "
            "table goes in between."
        )
    before, after = old.split(BEGIN)[0], old.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
