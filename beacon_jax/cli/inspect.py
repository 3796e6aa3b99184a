"""Shows what a prepared folder holds, before a run spends hours on it.

Prints counts and drops, writes lengths.png (a histogram), and shows one example, its
labelled tokens between ⟦ and ⟧. The data are those of --config.data.prepared; what is
not prepared yet is prepared first, into DIR/data if that names no folder.

Example:
  beacon-jax inspect --config=llama2_7b_pretrain --config.data.sources="('books',)" \\
    --out=out/run
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from beacon_jax.cli import prepare
from beacon_jax.cli.ending import command
from beacon_jax.cli.prepare import from_flags, tokenizer_folder
from beacon_jax.paths import check_folder
from beacon_jax.progress import Progress, starting
from beacon_jax.resources import load_tokenizer, require


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    prepare.define_flags(values, "Folder for lengths.png, and for data/.")


@command
def main(values: flags.FlagValues) -> None:
    config: Any = values.config
    if not values.out:
        sys.exit("error: --out='' names no folder for lengths.png: use WORKDIR, say.")
    out = Path(values.out).expanduser()
    require("matplotlib", extra="plots", for_="lengths.png of inspect")
    check_folder("--out", out)
    with starting():  # after the flags
        from beacon_jax.data.grouped import GroupConfig
        from beacon_jax.data.inspect import (
            CLOSE,
            OPEN,
            histogram,
            marked,
            report,
            sample,
        )

    folder = Path(config.data.prepared or out / "data").expanduser()
    data = from_flags(values, folder)
    grouping = GroupConfig.of(config)
    out.mkdir(parents=True, exist_ok=True)
    with Progress().stage("inspecting"):
        histogram(data, grouping.window, out / "lengths.png")
        text = report(data, grouping)
        tokenizer = load_tokenizer(tokenizer_folder(config, folder.parent))
        index = sample(data)
    print(text)
    print(f"\nexample {index}, labelled tokens between {OPEN} and {CLOSE}:")
    print(marked(data.read(index), tokenizer))
    print(f"\nwrote {out / 'lengths.png'}", flush=True)
