"""The parts of `make quickstart` that are Python; launch/quickstart.sh runs them.

python launch/quickstart.py dtype            # the one that is fastest here
python launch/quickstart.py read MODEL BEACONS [--dtype=bfloat16]  # at three ratios
python launch/quickstart.py loss WORKDIR  # did it fall, on rows no step has read?

The document is an invented one, so that no model has read it before. What is asked are
sentences to be finished: a model of 135 million parameters answers few real questions.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import beacon_jax
from beacon_jax.core.train_loss import LossConfig, train_loss
from beacon_jax.model.net import Net
from beacon_jax.progress import Progress
from beacon_jax.training.config import default_config, read_recorded
from beacon_jax.training.hardware import fastest_dtype
from beacon_jax.training.initial import make_model
from beacon_jax.training.inputs import Inputs, make_data
from beacon_jax.training.sharding import make_placement

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
ROWS = 6  # of the loss before and after training: a minute on two cores


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
    """Compares a run's beacons with those it started from, on rows it has not read.

    These are the rows of the steps that would come next, at the ratios of those steps:
    rows and ratios differ by more than 40 steps of training change.

    Raises:
      SystemExit: their loss did not fall.
    """
    config = default_config()
    config.update(read_recorded(workdir))
    stage = config.data.stages.stage1
    config.data.first_step += stage.steps
    stage.steps = ROWS
    with Progress().stage("reading the data") as shown:
        tokenizer, _, batches = make_data(config, workdir, shown)
    placement = make_placement(config.mesh, config.rules, [1])
    found = []
    for beacons in (config.beacons_from, str(workdir / "adapter")):
        config.beacons_from = beacons
        model, trained, frozen = make_model(config, tokenizer, placement, quiet=True)
        net = Net(model, jnp.dtype(config.dtype))
        run = jax.jit(functools.partial(train_loss, net, loss=LossConfig("distil")))
        inputs = Inputs(config, model, batches, 1)
        rows = [inputs[step] for step in range(ROWS)]
        losses = [
            run(trained["beacon"], frozen["params"], row.batch, row.plans[:, 0])[0]
            for row in rows
        ]
        found.append(sum(map(float, losses)) / ROWS)
    before, after = found
    text = (
        f"divergence from full attention on {ROWS} rows that no step has read: "
        f"{before:.3f} nats per token before training, {after:.3f} after"
    )
    if not after < before:
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
