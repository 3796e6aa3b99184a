"""Fits which tokens of a text are facts that have to be kept, in minutes.

Statements are put into real text, the model reads it with full attention, and a linear
score of its values is fitted to tell them, without a gradient. Then some steps of
distillation correct what attention matching makes of all other tokens (--steps=0
leaves that out). The model is not changed. Writes retention.safetensors into --out,
for --method=retention:FOLDER of compress, generate and evaluate. Files that are held
out for evaluation are not read.

Example:
  beacon-jax retain --model=smol.gguf --text=corpus --out=out/retention
"""

from pathlib import Path

from absl import flags

from beacon_jax.cli.context import define_beacons, load_model
from beacon_jax.cli.ending import command
from beacon_jax.cli.options import Group
from beacon_jax.paths import check_folder
from beacon_jax.progress import Progress, starting


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    f = Group(values, "Model")
    f.text("model", None, "HF or converted folder, GGUF, tiny-beacon.", required=True)
    define_beacons(f)
    f.choice("dtype", None, ["float32", "bfloat16", "float16"], "Else as stored.")
    f.text("mesh", None, "Devices to split over: tensor:8.")
    f = Group(values, "Text")
    f.text("text", "stdlib", "stdlib, or a folder; not its held-out files.")
    f.number("rows", 160, "Texts that are read; a quarter for the threshold.")
    f.number("length", 1024, "Tokens of each.")
    f.number("batch_size", 4, "Texts at a time.")
    f.number("seed", 0, "Of texts and statements.")
    f = Group(values, "Correction")
    f.number("steps", 75, "Of training, two texts each; 0: no correction.")
    f.names("ratios", ["2", "4", "8"], "Of the steps, in turn.")
    f.real("lr", 7e-4, "Learning rate at its highest.")
    f = Group(values, "Output")
    f.text("out", None, "Folder to write into.", required=True)
    f.switch("overwrite", False, "Replace the weights that are in --out.")


@command
def main(values: flags.FlagValues) -> None:
    check_folder("--out", values.out)
    names = ("rows", "length", "batch_size", "seed")
    progress = Progress()
    with starting():  # after the flags: jax loads
        from beacon_jax.data.text import load_documents
        from beacon_jax.data.tokenizer import encode_stream
        from beacon_jax.evaluation.runner import integers
        from beacon_jax.inference.compressors.retention import FILE
        from beacon_jax.inference.fit_retention import ORDINARY, Fitting, fit_retention
        from beacon_jax.inference.train_correction import (
            Correcting,
            check,
            train_correction,
        )

    if (Path(values.out).expanduser() / FILE).exists() and not values.overwrite:
        raise FileExistsError(
            f"--out={values.out} has {FILE}: name another folder, or add --overwrite."
        )
    settings = Fitting(**{name: getattr(values, name) for name in names})
    training = None
    if values.steps:
        ratios = tuple(integers("ratios", values.ratios))
        rest = {name: getattr(values, name) for name in ("length", "lr", "seed")}
        training = Correcting(values.steps, ratios=ratios, **rest)
    documents = load_documents(values.text)
    model = load_model(values, progress)
    with progress.stage("tokenising", note=values.text):
        text = encode_stream(documents, model.tokenizer)
    if training is not None:
        check(model, text, training)  # before minutes are spent
    with progress.stage("reading", "texts") as stage:
        fitted = fit_retention(model, text, settings, stage)
    retention = fitted.retention
    print(
        f"read {fitted.tokens:,} tokens; of the tokens of statements that were not "
        f"fitted {fitted.found:.0%} are above what {ORDINARY:.0%} of the others reach"
    )
    if fitted.found < 0.5:
        print("this model hardly tells them: it is attention-matching, little more")
    file = retention.save(values.out)
    if training is not None:
        with progress.stage("training", "texts") as stage:
            made = train_correction(model, retention, text, training, stage)
        file = made.retention.save(values.out)
        print(
            "divergence from full attention, nats per token, of texts that were not "
            f"trained on: {made.before:.4f}, corrected {made.after:.4f}"
        )
        if made.retention.correction is None:
            print("the correction does not help: it is left out")
    print(f"wrote {file}: use it with --method=retention:{values.out}")
