"""report.md and the table on the terminal, from metrics alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


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


def interval(metric: Mapping[str, Any] | None, digits: int) -> str:
    """`value [low, high]`; a dash for what was not measured or is undefined."""
    if metric is None or metric["value"] is None:
        return "–"
    value, low, high = (f"{metric[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def write(run: Mapping[str, Any], sections: Sequence[str]) -> str:
    """The text of report.md.

    Args:
      run: what was run: model, settings, versions, hardware (JSON values).
      sections: Markdown of every task, then whatever else belongs in the report.
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
    return "\n".join(
        [
            "# Evaluation\n",
            table(["", "value"], rows),
            "",
            *sections,
            "## Configuration\n",
            "```json",
            json.dumps(dict(run), indent=2, sort_keys=True),
            "```\n",
        ]
    )
