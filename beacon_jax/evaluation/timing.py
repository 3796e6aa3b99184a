"""How long batches took: beside the predictions, since no run repeats it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Times:
    """Appends a line per batch."""

    def __init__(self, file: Path, task: str, method: str):
        self.file, self.task, self.method = file, task, method

    def add(
        self, length: int, rows: int, seconds: Sequence[float], compiled: float
    ) -> None:
        """Notes one batch.

        Args:
          seconds: of the parts of the task (turns), one for most; without compilation.
          compiled: seconds of compilation in this batch.
        """
        line = {
            "task": self.task,
            "method": self.method,
            "length": length,
            "rows": rows,
            "seconds": [round(s, 6) for s in seconds],
            "compile_seconds": round(compiled, 6),
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def without(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer without its times."""
    times = ("seconds", "compile_seconds")
    return {k: v for k, v in answer.items() if k not in times}


def summary(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds of a batch per task, method and length, without compilation.

    Lines of earlier versions, which counted compilation in, are left out.
    """
    cells: dict[tuple[str, str, int, int], list[Mapping[str, Any]]] = {}
    for line in lines:
        if "compile_seconds" in line:
            key = (line["task"], line["method"], line["length"], line["rows"])
            cells.setdefault(key, []).append(line)
    found = []
    for (task, method, length, rows), batches in cells.items():
        used = [b["seconds"] for b in batches]
        middle = np.median(np.asarray(used, np.float64), axis=0)
        found.append(
            {
                "task": task,
                "method": method,
                "length": length,
                "rows": rows,
                "seconds": [round(float(s), 4) for s in middle],
                "batches": len(used),
                "compile_seconds": round(sum(b["compile_seconds"] for b in batches), 3),
            }
        )
    return found
