"""Compresses a text of any length into a beacon pack, a file to ask questions later.

Several --context are read in order as one text. --memory continues a pack. The file is
read by `generate --load_memory` and `Memory.load`; --no_tokens leaves the token ids
out, which `truncate` and --repetition_penalty need.

Example:
  beacon-jax compress --model=tiny-beacon --context=book.txt --ratio=8 --out=book.beacon
"""

import functools
from pathlib import Path

from absl import flags

from beacon_jax.cli import context
from beacon_jax.cli.options import Group
from beacon_jax.progress import Progress


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    context.define_flags(values)
    f = Group(values, "Compression")
    f.text("memory", None, "Beacon pack to continue.")
    f = Group(values, "Output")
    f.text("out", None, "Beacon pack to write.", required=True)
    f.switch("no_tokens", False, "Leave the token ids out.")


def run(o: flags.FlagValues) -> None:
    if not o.context:
        raise ValueError("--context is missing: name a text file, or - for stdin.")
    context.check_new("out", o.out, overwrite=o.overwrite, texts=o.context)
    context.check_options(o, "memory", 1, seed=o.seed)
    text = context.read_context(o)
    progress = Progress()
    model = context.load_model(o, progress)
    memory = context.load_memory("memory", o.memory, model)
    read = context.read(model, o, text, memory, progress)
    assert read.memory is not None
    context.say(
        f"compiled in {read.compiled:,.1f} s; read {read.tokens:,} tokens in "
        f"{read.seconds:,.1f} s, {read.tokens / read.seconds:,.1f} tokens/s"
    )
    read.memory.save(o.out, tokens=not o.no_tokens, overwrite=o.overwrite)
    print(context.summary(model, read.memory))
    print(f"wrote {o.out}, {Path(o.out).stat().st_size / context.MIB:.3f} MiB")


main = functools.partial(context.main, run)
