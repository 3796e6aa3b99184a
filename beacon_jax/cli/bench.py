"""Measures speed and memory; the same command measures only what is missing in --out.

python -m beacon_jax.bench --preset=llama2-7b --lengths=4096,32768,131072 --ratios=4,8 \
  [--parts=parity,kernels,prefill,decode,train | --kernels] --out=DIR
python -m beacon_jax.bench --preset=qwen2-0.5b --window=1024 --ratios=8 \
  --lengths=4096,8192,16384 --dtype=float32 --parts=prefill,decode --against=torch
python -m beacon_jax.bench --plan [--preset=...]     # what chips can reach at best
python -m beacon_jax.bench --readme=DIR/bench.json   # its tables into README.md
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    text, number, many, switch, choice = (
        functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=values)
        for kind in ("string", "integer", "list", "bool", "enum")
    )
    many("preset", None, "One of model.presets, or several; else tiny, all of a plan.")
    many("lengths", None, "Tokens of the text.")
    many("ratios", None, "Of the beacons, beside full attention.")
    many("batches", ["1", "8"], "Rows of the decoding.")
    many("queries", [], "Of the kernels; else windows with beacons at x8 and x2.")
    many("memory", [], "Slots of the kernels' buffer; else 16 windows.")
    many("parts", ["kernels", "prefill", "decode", "train"], "What is measured.")
    switch("kernels", False, "Short for --parts=kernels.")
    number("window", None, "Of the beacons; else the preset's.")
    many("against", [], "torch: transformers with the same weights (extra bench).")
    number("repeats", 5, "Samples per figure.")
    choice("dtype", "bfloat16", ["bfloat16", "float32"], "Of all that is measured.")
    text("out", None, "Folder; else benchmarks/DATE-CHIP.")
    switch("plan", False, "Print roofline times by formula; measures nothing.")
    text("readme", None, "bench.json files; rewrites README.md between its markers.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}: options begin with --.")
    try:
        o = flags.FLAGS
        (_readme if o.readme else _plan if o.plan else _measure)(o)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _readme(o: flags.FlagValues) -> None:
    from beacon_jax.benchmark import records, report  # jax takes seconds

    files = o.readme.split(",")
    text = "\n\n".join(report.readme_text(records.read(Path(f)), f) for f in files)
    report.update_readme(Path("README.md"), text)


def _plan(o: flags.FlagValues) -> None:
    from beacon_jax.benchmark import plan

    made = plan.make(o.preset, o.lengths, o.ratios)
    print(plan.text(made))
    if o.out:
        file = Path(o.out) / "plan.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def _measure(o: flags.FlagValues) -> None:
    from beacon_jax.benchmark import report, runner

    rows = runner.run_all(o, ["kernels"] if o.kernels else o.parts)
    print("\n\n".join(report.sections(rows)))
    if failed := [report.line(row) for row in rows if row["status"] == "failed"]:
        sys.exit("error: " + "\n".join(failed))
