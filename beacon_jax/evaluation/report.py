"""report.md and the tables on the terminal, from metrics alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from beacon_jax.evaluation import plots
from beacon_jax.evaluation.methods import split_name

# What stands for a task in the overview; others are its details.
DETAILS = ("answer_loss", "below_window", "gap_closed")


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns, legible on a terminal too."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    width = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(c.rjust(w) for c, w in zip(line, width, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + ":" for w in width) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def pivot(
    metrics: Sequence[Mapping[str, Any]],
    rows: Sequence[str],
    columns: Sequence[str],
    cell: Callable[[Any], str],
) -> str:
    """A table with a row and a column per value that some keys of metrics have.

    cell: the text of a metric, or of None where there is none.
    """
    of = lambda m, keys: tuple(m[key] for key in keys)
    cells = {(of(m, rows), of(m, columns)): m for m in metrics}
    names = list(dict.fromkeys(of(m, columns) for m in metrics))
    lines = [
        [*key, *(cell(cells.get((key, name))) for name in names)]
        for key in dict.fromkeys(of(m, rows) for m in metrics)
    ]
    return table([*rows, *(", ".join(name) for name in names)], lines)


def interval(metric: Mapping[str, Any] | None, digits: int) -> str:
    """`value [low, high]`; a dash for what was not measured or is undefined."""
    if metric is None or metric["value"] is None:
        return "–"
    value, low, high = (f"{metric[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main_metrics(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The one number of each task, method and length."""
    return [
        m
        for m in metrics
        if m.get("depth") is None and m["metric"] not in DETAILS and not m.get("detail")
    ]


def overview(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Writes two tables per length and ratio: scores, and losses of the answers.

    They have a row per task and a column per family of methods.
    """
    tables = []
    for length in sorted({m["length"] for m in metrics}):
        here = [m for m in metrics if m["length"] == length]
        tags = sorted(
            {split_name(m["method"])[1] for m in here} - {""}, key=plots.by_number
        )
        for tag in tags or [""]:
            shown = [m for m in here if split_name(m["method"])[1] in ("", tag)]
            title = f"{length:,} tokens" + (f", {tag}" if tag else "")
            tables.append(f"{title}:\n\n{_by_task(main_metrics(shown))}\n")
            losses = [m for m in shown if m["metric"] == "answer_loss"]
            if losses:
                tables.append(
                    f"{title}, loss of the right answer in nats per token (lower is "
                    f"better; what tells methods apart where no answer is right):\n\n"
                    f"{_by_task(losses)}\n"
                )
    names = {split_name(m["method"])[0] for m in metrics}
    text = "Methods with a ratio keep the bytes of beacons of it (text: at most)"
    text += ", beacon_int8 smaller ones." if "beacon_int8" in names else "."
    if "snapkv_aware" in names:
        text += " snapkv_aware alone sees what follows the past before it chooses."
    return "## Overview\n\n" + "\n".join([f"{text}\n", *tables])


def verdicts(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Says in words what a reader could miss in the tables; "" if there is nothing.

    Beacons that predict worse than the last window alone, and tasks that full attention
    cannot do either.
    """
    lines = []
    main = main_metrics(metrics)
    cells = {(m["method"], m["task"], m["length"]): m["value"] for m in main}
    for m in main:
        alone = cells.get(("window", m["task"], m["length"]))
        lossy = m["metric"] in plots.UNBOUNDED and None not in (m["value"], alone)
        if lossy and split_name(m["method"])[0] == "beacon" and m["value"] > alone:
            lines.append(
                f"- {m['task']} at {m['length']:,} tokens: {m['method']} is worse than "
                f"the last window alone ({m['metric']} {m['value']:.3f} against "
                f"{alone:.3f}). Such beacons are undertrained, or were not trained for "
                "this ratio or length."
            )
    whole = [m for m in main if m["method"] == "full" and m["value"] is not None]
    best: dict[str, float] = {}
    for m in whole:
        if m["metric"] not in plots.UNBOUNDED:
            best[m["task"]] = max(m["value"], best.get(m["task"], 0.0))
    unable = [task for task, score in best.items() if score <= plots.NOTHING]
    if unable:
        lines.append(
            f"- Full attention itself scores at most {plots.NOTHING:g} at "
            f"{', '.join(unable)}: this model cannot do them, so that they say nothing "
            "of a method."
        )
    return "## In words\n\n" + "\n".join(lines) + "\n" if lines else ""


def mebibytes(count: float | None) -> str:
    """Writes bytes in MiB; a dash for what is not known."""
    return f"{count / 2**20:,.0f}" if count else "–"


def _by_task(metrics: Sequence[Mapping[str, Any]]) -> str:
    families = dict.fromkeys(split_name(m["method"])[0] for m in metrics)
    tasks = dict.fromkeys((m["task"], m["metric"]) for m in metrics)
    cells = {(split_name(m["method"])[0], m["task"], m["metric"]): m for m in metrics}
    rows = [
        [*task, *(_value(cells.get((family, *task))) for family in families)]
        for task in tasks
    ]
    return table(["task", "", *families], rows)


def times(found: Sequence[Mapping[str, Any]]) -> str:
    """Seconds and peak memory per batch; of several turns, each one's seconds."""
    if not found:
        return ""
    rows = [
        [
            t["task"],
            t["length"],
            t["method"],
            t["rows"],
            " / ".join(f"{s:.3f}" for s in t["seconds"]),
            t["batches"],
            f"{t['compile_seconds']:.1f}",
            mebibytes(t.get("peak_bytes")),
        ]
        for t in sorted(found, key=lambda t: (t["task"], t["length"]))
    ]
    head = ["task", "length", "method", "rows", "s per batch", "batches", "compile s"]
    head += ["peak MiB"]
    text = (
        "Medians without compilation, which stands apart; of tasks with turns, each "
        "turn's. The peak is the most memory in use during a batch, beside the weights "
        "and what is kept for other methods; of an accelerator only what is above all "
        "before it is known."
    )
    return f"## Time\n\n{text}\n\n{table(head, rows)}\n"


def skipped(rows: Sequence[Sequence[Any]]) -> str:
    """The rows of data sets that could not be used."""
    if not rows:
        return ""
    listed = table(["file", "row", "reason"], rows)
    return f"## Rows left out\n\n{len(rows)} rows of the data sets.\n\n{listed}\n"


def write(
    run: Mapping[str, Any],
    metrics: Sequence[dict[str, Any]],
    sections: Sequence[str],
    timings: Sequence[Mapping[str, Any]],
    folder: Path,
) -> str:
    """The text of report.md; its figures go to `folder`.

    Args:
      run: what was run: model, settings, versions, hardware, skipped rows (JSON
        values).
      sections: Markdown of every task.
      timings: what batches took (`runner.summary`).
    """
    model, hardware = run["model"], run["hardware"]
    rows = [
        ["model", model["path"]],
        ["base", model["base_hash"][:16]],
        ["beacons", (model["beacon_hash"] or "none")[:16]],
        ["window", model["window"]],
        ["trained positions", model["trained_positions"]],
        ["text", f"{run['settings']['text']}, held-out files only"],
        ["seed", run["settings"]["seed"]],
        ["device", f"{hardware['devices']} × {hardware['device']}"],
        ["jax", run["versions"]["jax"]],
        ["commit", run["versions"]["commit"] or "unknown"],
    ]
    found = main_metrics(metrics)
    losses = [m for m in metrics if m["metric"] == "answer_loss"]
    details = {k: v for k, v in run.items() if k != "skipped"}
    return "\n".join(
        [
            "# Evaluation\n",
            table(["", "value"], rows),
            "",
            overview(metrics),
            verdicts(metrics),
            *plots.curves(found, folder),
            *plots.curves(losses, folder, "answer_losses"),
            *sections,
            skipped(run["skipped"]),
            "## Configuration\n",
            "```json",
            json.dumps(details, indent=2, sort_keys=True),
            "```\n",
            times(timings),
            *plots.costs(found, timings, folder),
        ]
    )


def _value(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    return f"{metric['value']:.3f}"
