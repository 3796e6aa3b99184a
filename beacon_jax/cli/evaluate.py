"""Measures a model; the same command continues a run that stopped.

Writes report.md, plots, figures as JSON and every prediction to --out. With --report
it compares the finished runs in the folders that follow.

Examples:
  beacon-jax evaluate --model=tiny-beacon --tasks=perplexity,passkey --ratios=2,4,8 \\
    --out=out/evaluation
  beacon-jax evaluate --board --model=smol.gguf --window=256 --out=out/board
  beacon-jax evaluate --report out/evaluation out/another --out=out/both
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from beacon_jax import runtime
from beacon_jax.cli.context import define_beacons
from beacon_jax.cli.ending import fail
from beacon_jax.cli.options import Group
from beacon_jax.paths import check_folder
from beacon_jax.progress import Progress, starting
from beacon_jax.resources import require

DEFAULTS = {"tasks": ["perplexity", "passkey"], "methods": ["beacon", "full", "window"]}
# What --board sets, unless it is given: the methods that need nothing of their own, and
# batches whose memories of 4,096 tokens a laptop has room for.
BOARD = {
    "tasks": ["board"],
    "methods": [
        "full",
        "window",
        "streaming",
        "snapkv",
        "expected-attention",
        "kvzip",
        "attention-matching",
        "mean-pool",
    ],
    "ratios": ["2", "4", "8"],
    "lengths": ["4096"],
    "samples": 25,
    "batch_size": 4,
}
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
    f = Group(values, "Model")
    f.text("model", None, "HF or converted folder, GGUF, tiny-beacon.")
    define_beacons(f)
    f.text("dtype", None, "Cast to; else as stored.")
    f.text("mesh", None, "Devices, as in data:1,fsdp:1,tensor:8; else one.")
    f.number("window", None, "For a model without beacons.")
    f.choice("chat", "auto", ["auto", "none"], "Chat template of the tokenizer.")
    f.number("batch_size", 16, "Examples at a time.")
    f = Group(values, "What is measured")
    f.switch("board", False, "Six RULER tasks at 4,096 tokens: sets what is not given.")
    f.names("tasks", DEFAULTS["tasks"], "Names or groups.")
    f.names(
        "methods",
        DEFAULTS["methods"],
        "What is compared; NAME_recent: last window raw.",
    )
    f.names("ratios", ["2", "4", "8"], "Of the methods that have a ratio; adapt.")
    f.names("lengths", ["256", "512", "1024"], "Tokens of an example, with its answer.")
    f.number("depths", 5, "Places of the needle.")
    f.number("samples", 128, "Examples per task and length.")
    f.number("limit", None, "Only the first N examples of each length.")
    f.names("seeds", ["0"], "Of the examples; several: one run each, then the mean.")
    f = Group(values, "Text")
    f.text("text", "stdlib", "stdlib, or a folder; held-out files only.")
    f.text("haystack", "", "Where needles are hidden; else --text, held-out files.")
    f.text("data", "", "Folder of your data sets (longbench/qasper.jsonl, ...).")
    f.number("max_length", 31_500, "Texts of data sets are cut to it from the middle.")
    f.choice("newline_stop", "paper", ["paper", "official"], "LongBench's line ends.")
    f = Group(values, "Output")
    f.text("out", None, "Folder of the results.", required=True)
    f.text("floors", None, "JSON, or a name, as quickstart: numbers to be reached.")
    f.text("summary", None, "summary.json of the training run: its loss, --floors.")
    f.switch("report", False, "Only compare the runs in the folders named.")
    f.switch("overwrite", False, "Discard the predictions in --out.")


def main(argv: Sequence[str]) -> None:
    o = flags.FLAGS
    if len(argv) > 1 and not o.report:
        sys.exit(f"error: unknown arguments {argv[1:]}: options begin with --.")
    try:
        require("matplotlib", extra="plots", for_="the report of evaluate")
        check_folder("--out", o.out)
        if o.report:
            with Progress().stage("comparing"):
                from beacon_jax.evaluation import compare

                text = compare.write([Path(d) for d in argv[1:]], Path(o.out))
            print(text)
        elif missed := run(o):
            sys.exit(f"error: floors missed: {missed} (see {o.out}/report.md)")
    except (ValueError, OSError, ImportError) as error:
        fail(error)


def run(o: Any) -> str:
    """Runs every seed and prints what was found; `o` has the flags as attributes.

    Returns:
      The names of missed floors, "" if there are none.

    Raises:
      ValueError, OSError: an option that cannot be, by name.
    """
    if not o.model:
        raise ValueError("--model is not given: name an HF folder or a converted one.")
    with starting():  # after the flags: jax loads
        from beacon_jax.evaluation import compare, floors
        from beacon_jax.evaluation.baselines import make_methods
        from beacon_jax.evaluation.inputs import RunSettings
        from beacon_jax.evaluation.methods import ADAPT
        from beacon_jax.evaluation.reading import load_model
        from beacon_jax.evaluation.runner import evaluate, integers
        from beacon_jax.evaluation.tasks import make_tasks
        from beacon_jax.hf import hub

    if o.board:
        choose_board(o)
    out = Path(o.out)
    spec = floors.read_floors(o.floors) if o.floors else None
    lengths = integers("lengths", o.lengths)
    seeds = integers("seeds", o.seeds, least=0)
    numbers = integers("ratios", [r for r in o.ratios if r != ADAPT])
    ratios = [*numbers, *([ADAPT] if ADAPT in o.ratios else [])]
    tasks, methods = make_tasks(o.tasks), make_methods(o.methods, ratios)
    options = {name: getattr(o, name) for name in OPTIONS}
    settings = [RunSettings(tuple(lengths), seed=s, **options) for s in seeds]
    _check_inputs(o)
    used = sorted({int(m.ratio) for m in methods if isinstance(m.ratio, int)})
    # "adapt" takes the model's own ratios; 1 only says that beacons are needed.
    beacons = (used or [1]) if any(m.live_ratio for m in methods) else []
    with Progress().stage("loading", note=o.model):
        runtime.for_command()
        model = load_model(
            str(hub.find(o.model, "--model")),
            beacons,
            window=o.window,
            dtype=o.dtype,
            mesh=o.mesh,
            beacons=o.beacons,
            allow_other_base=o.allow_other_base,
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
        with Progress().stage("comparing"):
            text = compare.write(folders, out)
        print(text)
    return "; ".join(missed)


def choose_board(o: Any) -> None:
    """Sets what --board stands for; a flag that was given keeps its value.

    Beacons of an adapter take part beside the others.
    """
    methods = BOARD["methods"] + (["beacon"] if o.beacons else [])
    for name, value in (BOARD | {"methods": methods}).items():
        if o[name].using_default_value:
            o[name].value = value


def _check_inputs(o: Any) -> None:
    """Raises the error of a flag that names a file which is not there."""
    from beacon_jax.data.sources import source_bytes

    for name in ("text", "haystack"):
        uri = getattr(o, name)
        try:
            source_bytes([uri] if uri else [])
        except (ValueError, OSError) as error:
            text = str(error).replace(f"uri={uri!r}", f"--{name}={uri}")
            raise type(error)(text) from error
    if o.data and not Path(o.data).is_dir():
        raise FileNotFoundError(
            f"--data={o.data} is no folder: name the one that holds your data sets."
        )
    summary = Path(o.summary or ".")  # a run that has not ended has its metrics only
    if o.summary and not (
        summary.is_file() or summary.with_name("metrics.jsonl").is_file()
    ):
        raise FileNotFoundError(
            f"--summary={o.summary} is no file: name summary.json of a training run."
        )


def _training(summary: str | None, folder: Path) -> list[str]:
    """Makes a section with the loss of the training run that wrote `summary`."""
    lines = Path(summary).with_name("metrics.jsonl") if summary else None
    if lines is None or not lines.is_file():
        return []
    from beacon_jax.evaluation import plots  # matplotlib

    plots.training_loss(lines, folder / "training_loss.png")
    return ["## Training\n\n![loss against the step](training_loss.png)\n"]
