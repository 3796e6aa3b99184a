"""Finished runs side by side: what `evaluate --report DIR…` writes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.evaluation import plots
from beacon_jax.evaluation.report import main_metrics, pivot, table
from beacon_jax.evaluation.statistics import grouped
from beacon_jax.forms import Count, unlike
from beacon_jax.paths import read_object

_FORM = {  # of metrics.json, as far as it is read here
    "model": {"path": str, "beacon_hash": (str, None)},
    "settings": {"seed": int},
    "versions": {"commit": (str, None)},
    "metrics": [
        {
            **dict.fromkeys(("task", "metric", "method"), str),
            "length": Count,
            "value": (float, None),
            "count": Count,
        }
    ],
}
SEED = re.compile(r"[-_.]?seed\d+$")


def write(folders: Sequence[Path], out: Path) -> str:
    """Writes OUT/report.md and its figures; returns the text.

    A run is called by its folder, and by the one around it where that is not enough;
    runs whose folders differ by an ending seedN only (in the same parent) are one, with
    mean ± standard deviation. A folder that --seeds made stands for those in it. Lines
    that two runs share, such as full attention of one model, are shown for both.

    Raises:
      ValueError: no folder, or one without a finished run.
    """
    if not folders:
        raise ValueError("--report needs the folders of finished runs behind it.")
    runs = {run: _read(run) for folder in folders for run in _runs(folder)}
    groups = _groups(list(runs))
    merged = [
        metric
        for label, members in groups.items()
        for metric in _merged([runs[m]["metrics"] for m in members], label, len(groups))
    ]
    out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        [
            "# Comparison\n",
            _listed(groups, runs),
            "",
            *(_section(merged, length) for length in _lengths(merged)),
            *plots.curves(merged, out),
        ]
    )
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def _runs(folder: Path) -> list[Path]:
    """The folder, or those of its seeds."""
    seeds = sorted(x.parent for x in folder.glob("seed*/metrics.json"))
    return [folder] if (folder / "metrics.json").is_file() or not seeds else seeds


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "metrics.json"
    if not file.is_file():
        raise ValueError(
            f"--report names {folder}, which has no metrics.json: it is not the --out "
            "of a finished run."
        )
    found = read_object(file)
    if wrong := unlike(found, _FORM, "run"):
        raise ValueError(
            f"{file} is damaged: {wrong}. Evaluate again, or leave it out of --report."
        )
    return found


def _groups(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Runs of one thing with several seeds, by a name that no other has."""

    def without_seed(folder: Path) -> Path:
        whole = folder.resolve()
        name = SEED.sub("", whole.name)
        return whole.parent / name if name else whole.parent

    found = grouped(folders, without_seed)
    names = [key.name for key in found]
    return {
        key.name if names.count(key.name) == 1 else f"{key.parent.name}/{key.name}": of
        for key, of in found.items()
    }


def _merged(
    runs: list[list[dict[str, Any]]], label: str, labels: int
) -> list[dict[str, Any]]:
    """One metric per task, method and length: the mean over the runs of a group."""
    known = [m for run in runs for m in main_metrics(run) if m["value"] is not None]
    names = ("task", "metric", "method", "length")
    cells = grouped(known, lambda m: tuple(m[name] for name in names))
    found = []
    for same in cells.values():
        values = np.asarray([m["value"] for m in same], np.float64)
        spread = float(values.std(ddof=1)) if len(values) > 1 else None
        method = same[0]["method"] if labels == 1 else f"{label}: {same[0]['method']}"
        found.append(
            dict(same[0])
            | {"method": method, "value": float(values.mean()), "spread": spread}
            | {"runs": len(values), "count": sum(m["count"] for m in same)}
        )
    return found


def _listed(groups: dict[str, list[Path]], runs: dict[Path, dict[str, Any]]) -> str:
    rows = []
    for label, members in groups.items():
        for folder in members:
            model, settings = runs[folder]["model"], runs[folder]["settings"]
            rows.append(
                [
                    label,
                    folder.name,
                    Path(model["path"]).name,
                    (model["beacon_hash"] or "none")[:12],
                    settings["seed"],
                    (runs[folder]["versions"]["commit"] or "unknown")[:12],
                ]
            )
    return table(["run", "folder", "model", "beacons", "seed", "commit"], rows)


def _lengths(metrics: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({m["length"] for m in metrics})


def _section(metrics: Sequence[dict[str, Any]], length: int) -> str:
    here = [m for m in metrics if m["length"] == length]
    made = pivot(here, ["method"], ["task", "metric"], _cell)
    return f"## {length:,} tokens\n\n{made}\n"


def _cell(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "–"
    if metric["spread"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} ± {metric['spread']:.3f} ({metric['runs']})"
