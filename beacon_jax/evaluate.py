"""Measures a model; the same command continues a run that stopped.

python -m beacon_jax.evaluate --model=DIR --tasks=perplexity,passkey --ratios=2,4,8 \
  --methods=beacon,full,window --lengths=256,512,1024 --out=DIR [--limit=N]
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from beacon_jax.evaluation import floors
from beacon_jax.evaluation.methods import load_model, make_methods
from beacon_jax.evaluation.runner import evaluate, integers
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.base import Settings


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    text, number, many, switch = (
        functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=values)
        for kind in ("string", "integer", "list", "bool")
    )
    text("model", None, "HF or converted folder.", required=True)
    text("out", None, "Folder of the results.", required=True)
    many("tasks", ["perplexity", "passkey"], "What is measured.")
    many("methods", ["beacon", "full", "window"], "What is compared.")
    many("ratios", ["2", "4", "8"], "Of the methods that have a ratio.")
    many("lengths", ["256", "512", "1024"], "Tokens, multiples of the window.")
    number("depths", 5, "Places of the needle.")
    number("samples", 128, "Examples per task and length.")
    number("limit", None, "Only the first N examples of each length.")
    number("batch_size", 16, "Examples at a time.")
    text("text", "stdlib", "stdlib, or a folder; held-out files only.")
    number("seed", 0, "Of the examples.")
    number("window", None, "For a model without beacons.")
    text("dtype", None, "Cast to; default: as stored.")
    text("floors", None, "JSON, or X for configs/X_floors.json.")
    text("summary", None, "summary.json of the training run, for --floors.")
    switch("overwrite", False, "Discard the predictions in --out.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: options begin with --.")
    try:
        run(flags.FLAGS)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(o: flags.FlagValues) -> None:
    out = Path(o.out)
    spec = floors.read_floors(o.floors) if o.floors else None
    lengths = integers("lengths", o.lengths)
    ratios = integers("ratios", o.ratios)
    tasks, methods = make_tasks(o.tasks), make_methods(o.methods, ratios)
    names = ("depths", "samples", "text", "seed", "limit", "batch_size")
    settings = Settings(tuple(lengths), **{n: getattr(o, n) for n in names})
    used = [m.ratio for m in methods if m.ratio]
    model = load_model(o.model, max(lengths), used, window=o.window, dtype=o.dtype)
    metrics, text = evaluate(
        model, tasks, methods, settings, out, overwrite=o.overwrite
    )
    print(f"\n{text}")
    if spec is not None:
        results = floors.check_floors(spec, metrics, lengths[0], o.summary)
        section, missed = floors.verdict(results)
        with (out / "report.md").open("a", encoding="utf-8") as file:
            file.write(f"\n{section}")
        print(section)
        if missed:
            sys.exit(f"error: floors missed: {missed} (see {out / 'report.md'})")


if __name__ == "__main__":
    define_flags()
    app.run(main)
