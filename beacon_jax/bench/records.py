"""What was measured: one JSON line per row, written as soon as it is known.

OUT/rows.jsonl   every row ever measured there
OUT/bench.json   {"schema", "run": versions and device, "rows"}: those of this run's
                 versions, the newest of each key; made anew at the end

A row is {"key", "versions", "status", "reason", "seconds", ...}: `key` says what was
measured, `status` is one of STATUSES, the rest depends on key["part"]. A row with the
same key and versions is not measured again, unless it failed.
"""

import functools
import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from beacon_jax.paths import read_object

SCHEMA = 1
# refused: NotImplementedError. Does not fit: by formula or for real. Failed: any other
# error, tried again by the next run.
STATUSES = ("ok", "refused", "does not fit", "failed")
# What a figure depends on; the rest of the package may change.
SOURCES = ("attention", "core", "inference", "model", "training")
PACKAGES = ("jax", "jaxlib", "flax")

Row = dict[str, Any]


class DoesNotFit(Exception):
    """More memory than the device has; the message says how much."""


def versions(device: Any) -> Row:
    """Returns what has to be equal for a row to be the same measurement."""
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "source": source_hash(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def describe(device: Any) -> Row:
    """Returns the run of bench.json: versions, and what else is worth knowing."""
    more = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": jax.device_count(),
        "memory_limit_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    }
    return provenance() | versions(device) | more


def provenance() -> Row:
    """Returns what every file of results says of its run: its day and what it ran."""
    day = time.strftime("%Y-%m-%d")
    return {"date": day, "commit": commit(), "jax": metadata.version("jax")}


def commit() -> str | None:
    """Returns the commit of the checkout; None outside of one, or without git."""
    folder = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_json(path: Path, content: Row) -> Path:
    """Writes a file of JSON, and its folder if there is none; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def write_result(folder: str, name: str, **content: Any) -> Path:
    """Writes what a script found: `provenance` and `content`; returns the path."""
    return write_json(Path(folder) / name, provenance() | content)


@functools.cache
def source_hash() -> str:
    """Returns 12 hex digits of the code that is measured, as at the first call."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


class RowFile:
    """Keeps the rows of a folder."""

    def __init__(self, folder: Path, versions: Row):
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "rows.jsonl"
        self._versions = versions
        self._rows: dict[str, Row] = {}
        data = self._file.read_bytes() if self._file.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # a killed run's last line
            self._file.write_bytes(whole)
        for line in whole.splitlines():
            self._keep(json.loads(line))

    @property
    def rows(self) -> list[Row]:
        """Rows of the versions given, in the order of their first measurement."""
        return list(self._rows.values())

    def measure(self, key: Row, run: Callable[[], Row]) -> tuple[Row, bool]:
        """Returns the row of `key`, and whether it was measured just now.

        Args:
          run: returns what a row has besides key, versions, status and reason; its
            errors become the row's status and reason.
        """
        known = self._rows.get(_name(key))
        if known is not None and known["status"] != "failed":
            return known, False
        row = {"key": key, "versions": self._versions} | guarded(run)
        self._keep(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row, True

    def _keep(self, row: Row) -> None:
        if row["versions"] == self._versions:
            self._rows[_name(row["key"])] = row

    def write(self, run: Row) -> Path:
        """Writes bench.json and returns its path."""
        content = {"schema": SCHEMA, "run": run, "rows": self.rows}
        return write_json(self._file.with_name("bench.json"), content)


def read(path: Path) -> dict[str, Any]:
    """Reads a bench.json; ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file: name the bench.json of a run.")
    content = read_object(path)
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a bench.json of schema {SCHEMA}: run bench.")
    return content


def guarded(run: Callable[[], Row]) -> Row:
    """Calls `run()` and adds its status; errors that are results become rows."""
    try:
        return {"status": "ok", "reason": ""} | run()
    except NotImplementedError as error:
        return {"status": "refused", "reason": _first_line(error)}
    except DoesNotFit as error:
        return {"status": "does not fit", "reason": str(error)}
    except Exception as error:  # one bad row must not cost the others
        if "RESOURCE_EXHAUSTED" in str(error):
            return {"status": "does not fit", "reason": _first_line(error)}
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return {"status": "failed", "reason": reason}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _name(key: Row) -> str:
    return json.dumps(key, sort_keys=True)
