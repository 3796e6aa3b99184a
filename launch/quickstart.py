"""The parts of `make quickstart` that are Python; launch/quickstart.sh runs them.

python launch/quickstart.py dtype            # the one that is fastest here
python launch/quickstart.py read MODEL BEACONS [--dtype=bfloat16]  # at three ratios
python launch/quickstart.py loss WORKDIR  # did the loss of a run fall?

The document is an invented one, so that no model has read it before. What is asked are
sentences to be finished: a model of 135 million parameters answers few real questions.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import jax

import beacon_jax
from beacon_jax.training.hardware import fastest_dtype

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "assets" / "quickstart" / "lighthouse.txt"
# The beginning of a sentence, and what the document says.
QUESTIONS = (
    ("The first keeper was a retired sailmaker called", "Tobias Reinholt"),
    (
        "The lens was taken down, packed in straw and hidden in the",
        "crypt of the church",
    ),
    ("The society's boat is called", "Marta"),
)
RATIOS = ("full", 4, 8)
SHAPE = 576, 1536  # hidden and intermediate size of SmolLM2-135M
ANSWER_TOKENS = 10


def read(model: beacon_jax.Model, text: str) -> None:
    """Reads a text at each ratio, and prints the answers beside what they cost."""
    prompts = [f"\n\n{sentence}" for sentence, _ in QUESTIONS]
    print(f"{DOCUMENT.relative_to(ROOT)}, read by SmolLM2-135M-Instruct:")
    answers = []
    for ratio in RATIOS:
        recent = ratio != "full"  # the last full window stays as it is
        compress = functools.partial(model.compress, text, ratio=ratio, recent=recent)
        jax.block_until_ready(compress().state)  # compiles
        began = time.perf_counter()
        memory = compress()
        jax.block_until_ready(memory.state)
        seconds = time.perf_counter() - began
        made = model.complete(prompts, memory=memory, max_new_tokens=ANSWER_TOKENS)
        held = memory.account()
        speed = made[0].timing.tokens_per_second or 0.0
        answers.append([row.text for row in made])
        print(
            f"{_name(ratio):>14}: {held.tokens:,} tokens read in {seconds:.1f} s, "
            f"{held.nbytes / 2**20:.1f} MiB kept ({held.worth()}); then {speed:.1f} "
            f"tokens/s in {len(prompts)} rows",
            flush=True,
        )
    for i, (sentence, answer) in enumerate(QUESTIONS):
        print(f"\n{sentence} ...   [{answer}]")
        for ratio, texts in zip(RATIOS, answers, strict=True):
            mark = "right" if answer in " ".join(texts[i].split()) else "wrong"
            print(f"{_name(ratio):>14}: {mark}  {' '.join(texts[i].split())}")


def loss(workdir: Path) -> None:
    """Compares the mean loss of a run's first and last ten steps.

    Raises:
      SystemExit: it did not fall.
    """
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {row["step"]: row["loss"] for row in map(json.loads, lines)}
    first, last = min(found), max(found)
    text = (
        f"divergence from full attention, mean of the steps up to {first}: "
        f"{found[first]:.3f} nats, of those up to {last}: {found[last]:.3f}"
    )
    if not found[last] < found[first]:
        sys.exit(f"error: the loss did not fall: {text}.")
    print(text)


def _name(ratio: str | int) -> str:
    return "full attention" if ratio == "full" else f"beacons x{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Parts of `make quickstart`.")
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("model")
    reading.add_argument("beacons")
    reading.add_argument("--dtype", default="bfloat16")
    commands.add_parser("loss").add_argument("workdir", type=Path)
    commands.add_parser("dtype")
    given = parser.parse_args()
    if given.command == "dtype":
        print(fastest_dtype(jax.devices()[0], *SHAPE)[0])
        return
    if given.command == "loss":
        loss(given.workdir)
        return
    beacon_jax.runtime.enable_compilation_cache()
    model = beacon_jax.load(given.model, beacons=given.beacons, dtype=given.dtype)
    read(model, DOCUMENT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
