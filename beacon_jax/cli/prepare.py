"""Tokenises sources once: text and conversations become a prepared folder.

Reads what config.data names (sources, root, heldout, min_length, max_length, long,
chat_template) with the tokenizer of the config, writes shards, an index and a manifest
to --out, and says what share of the tokens is used. --out=WORKDIR/data is where
training in WORKDIR looks for it; without it training prepares by itself. The same
command goes on with a folder that is not finished; one that was made with other
settings is refused unless --overwrite.

Example:
  beacon-jax prepare --config=llama2_7b_pretrain --config.data.sources=books \\
    --out=out/run/data
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from beacon_jax.cli.ending import command
from beacon_jax.cli.options import Group
from beacon_jax.paths import check_folder
from beacon_jax.progress import Progress, starting
from beacon_jax.resources import asset

if TYPE_CHECKING:
    from beacon_jax.data.prepared import Prepared


def define_flags(
    values: flags.FlagValues = flags.FLAGS, out: str = "Folder to prepare."
) -> None:
    """Defines --config, --out, --workers and --overwrite; `inspect` has them, too."""
    f = Group(values, "Data")
    f.config()
    f.number("workers", -1, "Processes; 0: one per core; -1: config.data.workers.")
    f = Group(values, "Output")
    f.text("out", "", out)
    f.switch("overwrite", False, "Replace a folder of other settings.")


def from_flags(values: Any, folder: Path) -> "Prepared":
    """Prepares what the flags say into `folder`, and prints the progress."""
    with starting():
        from beacon_jax.data.prepare import Preparation, prepare
        from beacon_jax.training.check_data import check_data
        from beacon_jax.training.initial import embedding_rows

    config = values.config
    if config.data.stages:
        raise ValueError(
            f"data.stages has {', '.join(config.data.stages)}, whose rows are cut from "
            "the text while a run trains: there is nothing to prepare. Train at once, "
            "or use a config without stages."
        )
    check_data(config)
    with Progress().stage("preparing") as stage:

        def show(line: str) -> None:
            stage.alive()
            print(line, flush=True)

        return prepare(
            Preparation.of(
                config.data,
                tokenizer_folder(config, folder.parent),
                embedding_rows(config),
            ),
            folder,
            workers=config.data.workers if values.workers < 0 else values.workers,
            max_drop_fraction=config.data.max_drop_fraction,
            overwrite=values.overwrite,
            show=show,
        )


def tokenizer_folder(config: Any, workdir: Path) -> Path:
    """Returns the folder of the config's tokenizer.

    A tokenizer that training would train is trained in `workdir`.
    """
    if not config.tokenizer.train:
        if config.tokenizer.path:
            return Path(asset(config.tokenizer.path))
        from beacon_jax.hf import hub  # after the flags: jax takes seconds

        return hub.find(config.init_from, "init_from")
    from beacon_jax.data.text import run_documents
    from beacon_jax.data.tokenizer import ensure_tokenizer

    return ensure_tokenizer(config, lambda: run_documents(config), workdir)


@command
def main(values: flags.FlagValues) -> None:
    out: Any = values.out or values.config.data.prepared
    if not out:
        sys.exit("error: --out='' names no folder: use WORKDIR/data, say.")
    folder = Path(out).expanduser()
    if not (folder / "manifest.json").exists():  # a finished one may be read-only
        check_folder("--out" if values.out else "--config.data.prepared", folder)
    data = from_flags(values, folder)
    from beacon_jax.data.tally import drop_table, usage

    for source in data.manifest["sources"]:
        print(
            f"{source['examples']:>10,} examples  {source['tokens']:>14,} tokens  of "
            f"{source['rows']:,} rows in {source['uri']}"
        )
    print(usage(data.manifest))
    print(drop_table(data.manifest) or "no row was left out", flush=True)
