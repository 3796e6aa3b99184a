"""How long batches took: beside the predictions, since no run repeats it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Times:
    """Appends a line per batch. The first one of a length in a process compiles."""

    def __init__(self, file: Path, task: str, method: str):
        self.file, self.task, self.method = file, task, method
        self._seen: set[int] = set()

    def add(self, length: int, rows: int, seconds: Sequence[float]) -> None:
        """seconds: of the parts of the task (turns), one for most."""
        line = {
            "task": self.task,
            "method": self.method,
            "length": length,
            "rows": rows,
            "seconds": [round(s, 6) for s in seconds],
            "first": length not in self._seen,
        }
        self._seen.add(length)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def without(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without its times."""
    return {k: v for k, v in answer.items() if k != "seconds"}


def summary(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds of a batch per task, method and length.

    Batches that compile do not count where there are others; `compiled` says if not.
    """
    cells: dict[tuple[str, str, int, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        key = (line["task"], line["method"], line["length"], line["rows"])
        cells.setdefault(key, []).append(line)
    found = []
    for (task, method, length, rows), batches in cells.items():
        later = [b["seconds"] for b in batches if not b["first"]]
        used = later or [b["seconds"] for b in batches]
        middle = np.median(np.asarray(used, np.float64), axis=0)
        found.append(
            {
                "task": task,
                "method": method,
                "length": length,
                "rows": rows,
                "seconds": [round(float(s), 4) for s in middle],
                "batches": len(used),
                "compiled": bool(later),
            }
        )
    return found
