"""The runner: every task with every method, resumable, deterministic.

OUT/predictions/TASK.METHOD.jsonl  one line per example, in the order of the examples
OUT/predictions/run.json           what these lines depend on
OUT/timings/TASK.METHOD.jsonl      one line per batch: seconds and peak of the memory
OUT/metrics.json, OUT/report.md, OUT/*.png   made anew from the lines each time;
                                   OUT/board.md too, if all its tasks were run

Predictions and metrics of a run that was interrupted are those of one that was not,
byte for byte; the report differs in its last sections, which say how long things took.

All methods answer a batch before the next one, so that what they start from is read
once. Predictions are appended batch by batch. A run that stopped finds its lines, drops
a half-written last one, repeats the batch in which it stopped (batches keep their
composition, since float sums may depend on it) and writes what is missing.
"""

import dataclasses
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from beacon_jax.compiling import Stopwatch
from beacon_jax.evaluation import board, groups, report
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Method
from beacon_jax.evaluation.prefill import Prefill
from beacon_jax.evaluation.statistics import grouped
from beacon_jax.evaluation.tasks.base import Instance, Metric, Task
from beacon_jax.inference.model import Model
from beacon_jax.paths import read_object
from beacon_jax.progress import Progress, Stage
from beacon_jax.tokenise import check_ids

TIMES = ("seconds", "compile_seconds")  # of an answer, which no run repeats
WEIGHTS = "weights of "  # and a method's name: what predictions depend on, too
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


def evaluate(
    model: Model,
    tasks: Sequence[Task],
    methods: Sequence[Method],
    settings: RunSettings,
    out: Path,
    *,
    overwrite: bool = False,
) -> tuple[list[Metric], str]:
    """Runs what is missing in `out`, scores everything, writes metrics and report.

    Returns:
      the metrics, and the tasks' sections of the report.

    Raises:
      ValueError: `out` holds predictions of another model or other settings, lengths
        that are not multiples of the window, too little text, or a token that the model
        has no embedding of.
    """
    if any(task.whole_windows for task in tasks):
        check_lengths(settings.lengths, model.window)
    longest = max(task.longest(settings) for task in tasks)
    prefill = Prefill()
    methods = [method.sized(longest, prefill) for method in methods]
    progress, examples = Progress(), {}
    with progress.stage("hashing the model"):
        run = describe_run(model, settings)
    inputs = TaskData(settings, model.tokenizer)
    # Before the folder is touched: missing data or too little text is found here.
    with progress.stage("making examples") as stage:
        for task in tasks:
            stage.note = task.name
            made = limit(task.examples(model, settings, inputs), settings.limit)
            check_tokens(task, model, made)
            examples[task.name] = made
    weights = {WEIGHTS + m.family: m.weights for m in methods if m.weights}
    prepare_folder(out, run, weights, overwrite=overwrite)
    total = len(methods) * sum(e.length for made in examples.values() for e in made)
    metrics: list[Metric] = []
    sections, times = [], []
    with progress.stage("evaluating", "tokens") as stage:
        stage.begin(0, total)
        for task in tasks:
            names = [f"{task.name}.{method.name}.jsonl" for method in methods]
            files = [(out / "predictions" / n, out / "timings" / n) for n in names]
            together(
                [
                    predict(
                        task, method, model, examples[task.name], pair, settings, stage
                    )
                    for method, pair in zip(methods, files, strict=True)
                ]
            )
            predictions = [line for pair in files for line in read_lines(pair[0])]
            times += [line for pair in files for line in read_lines(pair[1])]
            scored = task.score(predictions)
            metrics += scored
            sections.append(task.report(scored, out))
    found = groups.means(metrics)
    metrics += found
    sections.append(groups.section(found))
    run |= {"skipped": inputs.skipped}
    (out / "metrics.json").write_text(
        json.dumps(run | {"metrics": metrics}, indent=1) + "\n", encoding="utf-8"
    )
    took = summary(times)
    (out / "timings" / "summary.json").write_text(json.dumps(took, indent=1) + "\n")
    with progress.stage("writing the report"):
        text = report.write(run, metrics, sections, took, out)
        sections.append(board.write(metrics, took, out))
    (out / "report.md").write_text(text, encoding="utf-8")
    return metrics, "\n".join(sections)


def integers(flag: str, values: Sequence[str], least: int = 1) -> list[int]:
    """The numbers of a comma-separated flag; ValueError names a wrong one."""
    wrong = [v for v in values if not v.isdecimal() or int(v) < least]
    if wrong:
        raise ValueError(
            f"--{flag} has {wrong}: use whole numbers >= {least}, as in 2,4,8."
        )
    return list(dict.fromkeys(int(v) for v in values))


def check_lengths(lengths: Sequence[int], window: int) -> None:
    """Raises ValueError unless there is a last window with whole windows before it."""
    for length in lengths:
        if length % window or length < 2 * window:
            near = max(2, round(length / window)) * window
            raise ValueError(
                f"--lengths has {length}: a length must be a multiple of the window "
                f"{window} and at least two windows, for example {near}."
            )


def limit(examples: Sequence[Instance], count: int | None) -> list[Instance]:
    """The first `count` examples of each length."""
    seen: dict[int, int] = {}
    kept = []
    for example in examples:
        seen[example.length] = seen.get(example.length, 0) + 1
        if count is None or seen[example.length] <= count:
            kept.append(example)
    return kept


def check_tokens(task: Task, model: Model, examples: Sequence[Instance]) -> None:
    """Raises ValueError for a token that the model has no embedding of."""
    for example in examples:
        for tokens in (example.tokens, *task.further(model, example)):
            name = f"example {example.id} of {task.name}"
            check_ids(tokens, model.config.vocab_size, name, model.tokenizer)


def batches(
    examples: Sequence[Instance], size: int, model: Model, method: Method
) -> Iterator[tuple[Method, list[Instance]]]:
    """Consecutive examples of one length and ratio, at most `size` of them."""
    batch: list[Instance] = []
    before = method
    for example in examples:
        now = method.resolve(model, len(example.tokens))
        same = batch and batch[0].length == example.length and before.ratio == now.ratio
        if batch and (len(batch) == size or not same):
            yield before, batch
            batch = []
        batch.append(example)
        before = now
    if batch:
        yield before, batch


def together(parts: Sequence[Iterator[int]]) -> None:
    """Runs them all, always one that is least far.

    All methods answer a batch before any goes on to the next: they can share what full
    attention makes of it (`prefill.Prefill`).
    """
    far = dict.fromkeys(range(len(parts)), 0)
    while far:
        i = min(far, key=lambda i: far[i])
        try:
            far[i] = next(parts[i])
        except StopIteration:
            del far[i]


def predict(
    task: Task,
    method: Method,
    model: Model,
    examples: Sequence[Instance],
    files: tuple[Path, Path],
    settings: RunSettings,
    stage: Stage,
) -> Iterator[int]:
    """Completes one file of predictions, and notes how long each batch took.

    Yields after each batch how many examples are done.
    """
    done = repair(files[0], [e.id for e in examples])
    stage.skip(sum(e.length for e in examples[:done]))
    at, size = 0, min(settings.batch_size, len(examples))
    with files[0].open("a", encoding="utf-8") as lines:
        for resolved, batch in batches(examples, size, model, method):
            at += len(batch)
            if at <= done:
                continue
            # Repeating an example keeps the shape, hence the compiled program.
            padded = batch + batch[-1:] * (size - len(batch))
            stage.note = f"{task.name} {method.name}"
            prefill = resolved.prefill or Prefill()
            prefill.begin()
            watch = Stopwatch()
            answers = task.run(model, resolved, padded)[: len(batch)]
            took, compiled = watch.read()
            # What another method has read counts for each that starts from it.
            first, *others = answers[0].get("seconds", [took])
            took = [first + prefill.saved, *others]
            compiled = answers[0].get("compile_seconds", compiled)
            line = {
                "task": task.name,
                "method": method.name,
                "length": batch[0].length,
                "rows": size,
                "seconds": [round(s, 6) for s in took],
                "compile_seconds": round(compiled, 6),
                "peak_bytes": prefill.peak(),
            }
            with files[1].open("a", encoding="utf-8") as times:
                times.write(json.dumps(line) + "\n")
            text = [
                json.dumps(
                    {"id": e.id, "method": method.name, "ratio": resolved.ratio}
                    | {"length": e.length, **e.info}
                    | {k: v for k, v in answer.items() if k not in TIMES}
                )
                for e, answer in zip(batch, answers, strict=True)
            ]
            new = min(len(batch), at - done)
            lines.writelines(line + "\n" for line in text[-new:])
            lines.flush()
            stage.add(sum(e.length for e in batch[-new:]))
            yield at


def summary(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median seconds of a batch per task, method and length, without compilation.

    So is the most memory that a batch had in use (`peak_bytes`, None: not known): the
    first one, which compiles, takes more.

    Lines of earlier versions, which counted compilation in, are left out.
    """
    names = ("task", "method", "length", "rows")
    timed = [line for line in lines if "compile_seconds" in line]
    found = []
    for key, batches in grouped(timed, lambda x: tuple(x[n] for n in names)).items():
        used = [b["seconds"] for b in batches]
        middle = np.median(np.asarray(used, np.float64), axis=0)
        peaks = [p for b in batches if (p := b.get("peak_bytes"))]
        found.append(
            dict(zip(names, key, strict=True))
            | {
                "seconds": [round(float(s), 4) for s in middle],
                "batches": len(used),
                "compile_seconds": round(sum(b["compile_seconds"] for b in batches), 3),
                "peak_bytes": int(np.median(peaks)) if peaks else None,
            }
        )
    return found


def repair(file: Path, ids: Sequence[str]) -> int:
    """Cuts off a half-written last line; returns the number of whole lines.

    Raises:
      ValueError: the lines are not those of the first examples.
    """
    if not file.exists():
        return 0
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        found = [json.loads(line)["id"] for line in whole.splitlines()]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found is None or found != list(ids[: len(found)]):
        raise ValueError(
            f"{file} does not hold the first examples of this run: remove it, or use "
            "--overwrite."
        )
    if len(whole) < len(data):  # after the check: it could be another program's file
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    return len(found)


def read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def prepare_folder(
    out: Path,
    run: dict[str, Any],
    weights: Mapping[str, str] = MappingProxyType({}),
    *,
    overwrite: bool,
) -> None:
    """Makes sure that predictions in `out` belong to this model and settings.

    Args:
      weights: of methods that have some, by name; other runs may have had others.
    """
    folder = out / "predictions"
    keys = ("model", "settings")
    identity = {k: v for key in keys for k, v in run[key].items() if k != "path"}
    identity = json.loads(json.dumps(identity))  # tuples become lists
    file = folder / "run.json"
    if overwrite:
        for old in (folder, out / "timings"):
            shutil.rmtree(old, ignore_errors=True)
    identity |= weights
    if file.exists():
        before = read_object(file)
        kept = {k: v for k, v in before.items() if k.startswith(WEIGHTS)}
        identity = kept | identity
        same = lambda k, v: before.get(k, weights.get(k)) == v
        differ = [k for k, v in identity.items() if not same(k, v)]
        if differ:
            changes = ", ".join(
                f"{k}={before.get(k)!r} there, {identity[k]!r} now" for k in differ
            )
            raise ValueError(
                f"--out={out} holds predictions of another run ({changes}): "
                "name another folder, or use --overwrite to discard them."
            )
    for new in (folder, out / "timings"):
        new.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


def describe_run(model: Model, settings: RunSettings) -> dict[str, Any]:
    """What has to be known to reproduce the numbers: model, settings, versions."""
    device = jax.devices()[0]
    return {
        "model": {
            "path": str(model.path),
            "base_hash": model.identity.base,
            "beacon_hash": model.identity.beacon,
            "window": model.window,
            "dtype": str(model.net.dtype),
            "trained_positions": model.config.trained_positions,
        },
        "settings": dataclasses.asdict(settings),
        "versions": {
            "python": platform.python_version(),
            "commit": _commit(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "hardware": {
            "platform": device.platform,
            "device": device.device_kind,
            "devices": jax.device_count(),
            "mesh": dict(model.partition.mesh.shape) if model.partition else None,
            "cpu_cores": os.cpu_count(),
            "machine": platform.machine(),
        },
    }


def _commit() -> str | None:
    """The commit of the checkout that runs, None outside of one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
