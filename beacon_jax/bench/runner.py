"""Runs the parts of a benchmark, one row after the other, and writes the results."""

import dataclasses
import re
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from beacon_jax.bench import (
    device,
    kernels,
    parity,
    plots,
    report,
    serving,
    training,
)
from beacon_jax.bench.case import Bench, Case
from beacon_jax.bench.records import Row, RowFile, describe, versions
from beacon_jax.evaluation.runner import integers
from beacon_jax.model.config import ModelConfig, check_ratio
from beacon_jax.model.presets import get_preset
from beacon_jax.names import meant
from beacon_jax.progress import Progress, say

PARTS = {
    "parity": parity.cases,
    "kernels": kernels.cases,
    "prefill": serving.prefill_cases,
    "decode": serving.decode_cases,
    "train": training.cases,
}
LENGTHS, RATIOS = ("4096", "32768", "131072"), ("4", "8")


def make_settings(options: Any) -> list[Bench]:
    """Makes what is measured, per preset of the command line, on the first device.

    Raises:
      ValueError: a number, preset or ratio that cannot be; names the option.
    """
    _check_known("--against", options.against, serving.AGAINST)
    several = ("batches", "queries", "memory")
    given = {name: integers(name, getattr(options, name)) for name in several}
    ratios = integers("ratios", options.ratios or RATIOS)
    (repeats,) = integers("repeats", [str(options.repeats)])
    made = []
    for preset in options.preset or ["tiny"]:
        config = _with_window(get_preset(preset), options.window)
        for ratio in ratios:
            check_ratio(ratio, config.beacon.window if config.beacon else 0)
        # The tiny model's positions end at 512.
        lengths = LENGTHS if config.max_position > 512 else ("256", "512")
        made.append(
            Bench(
                preset=preset,
                config=config,
                lengths=integers("lengths", options.lengths or lengths),
                ratios=ratios,
                repeats=repeats,
                dtype=options.dtype,
                device=jax.devices()[0],
                window=options.window,
                against=options.against,
                **given,
            )
        )
    return made


def _check_known(flag: str, names: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        near = meant(unknown[0], known)
        raise ValueError(f"{flag} has {unknown}: {near}use {', '.join(known)}.")


def _with_window(config: ModelConfig, window: int | None) -> ModelConfig:
    if window is None:
        return config
    if config.beacon is None or window < 1:
        raise ValueError(
            f"--window={window} must be at least 1, of a preset's beacons."
        )
    ratios = tuple(r for r in config.beacon.ratios if r == 0 or window % r == 0)
    beacon = dataclasses.replace(config.beacon, window=window, ratios=ratios)
    return dataclasses.replace(config, beacon=beacon)


def run_all(options: Any, parts: Sequence[str]) -> list[Row]:
    """Measures every preset of the command line's options in one folder.

    Returns:
      All rows of that folder that belong to these versions.

    Raises:
      ValueError: an option that cannot be.
    """
    rows: list[Row] = []
    for settings in make_settings(options):
        chip = re.sub(r"[^a-z0-9]+", "-", settings.device.device_kind.lower())
        default = f"benchmarks/{time.strftime('%Y-%m-%d')}-{chip}"
        rows = run(settings, parts, Path(options.out or default))
    return rows


def run(settings: Bench, parts: Sequence[str], out: Path) -> list[Row]:
    """Measures what is missing in `out`, writes bench.json and plots there.

    Returns:
      All rows of `out` that belong to these versions.

    Raises:
      ValueError: an unknown part.
    """
    _check_known("--parts", parts, PARTS)
    records = RowFile(out, versions(settings.device))
    peaks = (settings.device, settings.dtype, settings.repeats)
    key = {"part": "peaks", "dtype": settings.dtype}
    case = Case(key, lambda: device.measure_peaks(*peaks))
    progress = Progress()
    _measure(records, [case], progress)
    for part in parts:
        # A list of its own: weights and programs of a part end with it.
        _measure(records, list(PARTS[part](settings)), progress)
        records.write(describe(settings.device))
    path = records.write(describe(settings.device))
    with progress.stage("drawing"):
        plots.draw(records.rows, out)
    say(f"bench: wrote {path}")
    return records.rows


def _measure(records: RowFile, cases: Sequence[Case], progress: Progress) -> None:
    for i, case in enumerate(cases):
        start = time.perf_counter()
        name = " ".join(f"{k}={v}" for k, v in case.key.items() if v is not None)
        with progress.stage(f"measuring {i + 1}/{len(cases)}", note=name):
            row, new = records.measure(case.key, case.run)
        seconds = time.perf_counter() - start
        how = f"in {seconds:.1f} s" if new else "was there"
        say(f"bench: {i + 1}/{len(cases)} {report.line(row)} ({how})")
