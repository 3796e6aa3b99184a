"""Floors: numbers that a run has to reach, kept as JSON beside the configs.

{"base_hash_unchanged": true,
 "floors": [{"name": ..., "task": ..., "metric": ..., "method": ..., "min": 0.85,
             "length": 256 (optional: the run's first), "rows": 128 (optional)}]}
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beacon_jax import resources
from beacon_jax.evaluation.report import table
from beacon_jax.forms import Count, unlike
from beacon_jax.paths import read_object

KEYS = frozenset(["name", "task", "metric", "method", "min", "length", "rows"])
_FLOOR = {
    **dict.fromkeys(("name", "task", "metric", "method"), str),
    "min": float,
    "length?": Count,
    "rows?": Count,
}


def read_floors(name: str) -> dict[str, Any]:
    """Reads a JSON file, or configs/NAME_floors.json.

    Raises:
      FileNotFoundError, ValueError: no such file, or not of the form above.
    """
    path = Path(name)
    if path.suffix != ".json":
        path = resources.floors(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"--floors={name}: {path} does not exist; name a JSON file, or X for "
            "configs/X_floors.json."
        )
    spec = read_object(path)
    floors = spec.get("floors") if isinstance(spec, dict) else None
    if not isinstance(floors, list) or set(spec) - {"floors", "base_hash_unchanged"}:
        raise ValueError(
            f"--floors={path} must hold 'floors' (a list) and, if wanted, "
            "'base_hash_unchanged'."
        )
    for floor in floors:
        if not isinstance(floor, dict):
            raise ValueError(f"--floors={path} has {floor!r:.60}: give objects.")
        wrong = set(floor) - KEYS or KEYS - {"length", "rows"} - set(floor)
        if wrong:
            raise ValueError(
                f"--floors={path}: wrong or missing {sorted(wrong)} in {floor}; keys "
                f"are {sorted(KEYS)}, of which length and rows may be left out."
            )
    if wrong := unlike(floors, [_FLOOR], "floors"):
        raise ValueError(f"--floors={path}: {wrong}.")
    return spec


def check_floors(
    spec: dict[str, Any],
    metrics: Sequence[dict[str, Any]],
    first_length: int,
    summary: str | None,
) -> list[tuple[str, bool, str]]:
    """Returns (name, reached, what was found) of every floor.

    What was not run is missed.

    summary: the training run's summary.json with base_hash_before / _after.
    """
    results = []
    for floor in spec["floors"]:
        length = floor.get("length", first_length)
        want = {k: floor[k] for k in ("task", "metric", "method")} | {"length": length}
        found = [
            m
            for m in metrics
            if m.get("depth") is None and all(m[k] == v for k, v in want.items())
        ]
        label = f"{floor['name']} at {length}"
        if not found or found[0]["value"] is None:
            results.append((label, False, "not measured"))
            continue
        value, rows = found[0]["value"], found[0]["count"]
        reached = value >= floor["min"] and rows >= floor.get("rows", 1)
        text = f"{value:.4f}, floor {floor['min']:g}; {rows} rows"
        if rows < floor.get("rows", 1):
            text += f", at least {floor['rows']} wanted"
        results.append((label, reached, text))
    if spec.get("base_hash_unchanged"):
        results.append(("base unchanged by training", *_same_base(summary)))
    return results


def verdict(results: Sequence[tuple[str, bool, str]]) -> tuple[str, str]:
    """The report's section, and the names of the missed floors ("" if none)."""
    rows = [[name, "reached" if ok else "MISSED", text] for name, ok, text in results]
    section = f"## Floors\n\n{table(['floor', 'result', 'measured'], rows)}\n"
    return section, "; ".join(name for name, ok, _ in results if not ok)


def _same_base(summary: str | None) -> tuple[bool, str]:
    if summary is None:
        return False, "unknown: name the training run's --summary=DIR/summary.json"
    path = Path(summary)
    if not path.is_file():
        return False, f"unknown: --summary={summary} does not exist"
    run = read_object(path)
    before, after = run.get("base_hash_before"), run.get("base_hash_after")
    if not before or not after:
        return False, f"unknown: {summary} has no base_hash_before and base_hash_after"
    if before == after:
        return True, f"{before[:16]} before and after"
    return False, f"{before[:16]} before, {after[:16]} after"
