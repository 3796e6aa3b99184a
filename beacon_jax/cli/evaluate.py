"""Measures a model; the same command continues a run that stopped.

python -m beacon_jax.evaluate --model=DIR --tasks=perplexity,passkey --ratios=2,4,8 \
  --methods=beacon,full,window --lengths=256,512,1024 --out=DIR [--limit=N]
python -m beacon_jax.evaluate --report DIR DIR … --out=DIR      # compares finished runs
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

DEFAULTS = {"tasks": ["perplexity", "passkey"], "methods": ["beacon", "full", "window"]}
OPTIONS = (
    "depths",
    "samples",
    "text",
    "haystack",
    "data",
    "max_length",
    "newline_stop",
    "chat",
    "limit",
    "batch_size",
)


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
            from beacon_jax.evaluation import compare

            print(compare.write([Path(d) for d in argv[1:]], Path(o.out)))
        elif missed := run(o):
            sys.exit(f"error: floors missed: {missed} (see {o.out}/report.md)")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(o: Any) -> str:
    """Runs every seed and prints what was found; `o` has the flags as attributes.

    Returns:
      The names of missed floors, "" if there are none.

    Raises:
      ValueError, OSError: an option that cannot be, by name.
    """
    from beacon_jax.evaluation import compare, floors  # after the flags: jax loads
    from beacon_jax.evaluation.baselines import make_methods
    from beacon_jax.evaluation.methods import ADAPT
    from beacon_jax.evaluation.model import load_model
    from beacon_jax.evaluation.runner import evaluate, integers
    from beacon_jax.evaluation.settings import Settings
    from beacon_jax.evaluation.tasks import make_tasks

    if not o.model:
        raise ValueError("--model is not given: name an HF folder or a converted one.")
    out = Path(o.out)
    spec = floors.read_floors(o.floors) if o.floors else None
    lengths = integers("lengths", o.lengths)
    seeds = integers("seeds", o.seeds, least=0)
    numbers = integers("ratios", [r for r in o.ratios if r != ADAPT])
    ratios = [*numbers, *([ADAPT] if ADAPT in o.ratios else [])]
    tasks, methods = make_tasks(o.tasks), make_methods(o.methods, ratios)
    options = {name: getattr(o, name) for name in OPTIONS}
    settings = [Settings(tuple(lengths), seed=s, **options) for s in seeds]
    longest = max(task.longest(settings[0]) for task in tasks)
    used = sorted({int(m.ratio) for m in methods if isinstance(m.ratio, int)})
    # "adapt" takes the model's own ratios; 1 only says that beacons are needed.
    beacons = (used or [1]) if any(m.live_ratio for m in methods) else []
    model = load_model(
        o.model, longest, beacons, window=o.window, dtype=o.dtype, mesh=o.mesh
    )
    missed, folders = [], []
    for one in settings:
        folder = out / f"seed{one.seed}" if len(seeds) > 1 else out
        metrics, text = evaluate(
            model, tasks, methods, one, folder, overwrite=o.overwrite
        )
        print(f"\n{text}")
        folders.append(folder)
        sections = _training(o.summary, folder)
        if spec is not None:
            results = floors.check_floors(spec, metrics, lengths[0], o.summary)
            section, names = floors.verdict(results)
            print(section)
            sections.append(section)
            missed += [names] if names else []
        with (folder / "report.md").open("a", encoding="utf-8") as file:
            file.writelines(f"\n{section}" for section in sections)
    if len(seeds) > 1:
        print(compare.write(folders, out))
    return "; ".join(missed)


def _training(summary: str | None, folder: Path) -> list[str]:
    """A section with the loss of the training run that wrote `summary`."""
    lines = Path(summary).with_name("metrics.jsonl") if summary else None
    if lines is None or not lines.is_file():
        return []
    from beacon_jax.evaluation import plots  # matplotlib

    plots.training_loss(lines, folder / "training_loss.png")
    return ["## Training\n\n![loss against the step](training_loss.png)\n"]
