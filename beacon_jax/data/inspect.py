"""Shows what a prepared folder holds, before a run spends hours on it.

`beacon_jax.cli.inspect` is the command.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.data.examples import Example
from beacon_jax.data.grouped import EMPTY, GroupConfig, GroupedBatches, windows_of
from beacon_jax.data.prepared import Prepared
from beacon_jax.data.tally import drop_table, usage

OPEN, CLOSE = "⟦", "⟧"
SHOWN = 600  # characters of a stretch of a decoded example


def report(data: Prepared, config: GroupConfig) -> str:
    """Returns a text: counts per source, lengths, drops, and the batches of a run."""
    total, lengths = data.manifest["total"], data.lengths
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    repeats = len(data) - len(np.unique(data.hashes))
    lines = [
        f"{total['examples']:,} examples of {total['rows']:,} rows, "
        f"{total['tokens']:,} tokens, {_share(total['labelled'], total['tokens'])} of "
        "them labelled",
        "length: "
        + ", ".join(
            f"{name} {value:,}"
            for name, value in zip(
                ("least", "10 %", "median", "90 %", "most"), quantiles, strict=True
            )
        ),
        f"examples that another one equals: {repeats:,}",
        "",
        "tokens per source",
    ]
    for source in data.manifest["sources"]:
        lines.append(
            f"{source['tokens']:>16,}  {_share(source['tokens'], total['tokens']):>6}  "
            f"{source['examples']:>10,} of {source['rows']:,} rows  {source['uri']}"
        )
    lines += [
        "",
        usage(data.manifest),
        "left out",
        drop_table(data.manifest) or "nothing",
        "",
    ]
    return "\n".join(lines + _batches(data, config))


def _batches(data: Prepared, config: GroupConfig) -> list[str]:
    try:
        batches = GroupedBatches(data, config)
    except ValueError as error:
        return [f"batches: {error}"]
    rows = batches.rows
    windows = windows_of(data.lengths, config.window)
    most = np.where(rows == EMPTY, 0, windows[rows]).max(axis=1)
    used = rows[rows != EMPTY]
    per_batch = Counter(most.tolist())
    lines = [
        f"{batches.steps:,} steps of {config.batch_size} rows ({config.group}), "
        f"{int(data.lengths[used].sum()):,} tokens, {batches.epochs} "
        f"epoch{'s' if batches.epochs > 1 else ''}; windows of {config.window}",
        "windows  batches",
    ]
    lines += [f"{n:>7}  {count:>7,}" for n, count in sorted(per_batch.items())]
    if batches.left_out:
        left = ", ".join(f"{n}: {count}" for n, count in batches.left_out.items())
        lines.append(
            f"left out of the first epoch (incomplete groups), rows by windows: {left}"
        )
    return lines


def histogram(data: Prepared, window: int, path: Path) -> None:
    """Draws the lengths of all examples, stacked by source, into an image file.

    A bin is a window. Without windows, or with over 200 of them in the longest example,
    there are about 40 bins.
    """
    from matplotlib.figure import Figure

    longest = int(data.lengths.max())
    size = window if window and longest / window <= 200 else max(1, longest // 40)
    edges = (np.arange(0, longest + size, size) + 0.5).tolist()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = [data.lengths[data.rows_of(i)] for i in range(len(data.uris))]
    labels = [f"{uri} ({len(own):,})" for uri, own in zip(data.uris, rows, strict=True)]
    axes.hist(rows, bins=edges, stacked=True, label=labels)
    axes.set_xlabel(f"tokens (bins of {size})")
    axes.set_ylabel("examples")
    axes.set_title(f"{len(data):,} examples, {int(data.lengths.sum()):,} tokens")
    axes.legend(fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def marked(example: Example, tokenizer: Any, shown: int = SHOWN) -> str:
    """Returns the example as text, labelled stretches between ⟦ and ⟧.

    Args:
      shown: characters of each stretch; the middle of longer ones is left out.
    """
    edges = np.flatnonzero(np.diff(example.labelled)) + 1
    text = []
    for part in np.split(np.arange(len(example.tokens)), edges):
        piece = tokenizer.decode(example.tokens[part])
        if len(piece) > shown:
            gone = len(piece) - shown
            head, tail = piece[: shown // 2], piece[-(shown // 2) :]
            piece = f"{head} [... {gone:,} characters ...] {tail}"
        text.append(f"{OPEN}{piece}{CLOSE}" if example.labelled[part[0]] else piece)
    return "".join(text)


def sample(data: Prepared) -> int:
    """Returns the number of the example to show.

    It is the first with tokens of both kinds, labelled and not (a conversation), among
    the first 1000; else the first.
    """
    for i in range(min(len(data), 1000)):
        labelled = data.read(i).labelled
        if labelled.any() and not labelled.all():
            return i
    return 0


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


if __name__ == "__main__":
    from beacon_jax.cli import start

    start("inspect")
