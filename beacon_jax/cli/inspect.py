"""What a prepared folder holds, before a run spends hours on it.

python -m beacon_jax.data.inspect --config=configs/X.py --out=DIR [--config.key=value]

Prints counts and drops, writes lengths.png (a histogram), and shows one example, its
labelled tokens between ⟦ and ⟧. The data are those of --config.data.prepared; what is
not prepared yet is prepared first, into DIR/data if that names no folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from beacon_jax.cli import prepare
from beacon_jax.cli.prepare import from_flags, tokenizer_folder
from beacon_jax.cli.train import parse
from beacon_jax.data.grouped import GroupConfig
from beacon_jax.data.inspect import CLOSE, OPEN, histogram, marked, report, sample
from beacon_jax.data.shards import load_tokenizer

__all__ = ["define_flags", "main", "parse"]


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    prepare.define_flags(values, "Folder for lengths.png, and for data/.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option has --.")
    values = flags.FLAGS
    config = values.config
    if not values.out:
        sys.exit("error: --out='' names no folder for lengths.png: use WORKDIR, say.")
    out = Path(values.out).expanduser()
    try:
        folder = Path(config.data.prepared or out / "data").expanduser()
        data = from_flags(values, folder)
        grouping = GroupConfig.of(config)
        out.mkdir(parents=True, exist_ok=True)
        histogram(data, grouping.window, out / "lengths.png")
        print(report(data, grouping))
        tokenizer = load_tokenizer(tokenizer_folder(config, folder.parent))
        index = sample(data)
        print(f"\nexample {index}, labelled tokens between {OPEN} and {CLOSE}:")
        print(marked(data.read(index), tokenizer))
        print(f"\nwrote {out / 'lengths.png'}", flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
