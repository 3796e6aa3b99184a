"""What `python -m beacon_jax.evaluate` does with its options."""

from pathlib import Path
from typing import Any

from beacon_jax.evaluation import compare, floors, plots
from beacon_jax.evaluation.baselines import make_methods
from beacon_jax.evaluation.methods import ADAPT
from beacon_jax.evaluation.model import load_model
from beacon_jax.evaluation.runner import evaluate, integers
from beacon_jax.evaluation.settings import Settings
from beacon_jax.evaluation.tasks import make_tasks

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


def run(o: Any) -> str:
    """Runs every seed and prints what was found; `o` has the flags as attributes.

    Returns:
      The names of missed floors, "" if there are none.

    Raises:
      ValueError, OSError: an option that cannot be, by name.
    """
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
    plots.training_loss(lines, folder / "training_loss.png")
    return ["## Training\n\n![loss against the step](training_loss.png)\n"]
