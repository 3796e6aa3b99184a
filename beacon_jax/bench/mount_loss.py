"""What mounting documents that were compressed separately costs, in nats per token.

python -m beacon_jax.bench.mount_loss [--model=FOLDER] [--out=FOLDER]

A held-out text is cut into A, B and the window that follows them, whose tokens are
predicted after (a) A + B compressed at once, (b) A and B compressed by themselves and
mounted, (c) B alone and (d) nothing. A and B are halves of one text, so (b) loses as
much as mounting can: B's beacons never saw A. The same tokens are predicted
everywhere; rows are paired. Lengths that are no multiple of the window end in open
windows, which mounting keeps raw. Then the passkey task at 256 tokens, its past
compressed at once or as two halves. Writes mount_loss.json and mount_loss.md.
"""

import json

import jax
from absl import app, flags

from beacon_jax.bench.losses import compare, define_flags, held_out, remember, triple
from beacon_jax.bench.records import Row, write_result
from beacon_jax.bench.report import by_column
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.methods import Beacon
from beacon_jax.evaluation.reading import Rows
from beacon_jax.evaluation.report import interval
from beacon_jax.evaluation.statistics import mean_interval, ratio_interval
from beacon_jax.evaluation.tasks.base import Metric
from beacon_jax.evaluation.tasks.passkey import PasskeyRetrieval
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.mount import concatenate


def measure(model: Model, texts: Rows, ratio: int, half: int, batch: int) -> Row:
    """Measures all cases at one ratio and one length of A and of B."""

    def memories(past: Rows) -> dict[str, Memory]:
        a, b = ([r[len(r) - n :][:half] for r in past] for n in (2 * half, half))
        both = [row[len(row) - 2 * half :] for row in past]
        alone = remember(model, b, ratio)
        return {
            "at_once": remember(model, both, ratio),
            "mounted": concatenate([remember(model, a, ratio), alone]),
            "second": alone,
            "nothing": remember(model, [row[:0] for row in past], ratio),
        }

    end = len(texts[0]) - 1 - model.window
    loss, made = compare(model, texts, ratio, batch, end, memories)
    held = {
        name: memory.state.slots + memory.state.open_entries("interleave")
        for name, memory in made.items()
    }
    gained = loss["second"] - loss["mounted"], loss["second"] - loss["at_once"]
    return {
        "ratio": ratio,
        "tokens_each": half,
        "rows": len(texts),
        "entries": {name: int(entries[0]) for name, entries in held.items()},
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
    """Measures the passkey task per ratio, at once and mounted."""
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
    """Makes the table of accuracies, a column per depth."""
    metrics = [m for m in metrics if m["metric"] == "accuracy"]
    depths = sorted({m["depth"] for m in metrics if m["depth"] is not None})
    cells = {(m["method"], m["depth"]): m for m in metrics}
    columns = {
        "passkey, 256 tokens": lambda m: m["method"],
        "accuracy": lambda m: interval(m, 2),
    } | {
        f"depth {d:g}": lambda m, d=d: f"{cells[m['method'], d]['value']:.2f}"
        for d in depths
    }
    return by_column(columns, [m for m in metrics if m["depth"] is None]) + "\n"


def loss_table(results: list[Row]) -> str:
    """Makes the table of losses, a row per length and ratio."""
    titles = ("at once", "mounted", "B alone", "nothing")
    names = ("at_once", "mounted", "second")
    columns = {
        "A, B: tokens each": lambda r: r["tokens_each"],
        "ratio": lambda r: f"x{r['ratio']}",
        **{
            title: lambda r, name=name: f"{r['loss'][name]['value']:.3f}"
            for title, name in zip(titles, (*names, "nothing"), strict=True)
        },
        "mounted - at once": lambda r: interval(r["cost_of_mounting"], 3),
        "entries: at once / mounted / B": lambda r: " / ".join(
            str(r["entries"][name]) for name in names
        ),
    }
    return by_column(columns, results) + "\n"


def main(argv: list[str]) -> None:
    del argv
    f = flags.FLAGS
    ratios, lengths = [int(r) for r in f.ratios], [int(n) for n in f.tokens]
    # Each half may end in an open window.
    model, texts = held_out(f.model, ratios, f.samples, 2 * max(lengths))
    results = []
    for half in lengths:
        for ratio in ratios:
            results.append(measure(model, texts, ratio, half, f.batch_size))
            print(json.dumps(results[-1]), flush=True)
    keys = RunSettings(lengths=(256,), samples=f.samples, batch_size=f.batch_size)
    found = passkeys(model, ratios, keys)
    file = write_result(
        f.out,
        "mount_loss.json",
        model=f.model,
        text="stdlib, held out",
        predicted_tokens_per_row=model.window,
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        results=results,
        passkeys=found,
    )
    tables = loss_table(results) + "\n" + passkey_table(found)
    file.with_suffix(".md").write_text(tables)
    print(tables)


if __name__ == "__main__":
    flags.DEFINE_list("tokens", ["128", "120"], "Tokens of A, and of B.")
    define_flags(batch_size=64, out="out/mount_loss")
    app.run(main)
