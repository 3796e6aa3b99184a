"""Measures speed and memory; the same command measures only what is missing in --out.

--plan prints what chips can reach at best and measures nothing. --readme=bench.json
writes its tables into docs/benchmarks.md.

Examples:
  beacon-jax bench --preset=llama2-7b --lengths=4096,32768,131072 --ratios=4,8 --out=DIR
  beacon-jax bench --preset=qwen2-0.5b --window=1024 --ratios=8 --dtype=float32 \\
    --lengths=4096,8192,16384 --parts=prefill,decode --against=torch
  beacon-jax bench --plan
"""

import sys
from pathlib import Path

from absl import flags

from beacon_jax import runtime
from beacon_jax.cli.ending import command
from beacon_jax.cli.options import Group
from beacon_jax.paths import check_folder
from beacon_jax.progress import Progress, starting
from beacon_jax.resources import require

PAGE = Path("docs/benchmarks.md")  # of the repository, for --readme


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    f = Group(values, "Model")
    f.names("preset", None, "Of model.presets, one or several; else tiny, plan: all.")
    f.number("window", None, "Of the beacons; else the preset's.")
    f.choice("dtype", "bfloat16", ["bfloat16", "float32"], "Of all that is measured.")
    f = Group(values, "What is measured")
    f.names("parts", ["kernels", "prefill", "decode", "train"], "And parity.")
    f.switch("kernels", False, "Short for --parts=kernels.")
    f.names("lengths", None, "Tokens of the text.")
    f.names("ratios", None, "Of the beacons, beside full attention.")
    f.names("batches", ["1", "8"], "Rows of the decoding.")
    f.names("queries", [], "Of the kernels; else windows with beacons at x8 and x2.")
    f.names("memory", [], "Slots of the kernels' buffer; else 16 windows.")
    f.names("against", [], "torch: transformers with the same weights (extra bench).")
    f.number("repeats", 5, "Samples per figure.")
    f = Group(values, "Output")
    f.text("out", None, "Folder; else benchmarks/DATE-CHIP.")
    f.switch("plan", False, "Print roofline times by formula; measures nothing.")
    f.text("readme", None, "bench.json files; their tables go into docs/benchmarks.md.")


@command
def main(o: flags.FlagValues) -> None:
    if o.out:
        check_folder("--out", o.out)
    (_readme if o.readme else _roofline if o.plan else _measure)(o)


def _readme(o: flags.FlagValues) -> None:
    with starting():  # jax takes seconds
        from beacon_jax.bench import records, report

    texts = [
        report.readme_text(records.read(Path(file)), f"../{Path(file).as_posix()}")
        for file in o.readme.split(",")
    ]
    report.update_readme(PAGE, "\n\n".join(texts))


def _roofline(o: flags.FlagValues) -> None:
    with Progress().stage("planning"):
        from beacon_jax.bench import records, roofline

        made = roofline.make(o.preset, o.lengths, o.ratios)
    print(roofline.text(made))
    if o.out:
        records.write_json(Path(o.out) / "plan.json", made)


def _measure(o: flags.FlagValues) -> None:
    require("matplotlib", extra="plots", for_="bench")
    with starting():
        from beacon_jax.bench import report, runner

    # It measures compilation too, so programs of earlier runs are of no use.
    runtime.quiet()
    rows = runner.run_all(o, ["kernels"] if o.kernels else o.parts)
    print("\n\n".join(report.sections(rows)))
    if failed := [report.line(row) for row in rows if row["status"] == "failed"]:
        sys.exit("error: " + "\n".join(failed))
