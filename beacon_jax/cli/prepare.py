"""Tokenises sources once: text and conversations become a prepared folder.

python -m beacon_jax.data.prepare --config=configs/X.py --out=DIR [--workers=N]
  [--overwrite] [--config.key=value ...]

Reads what config.data names (sources, root, min_length, max_length, chat_template) with
the tokenizer of the config, and writes shards, an index and a manifest to DIR
(`data.prepared`). --out=WORKDIR/data is where training in WORKDIR looks for it; without
it training prepares by itself. The same command goes on with a folder that is not
finished; one that was made with other settings is refused unless --overwrite.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from beacon_jax.cli.train import parse
from beacon_jax.data.prepare import Settings, prepare
from beacon_jax.data.prepared import Prepared
from beacon_jax.data.tally import drop_table

__all__ = ["define_flags", "from_flags", "main", "parse", "tokenizer_folder"]


def define_flags(
    values: flags.FlagValues = flags.FLAGS, out: str = "Folder to prepare."
) -> None:
    """--config, --out, --workers and --overwrite, as `inspect` has them too."""
    config_flags.DEFINE_config_file(
        "config", None, "Experiment, see configs/.", values, lock_config=True
    )
    flags.DEFINE_string("out", "", out, flag_values=values)
    flags.DEFINE_integer(
        "workers", -1, "Processes; 0: one per core.", flag_values=values
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace a folder of other settings.", flag_values=values
    )
    flags.mark_flag_as_required("config", values)


def from_flags(values: Any, folder: Path) -> Prepared:
    """Prepares what the flags say, with progress; names the folder of the tokenizer."""
    config = values.config
    settings = Settings.of(config.data, tokenizer_folder(config, folder.parent))
    return prepare(
        settings,
        folder,
        workers=config.data.workers if values.workers < 0 else values.workers,
        max_drop_fraction=config.data.max_drop_fraction,
        overwrite=values.overwrite,
        show=lambda line: print(line, flush=True),
    )


def tokenizer_folder(config: Any, workdir: Path) -> Path:
    """That of the config; one that training would train is trained in `workdir`."""
    if not config.tokenizer.train:
        return Path(config.tokenizer.path or config.init_from)
    from beacon_jax.data.text import load_documents
    from beacon_jax.training.initial import make_tokenizer  # imports jax: seconds

    text = config.text
    documents = load_documents(text.uri, "train", text.heldout_fraction)
    return make_tokenizer(config, documents, workdir)[1]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option has --.")
    values = flags.FLAGS
    out = values.out or values.config.data.prepared
    if not out:
        sys.exit("error: --out='' names no folder: use WORKDIR/data, say.")
    try:
        data = from_flags(values, Path(out).expanduser())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for source in data.manifest["sources"]:
        print(
            f"{source['examples']:>10,} examples  {source['tokens']:>14,} tokens  of "
            f"{source['rows']:,} rows in {source['uri']}"
        )
    print(drop_table(data.manifest) or "no row was left out", flush=True)
