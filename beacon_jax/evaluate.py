"""Measures a model; the same command continues a run that stopped.

python -m beacon_jax.evaluate --model=DIR --tasks=perplexity,passkey --ratios=2,4,8 \
  --methods=beacon,full,window --lengths=256,512,1024 --out=DIR [--limit=N]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from beacon_jax.evaluation import floors
from beacon_jax.evaluation.methods import load_model, make_methods
from beacon_jax.evaluation.report import table
from beacon_jax.evaluation.runner import evaluate, integers
from beacon_jax.evaluation.tasks import make_tasks
from beacon_jax.evaluation.tasks.base import Settings


def define_flags() -> None:
    flags.DEFINE_string("model", None, "HF or converted folder.", required=True)
    flags.DEFINE_string("out", None, "Folder of the results.", required=True)
    flags.DEFINE_list("tasks", ["perplexity", "passkey"], "What is measured.")
    flags.DEFINE_list("methods", ["beacon", "full", "window"], "What is compared.")
    flags.DEFINE_list("ratios", ["2", "4", "8"], "Of the methods that have a ratio.")
    flags.DEFINE_list("lengths", ["256", "512", "1024"], "Tokens, multiples of W.")
    flags.DEFINE_integer("depths", 5, "Places of the needle.")
    flags.DEFINE_integer("samples", 128, "Examples per task and length.")
    flags.DEFINE_integer("limit", None, "Only the first N examples of each length.")
    flags.DEFINE_integer("batch_size", 16, "Examples at a time.")
    flags.DEFINE_string("text", "stdlib", "stdlib, or a folder; held-out files only.")
    flags.DEFINE_integer("seed", 0, "Of the examples.")
    flags.DEFINE_integer("window", None, "For a model without beacons.")
    flags.DEFINE_string("dtype", None, "Cast to; default: as stored.")
    flags.DEFINE_string("floors", None, "JSON, or X for configs/X_floors.json.")
    flags.DEFINE_string("summary", None, "summary.json of the training run (floors).")
    flags.DEFINE_bool("overwrite", False, "Discard the predictions in --out.")


def main(argv: Sequence[str]) -> None:
    o = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: options begin with --.")
    out = Path(o.out)
    try:
        spec = floors.read_floors(o.floors) if o.floors else None
        lengths = integers("lengths", o.lengths)
        ratios = integers("ratios", o.ratios)
        tasks, methods = make_tasks(o.tasks), make_methods(o.methods, ratios)
        names = ("depths", "samples", "text", "seed", "limit", "batch_size")
        settings = Settings(tuple(lengths), **{n: getattr(o, n) for n in names})
        used = [m.ratio for m in methods if m.ratio]
        longest = max(lengths)
        model = load_model(o.model, longest, used, window=o.window, dtype=o.dtype)
        metrics, text = evaluate(
            model, tasks, methods, settings, out, overwrite=o.overwrite
        )
        print(f"\n{text}")
        if spec is None:
            return
        results = floors.check_floors(spec, metrics, lengths[0], o.summary)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    rows = [[name, "reached" if ok else "MISSED", found] for name, ok, found in results]
    section = f"## Floors\n\n{table(['floor', 'result', 'measured'], rows)}\n"
    with (out / "report.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{section}")
    print(section)
    missed = [name for name, ok, _ in results if not ok]
    if missed:
        sys.exit(f"error: floors missed: {'; '.join(missed)} (see {out}/report.md)")


if __name__ == "__main__":
    define_flags()
    app.run(main)
