"""What rounding the memory to int8 costs: losses behind a compressed text.

python -m benchmarks.int8_loss [--model=assets/tiny-beacon] [--ratios=2,4,8]
  [--length=256] [--samples=256] [--out=FOLDER]

Held-out texts are compressed into a float and into an int8 memory, and the window that
follows is predicted behind each. Writes int8_loss.json; a few minutes on two CPU cores.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from beacon_jax.benchmark.records import provenance
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.reading import load_model, read
from beacon_jax.evaluation.report import table
from beacon_jax.evaluation.statistics import mean_interval
from beacon_jax.evaluation.tasks.perplexity import Perplexity
from beacon_jax.inference.model import Model
from benchmarks.mount_loss import mean_losses


def measure(
    model: Model, texts: list[np.ndarray], ratio: int, batch: int
) -> dict[str, Any]:
    """Both losses at one ratio, and their difference row by row."""
    found: dict[str, list[np.ndarray]] = {"float32": [], "int8": []}
    nbytes = {}
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch]
        past = [row[: -model.window] for row in rows]
        last = [row[-model.window :] for row in rows]
        for dtype, values in found.items():
            memory = read(model, past, ratio, dtype=dtype)[1]
            values.append(mean_losses(model, memory, last, ratio))
            nbytes[dtype] = memory.slot_nbytes
    loss = {dtype: np.concatenate(values) for dtype, values in found.items()}
    triple = lambda values: dict(zip(("value", "low", "high"), values, strict=True))
    return {
        "ratio": ratio,
        "rows": len(texts),
        "loss": {dtype: triple(mean_interval(x)) for dtype, x in loss.items()},
        "cost": triple(mean_interval(loss["int8"] - loss["float32"])),
        "slot_bytes": nbytes,
    }


def main(argv: list[str]) -> None:
    del argv
    f = flags.FLAGS
    ratios = [int(r) for r in f.ratios]
    model = load_model(f.model, ratios, dtype="float32")
    window = model.window
    settings = RunSettings(lengths=(f.length + window,), samples=f.samples)
    inputs = TaskData(settings, model.tokenizer)
    texts = [e.tokens for e in Perplexity().examples(model, settings, inputs)]
    results = [measure(model, texts, ratio, f.batch_size) for ratio in ratios]
    record = provenance() | {
        "model": f.model,
        "text": "stdlib, held out",
        "past_tokens": f.length,
        "predicted_tokens_per_row": window,
        "results": results,
    }
    out = Path(f.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "int8_loss.json").write_text(json.dumps(record, indent=2) + "\n")
    rows = [
        [
            f"x{r['ratio']}",
            *(f"{r['loss'][d]['value']:.4f}" for d in ("float32", "int8")),
            "{value:.4f} [{low:.4f}, {high:.4f}]".format(**r["cost"]),
            f"{r['slot_bytes']['float32']:,} / {r['slot_bytes']['int8']:,}",
        ]
        for r in results
    ]
    print(table(["ratio", "float32", "int8", "int8 - float32", "bytes a slot"], rows))


if __name__ == "__main__":
    flags.DEFINE_string("model", "assets/tiny-beacon", "With beacons.")
    flags.DEFINE_list("ratios", ["2", "4", "8"], "Raw tokens per slot.")
    flags.DEFINE_integer("length", 256, "Tokens of the past, whole windows.")
    flags.DEFINE_integer("samples", 256, "Texts.")
    flags.DEFINE_integer("batch_size", 32, "Texts at a time.")
    flags.DEFINE_string("out", "out/int8-loss", "Folder of the result.")
    app.run(main)
