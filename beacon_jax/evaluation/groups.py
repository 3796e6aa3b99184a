"""Means over the tasks of a benchmark: RULER at each length, LongBench's groups.

A mean is that of its tasks' scores, each counting the same; if some were not run, it
says how many were. Its interval treats the tasks as independent.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from beacon_jax.evaluation.report import interval, main_metrics, pivot
from beacon_jax.evaluation.statistics import grouped
from beacon_jax.evaluation.tasks import longbench, longdata, ruler
from beacon_jax.evaluation.tasks.base import Metric

BOARD = "RULER board"
MEANS: dict[str, tuple[str, ...]] = {
    BOARD: ruler.GROUPS["board"],
    "RULER": ruler.GROUPS["ruler_all"],
    **{
        f"LongBench {name}": tuple(f"longbench_{task}" for task in tasks)
        for name, tasks in longbench.PAPER_GROUPS.items()
    },
    "LongBench": longbench.GROUPS["longbench"],
    "LongBench-E": longbench.GROUPS["longbench_e"],
    **{
        f"LongBench-E {part}": longbench.GROUPS["longbench_e"]
        for part in longbench.PARTS
    },
    "InfiniteBench": longdata.GROUPS["infinitebench"],
}


def means(metrics: Sequence[Metric]) -> list[Metric]:
    """A metric per group, method and length of which two tasks or more were run.

    The board has one only if all its tasks were run. Where no other tasks of RULER
    were, RULER has none besides.
    """
    found = []
    run = {m["task"] for m in metrics}
    for name, tasks in MEANS.items():
        mine, whole = run & set(tasks), set(MEANS[BOARD])
        if (mine != whole) if name == BOARD else (mine == whole):
            continue
        part = name.rpartition(" ")[2]
        part = part if part in longbench.PARTS else None
        mine = [m for m in _scores(metrics, part) if m["task"] in tasks]
        cells = grouped(mine, lambda m: (m["method"], m["length"]))
        found += [
            _mean(name, len(tasks), same) for same in cells.values() if len(same) > 1
        ]
    return found


def section(found: Sequence[Metric]) -> str:
    """The section of a report, "" if there are no means."""
    if not found:
        return ""
    cell = functools.partial(interval, digits=3)
    made = pivot(found, ["length", "method"], ["task", "metric"], cell)
    return f"## Means over tasks\n\n{made}\n"


def _scores(metrics: Sequence[Metric], part: str | None) -> list[Mapping[str, Any]]:
    """The one number of each task, or that of a part of its rows."""
    if part is None:
        return [m for m in main_metrics(metrics) if m["value"] is not None]
    return [m for m in metrics if m.get("detail") and m["metric"].endswith(f", {part}")]


def _mean(name: str, tasks: int, same: Sequence[Mapping[str, Any]]) -> Metric:
    count = len(same)
    value = float(np.mean([m["value"] for m in same]))
    half = float(np.linalg.norm([(m["high"] - m["low"]) / 2 for m in same])) / count
    return {
        "task": name,
        "metric": f"mean of {tasks}" if count == tasks else f"mean of {count}/{tasks}",
        "method": same[0]["method"],
        "ratio": same[0]["ratio"],
        "length": same[0]["length"],
        "depth": None,
        "count": sum(m["count"] for m in same),
        "kv_bytes": float(np.mean([m["kv_bytes"] for m in same])),
        "value": value,
        "low": max(0.0, value - half),
        "high": min(1.0, value + half),
    }
