"""What mounting documents that were compressed separately costs, in nats per token.

python -m benchmarks.mount_loss [--model=FOLDER] [--out=FOLDER]

A held-out text is cut into A, B and the window that follows them, whose tokens are
predicted after (a) A + B compressed at once, (b) A and B compressed by themselves and
mounted, (c) B alone and (d) nothing. A and B are halves of one text, so (b) loses as
much as mounting can: B's beacons never saw A. The same tokens are predicted
everywhere; rows are paired. Lengths that are no multiple of the window end in open
windows, which mounting keeps raw. Then the passkey task at 256 tokens, its past
compressed at once or as two halves. Writes mount_loss.json and mount_loss.md.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from beacon_jax.benchmark.records import provenance
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Beacon
from beacon_jax.evaluation.reading import Rows, load_model, losses, read
from beacon_jax.evaluation.report import interval, table
from beacon_jax.evaluation.statistics import mean_interval, ratio_interval
from beacon_jax.evaluation.tasks.base import Metric
from beacon_jax.evaluation.tasks.passkey import PasskeyRetrieval
from beacon_jax.evaluation.tasks.perplexity import Perplexity
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.mount import concatenate


def remember(model: Model, texts: list[np.ndarray], ratio: int) -> Memory:
    """The memory of texts that are read from their starts."""
    return read(model, texts, ratio)[1]


def mean_losses(model: Model, memory: Memory, rows: list[np.ndarray], ratio: int):
    """Mean loss of each row's tokens but the first behind a memory [B]; float64."""
    given, labels = [row[:-1] for row in rows], [row[1:] for row in rows]
    found, _ = losses(model, memory, given, labels, ratio)
    return found[:, : len(rows[0]) - 1].mean(1)


def measure(
    model: Model, texts: list[np.ndarray], ratio: int, half: int, batch: int
) -> dict[str, Any]:
    """All cases at one ratio and one length of A and of B."""
    found: dict[str, list[np.ndarray]] = {}
    slots = {}
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch]
        end = len(rows[0]) - 1 - model.window
        a, b, both = (
            [row[end - begin : end - stop] for row in rows]
            for begin, stop in ((2 * half, half), (half, 0), (2 * half, 0))
        )
        last = [row[end:] for row in rows]
        alone = remember(model, b, ratio)
        memories = {
            "at_once": remember(model, both, ratio),
            "mounted": concatenate([remember(model, a, ratio), alone]),
            "second": alone,
            "nothing": remember(model, [row[:0] for row in rows], ratio),
        }
        for name, memory in memories.items():
            found.setdefault(name, []).append(mean_losses(model, memory, last, ratio))
            entries = memory.state.slots + memory.state.open_entries("interleave")
            slots[name] = int(entries[0])
    loss = {name: np.concatenate(values) for name, values in found.items()}
    triple = lambda values: dict(zip(("value", "low", "high"), values, strict=True))
    gained = loss["second"] - loss["mounted"], loss["second"] - loss["at_once"]
    return {
        "ratio": ratio,
        "tokens_each": half,
        "rows": len(texts),
        "entries": slots,
        "loss": {name: triple(mean_interval(x)) for name, x in loss.items()},
        "cost_of_mounting": triple(mean_interval(loss["mounted"] - loss["at_once"])),
        "gain_of_first": triple(mean_interval(gained[1])),
        "gain_of_first_mounted": triple(mean_interval(gained[0])),
        "share_of_gain_kept": triple(ratio_interval(*gained)),
    }


class Mounted(Beacon):
    """The past as two halves of whole windows that do not see each other."""

    family = "mounted"

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        end = len(past[0]) // (2 * model.window) * model.window
        halves = [row[:end] for row in past], [row[end:] for row in past]
        parts = [remember(model, half, self.live_ratio) for half in halves]
        return concatenate(parts)


def passkeys(model: Model, ratios: list[int], settings: RunSettings) -> list[Metric]:
    """Accuracy of the passkey task per ratio, at once and mounted."""
    task, predictions = PasskeyRetrieval(), []
    examples = task.examples(model, settings, TaskData(settings, model.tokenizer))
    for method in (kind(r) for r in ratios for kind in (Beacon, Mounted)):
        about = {"method": method.name, "ratio": method.ratio}
        for start in range(0, len(examples), settings.batch_size):
            batch = examples[start : start + settings.batch_size]
            found = task.run(model, method, batch)
            predictions += [
                about | {"length": e.length} | e.info | answer
                for e, answer in zip(batch, found, strict=True)
            ]
    return task.score(predictions)


def passkey_table(metrics: list[Metric]) -> str:
    metrics = [m for m in metrics if m["metric"] == "accuracy"]
    depths = sorted({m["depth"] for m in metrics if m["depth"] is not None})
    cells = {(m["method"], m["depth"]): m for m in metrics}
    rows = [
        [
            name,
            interval(cells[name, None], 2),
            *(f"{cells[name, d]['value']:.2f}" for d in depths),
        ]
        for name in dict.fromkeys(m["method"] for m in metrics)
    ]
    head = ["passkey, 256 tokens", "accuracy", *(f"depth {d:g}" for d in depths)]
    return table(head, rows) + "\n"


def markdown(results: list[dict[str, Any]]) -> str:
    head = [
        *("A, B: tokens each", "ratio", "at once", "mounted", "B alone", "nothing"),
        *("mounted - at once", "entries: at once / mounted / B"),
    ]
    rows = []
    for r in results:
        entries = (r["entries"][name] for name in ("at_once", "mounted", "second"))
        rows.append(
            [
                r["tokens_each"],
                f"x{r['ratio']}",
                *(f"{x['value']:.3f}" for x in r["loss"].values()),
                interval(r["cost_of_mounting"], 3),
                " / ".join(map(str, entries)),
            ]
        )
    return table(head, rows) + "\n"


def main(argv):
    del argv
    f = flags.FLAGS
    ratios, lengths = [int(r) for r in f.ratios], [int(n) for n in f.tokens]
    model = load_model(f.model, ratios)
    window = model.window
    longest = 2 * -(-max(lengths) // window) * window + window
    settings = RunSettings(lengths=(longest,), samples=f.samples)
    inputs = TaskData(settings, model.tokenizer)
    texts = [e.tokens for e in Perplexity().examples(model, settings, inputs)]
    results = []
    for half in lengths:
        for ratio in ratios:
            results.append(measure(model, texts, ratio, half, f.batch_size))
            print(json.dumps(results[-1]), flush=True)
    keys = RunSettings(lengths=(256,), samples=f.samples, batch_size=f.batch_size)
    found = passkeys(model, ratios, keys)
    out = Path(f.out)
    out.mkdir(parents=True, exist_ok=True)
    record = provenance() | {
        "model": f.model,
        "text": "stdlib, held out",
        "predicted_tokens_per_row": window,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "results": results,
        "passkeys": found,
    }
    (out / "mount_loss.json").write_text(json.dumps(record, indent=2) + "\n")
    tables = markdown(results) + "\n" + passkey_table(found)
    (out / "mount_loss.md").write_text(tables)
    print(tables)


if __name__ == "__main__":
    flags.DEFINE_string("model", "assets/tiny-beacon", "HF or converted folder.")
    flags.DEFINE_list("ratios", ["2", "4", "8"], "Raw tokens per beacon.")
    flags.DEFINE_list("tokens", ["128", "120"], "Tokens of A, and of B.")
    flags.DEFINE_integer("samples", 256, "Rows.")
    flags.DEFINE_integer("batch_size", 64, "Rows at a time.")
    flags.DEFINE_string("out", "out/mount_loss", "Folder of the results.")
    app.run(main)
