"""What a run says: criteria, tables and a figure, from the cells of all seeds.

Criteria are those of a mean over seeds. One that is not met is a finding, and is said
in plain words; it is no error of the run.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from beacon_jax.evaluation.statistics import grouped
from beacon_jax.experiments.miniature.cells import ASKED, BEACONS, CONTEXTS, MIXED, SOFT
from beacon_jax.experiments.miniature.data import CHANCE
from beacon_jax.experiments.miniature.training import CONTEXT, MOST_PAIRS, RATIOS

type Row = dict[str, Any]

MAIN = "beacons"
SPARSE, DENSE, FOUR_TIMES = (CONTEXT, 8), (CONTEXT, MOST_PAIRS), (4 * CONTEXT, 16)
NAMES = {
    "full": "full attention",
    "window": "questions only",
    "random": "random drop",
    "mean-pool": "mean pooling",
    "snapkv": "SnapKV",
    "snapkv_aware": "SnapKV that sees the questions",
    "beacons": "beacons",
    "appended": "beacons, appended",
    "per sequence": "beacons, a ratio per sequence",
    SOFT: "soft tokens",
}


class Criterion(NamedTuple):
    """A claim, and whether the run bears it out.

    Attributes:
      claim: in words.
      met: whether it holds.
      found: the figures that decide it.
    """

    claim: str
    met: bool
    found: str


class Accuracy:
    """Accuracies of all cells, by seed.

    Args:
      seeds: of each seed its record, with "cells": fields of `cells.Cell`.
    """

    def __init__(self, seeds: Sequence[Row]):
        self._found: dict[tuple[Any, ...], list[float]] = {}
        for record in seeds:
            for cell in record["cells"]:
                key = cell["context"], cell["pairs"], cell["method"], cell["ratio"]
                share = cell["hits"] / cell["questions"]
                self._found.setdefault(key, []).append(share)

    def each(self, context: tuple[int, int], method: str, ratio: Any) -> list[float]:
        """Returns the accuracy of each seed, in order."""
        return self._found[(*context, method, ratio)]

    def mean(self, context: tuple[int, int], method: str, ratio: Any = None) -> float:
        """Returns the mean over seeds."""
        return statistics.fmean(self.each(context, method, ratio))


def criteria(seeds: Sequence[Row]) -> list[Criterion]:
    """Checks what the paper claims, and what this run must show for it.

    Args:
      seeds: of each seed its record: "cells", and "frozen", whether the base is what it
        was and, with beacons off, computes what it did.
    """
    acc, percent = Accuracy(seeds), lambda x: f"{100 * x:.1f} %"
    made = []
    full = acc.mean(SPARSE, "full")
    for ratio, share in ((2, 0.99), (4, 0.95)):
        here = acc.mean(SPARSE, MAIN, ratio)
        made.append(
            Criterion(
                f"close to full attention: x{ratio} has {100 * share:.0f} % of its "
                "accuracy at 8 pairs in 128 tokens",
                here >= share * full,
                f"{percent(here)} of {percent(full)}",
            )
        )
    unseen = acc.mean(SPARSE, MAIN, ASKED[-1])
    made.append(
        Criterion(
            f"any ratio from one training: x{ASKED[-1]}, which training never drew, "
            "is above 5 times chance",
            unseen >= 5 * CHANCE,
            f"{percent(unseen)}, chance {percent(CHANCE)}",
        )
    )
    best = max(ASKED, key=lambda r: acc.mean(FOUR_TIMES, MAIN, r))
    here, full = acc.mean(FOUR_TIMES, MAIN, best), acc.mean(FOUR_TIMES, "full")
    made.append(
        Criterion(
            "beyond the training length: at 4 times of it the best ratio is 30 points "
            "above full attention",
            here >= full + 0.3,
            f"x{best} {percent(here)}, full attention {percent(full)}",
        )
    )
    for context in CONTEXTS:
        here, drop = acc.mean(context, MAIN, 4), acc.mean(context, "random", 4)
        made.append(
            Criterion(
                f"better than dropping: x4 is 30 points above random drop at the same "
                f"bytes, {context[1]} pairs in {context[0]} tokens",
                here >= drop + 0.3,
                f"{percent(here)}, random drop {percent(drop)}",
            )
        )
    for claim, other in (
        ("interleaved better than appended", "appended"),
        ("better than soft tokens of as many slots, trained equally", SOFT),
    ):
        made.append(_compared(acc, claim, other, RATIOS))
    claim = "a ratio drawn per window better than one per sequence"
    per_window = _compared(
        acc, f"{claim}, where windows differ", "per sequence", (MIXED,)
    )
    uniform = _compared(acc, f"{claim}, at one ratio", "per sequence", RATIOS)
    frozen = all(record["frozen"] for record in seeds)
    last = Criterion(
        "the base stays frozen: its parameters' hash, and its logits without beacons, "
        "are the same after all trainings",
        frozen,
        "equal bits" if frozen else "they differ",
    )
    return [*made, per_window, uniform, last]


def _compared(
    acc: Accuracy, claim: str, other: str, ratios: Sequence[Any]
) -> Criterion:
    """Compares beacons with another way, which was trained for as many steps."""
    cells = [(context, r) for context in (SPARSE, DENSE) for r in ratios]
    by_seed = zip(
        *(
            [
                a - b
                for a, b in zip(
                    acc.each(c, MAIN, r), acc.each(c, other, r), strict=True
                )
            ]
            for c, r in cells
        ),
        strict=True,
    )
    gaps = [statistics.fmean(gap) for gap in by_seed]
    listed = ", ".join(f"{100 * gap:+.1f}" for gap in gaps)
    return Criterion(
        f"{claim} (mean of {len(cells)} cells at 128 tokens)",
        statistics.fmean(gaps) > 0,
        f"{listed} points, seed by seed",
    )


def markdown(result: Row) -> str:
    """Writes the criteria, a table per context, and what the parts took."""
    seeds = result["seeds"]
    acc, count = Accuracy(seeds), len(seeds)
    lines = ["| claim | holds | found |", "|---|---|---|"]
    lines += [
        f"| {c['claim']} | {'yes' if c['met'] else '**no**'} | {c['found']} |"
        for c in result["criteria"]
    ]
    first = seeds[0]["cells"][0]
    spread = " ± s.d." if count > 1 else ""
    lines += [
        "",
        f"Accuracy in %, mean{spread} over {count} seed{'s' * (count > 1)} of "
        f"{first['questions']:,} questions each; chance {100 * CHANCE:.1f}. Methods of "
        "one ratio keep the same bytes.",
    ]
    for context in CONTEXTS:
        titles: dict[Any, str] = {r: f"x{r}" for r in ASKED}
        if context[0] == CONTEXT:
            titles[MIXED] = "a ratio per window"
        title = f"{context[1]} pairs in {context[0]} tokens"
        lines += ["", "| " + " | ".join([title, *titles.values()]) + " |"]
        lines += ["|---|" + "---|" * len(titles)]
        for method, name in NAMES.items():
            shown = (
                _shown(acc, context, method, ratio, method in ("full", "window"))
                for ratio in titles
            )
            lines.append("| " + " | ".join([name, *shown]) + " |")
    lines += ["", "| seed | part | steps | minutes |", "|---|---|---|---|"]
    lines += [
        f"| {record['seed']} | {part} | {x['step']:,} | {x['seconds'] / 60:.1f} |"
        for record in seeds
        for part, x in record["trained"].items()
    ]
    return "\n".join(lines) + "\n"


def _shown(acc: Accuracy, context: Any, method: str, ratio: Any, plain: bool) -> str:
    try:
        found = acc.each(context, method, None if plain else ratio)
    except KeyError:
        return "–"
    text = f"{100 * statistics.fmean(found):.1f}"
    if len(found) > 1:
        text += f" ± {100 * statistics.stdev(found):.1f}"
    return text


def draw(result: Row, path: Path) -> None:
    """Draws accuracy over the ratio, a panel per context and a line per method."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    panels = figure.subplots(1, len(CONTEXTS), sharey=True)
    acc = Accuracy(result["seeds"])
    # Beacons are full lines, and what needs no training or sees the questions is not.
    style = {"random": ":", "mean-pool": ":", "snapkv": ":", "snapkv_aware": "-."}
    for panel, context in zip(panels, CONTEXTS, strict=True):
        panel.axhline(
            100 * acc.mean(context, "full"), color="black", label=NAMES["full"]
        )
        panel.axhline(100 * CHANCE, color="grey", linestyle=":", label="chance")
        shown = [*BEACONS, SOFT, *style]
        for number, method in enumerate(shown):
            each = [acc.each(context, method, r) for r in ASKED]
            means = [100 * statistics.fmean(x) for x in each]
            errors = [100 * (statistics.stdev(x) if len(x) > 1 else 0.0) for x in each]
            panel.errorbar(
                ASKED,
                means,
                errors,
                color=f"C{number}",
                linestyle=style.get(method, "-"),
                linewidth=2.5 if method == MAIN else 1.2,
                marker="o",
                markersize=4,
                label=NAMES[method],
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(ASKED, [f"x{r}" for r in ASKED])
        panel.set(title=f"{context[1]} pairs in {context[0]} tokens", ylim=(-2, 102))
    panels[0].set_ylabel("answers that are right, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def summary(result: Row) -> str:
    """Says which claims hold, and lists those that do not as findings."""
    rows = grouped(result["criteria"], lambda row: row["met"])
    lines = [f"holds: {row['claim']}: {row['found']}" for row in rows.get(True, [])]
    lines += [
        f"finding: this run does not show it: {row['claim']}: {row['found']}"
        for row in rows.get(False, [])
    ]
    return "\n".join(lines)
