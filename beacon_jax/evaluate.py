"""Measures a model; the same command continues a run that stopped.

python -m beacon_jax.evaluate --model=DIR --tasks=perplexity,passkey --ratios=2,4,8 \
  --methods=beacon,full,window --lengths=256,512,1024 --out=DIR [--limit=N]
python -m beacon_jax.evaluate --report DIR DIR … --out=DIR      # compares finished runs
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from beacon_jax.evaluation import command, compare

DEFAULTS = {"tasks": ["perplexity", "passkey"], "methods": ["beacon", "full", "window"]}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    text, number, many, switch, one_of = (
        functools.partial(getattr(flags, f"DEFINE_{kind}"), flag_values=values)
        for kind in ("string", "integer", "list", "bool", "enum")
    )
    text("model", None, "HF or converted folder.")
    text("out", None, "Folder of the results.", required=True)
    many("tasks", DEFAULTS["tasks"], "What is measured; names or groups.")
    many("methods", DEFAULTS["methods"], "What is compared.")
    many("ratios", ["2", "4", "8"], "Of the methods that have a ratio; adapt.")
    many("lengths", ["256", "512", "1024"], "Tokens of an example, answer included.")
    number("depths", 5, "Places of the needle.")
    number("samples", 128, "Examples per task and length.")
    number("limit", None, "Only the first N examples of each length.")
    number("batch_size", 16, "Examples at a time.")
    text("text", "stdlib", "stdlib, or a folder; held-out files only.")
    text("haystack", "", "Where needles are hidden; default: --text, held-out files.")
    text("data", "", "Folder of your data sets (longbench/qasper.jsonl, ...).")
    number("max_length", 31_500, "Texts of data sets are cut to it from the middle.")
    one_of("newline_stop", "paper", ["paper", "official"], "LongBench's line ends.")
    one_of("chat", "auto", ["auto", "none"], "Chat template of the tokenizer.")
    many("seeds", ["0"], "Of the examples; several: one run each, then the mean.")
    text("mesh", None, "Devices, as in data:1,fsdp:1,tensor:8; default: one.")
    number("window", None, "For a model without beacons.")
    text("dtype", None, "Cast to; default: as stored.")
    text("floors", None, "JSON, or X for configs/X_floors.json.")
    text("summary", None, "summary.json of the training run: its loss, --floors.")
    switch("report", False, "Only compare the runs in the folders named.")
    switch("overwrite", False, "Discard the predictions in --out.")


def main(argv: Sequence[str]) -> None:
    o = flags.FLAGS
    if len(argv) > 1 and not o.report:
        raise app.UsageError(f"unknown arguments {argv[1:]}: options begin with --.")
    try:
        if o.report:
            print(compare.write([Path(d) for d in argv[1:]], Path(o.out)))
        elif missed := command.run(o):
            sys.exit(f"error: floors missed: {missed} (see {o.out}/report.md)")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    define_flags()
    app.run(main)
