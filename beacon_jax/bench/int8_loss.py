"""What rounding the memory to int8 costs: losses behind a compressed text.

python -m beacon_jax.bench.int8_loss [--model=assets/tiny-beacon] [--ratios=2,4,8]
  [--length=256] [--samples=256] [--out=FOLDER]

Held-out texts are compressed into a float and into an int8 memory, and the window that
follows is predicted behind each. Writes int8_loss.json; a few minutes on two CPU cores.
"""

from absl import app, flags

from beacon_jax.bench.losses import compare, define_flags, held_out, remember, triple
from beacon_jax.bench.records import Row, write_result
from beacon_jax.bench.report import by_column
from beacon_jax.evaluation.reading import Rows
from beacon_jax.evaluation.report import interval
from beacon_jax.evaluation.statistics import mean_interval
from beacon_jax.inference.model import Model


def measure(model: Model, texts: Rows, ratio: int, batch: int) -> Row:
    """Measures both losses at one ratio, and their difference row by row."""
    both = lambda past: {
        dtype: remember(model, past, ratio, dtype) for dtype in ("float32", "int8")
    }
    loss, memories = compare(model, texts, ratio, batch, -model.window, both)
    return {
        "ratio": ratio,
        "rows": len(texts),
        "loss": {dtype: triple(mean_interval(x)) for dtype, x in loss.items()},
        "cost": triple(mean_interval(loss["int8"] - loss["float32"])),
        "slot_bytes": {dtype: m.slot_nbytes for dtype, m in memories.items()},
    }


def main(argv: list[str]) -> None:
    del argv
    f = flags.FLAGS
    ratios = [int(r) for r in f.ratios]
    model, texts = held_out(f.model, ratios, f.samples, f.length, "float32")
    results = [measure(model, texts, ratio, f.batch_size) for ratio in ratios]
    write_result(
        f.out,
        "int8_loss.json",
        model=f.model,
        text="stdlib, held out",
        past_tokens=f.length,
        predicted_tokens_per_row=model.window,
        results=results,
    )
    columns = {
        "ratio": lambda r: f"x{r['ratio']}",
        "float32": lambda r: f"{r['loss']['float32']['value']:.4f}",
        "int8": lambda r: f"{r['loss']['int8']['value']:.4f}",
        "int8 - float32": lambda r: interval(r["cost"], 4),
        "bytes a slot": lambda r: "{float32:,} / {int8:,}".format(**r["slot_bytes"]),
    }
    print(by_column(columns, results))


if __name__ == "__main__":
    flags.DEFINE_integer("length", 256, "Tokens of the past, whole windows.")
    define_flags(batch_size=32, out="out/int8-loss")
    app.run(main)
