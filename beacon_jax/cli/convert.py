"""Converts checkpoints from and to Hugging Face folders, and from GGUF files.

The first argument is from-hf, from-gguf or to-hf. --src of to-hf is a converted folder,
or the --workdir of a training run, whose newest checkpoint is exported while the run
goes on. to-hf of a converted GGUF file makes an HF folder of it. Low-rank beacons
become whole projections W + A B, which the release reads; --adapter writes beacons
alone, for --beacons of other commands. Both take an HF folder, too.

Examples:
  beacon-jax convert from-hf --src=HF --dst=DIR --dtype=bfloat16 --verify
  beacon-jax convert from-gguf --src=FILE.gguf --dst=DIR
  beacon-jax convert to-hf --src=DIR --dst=HF
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from beacon_jax import runtime
from beacon_jax.cli.ending import MENDED, fail
from beacon_jax.cli.options import Group
from beacon_jax.paths import check_folder
from beacon_jax.progress import Progress, starting

# Flags that not all commands read.
_ONLY = {
    "adapter": "to-hf",
    **dict.fromkeys(
        ("dtype", "verify", "strip_prefix", "ignore_sliding_window"),
        "from-hf and from-gguf",
    ),
}


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    f = Group(values, "Checkpoints")
    f.text("src", None, "Folder, or file of from-gguf, to read.", required=True)
    f.text("dst", None, "Folder to write.", required=True)
    f.switch("overwrite", False, "Replace a checkpoint at --dst.")
    f = Group(values, "Only to-hf")
    f.switch("adapter", False, "Write the beacons alone, without the base.")
    f = Group(values, "Only from-hf and from-gguf")
    f.choice("dtype", None, ["float32", "bfloat16", "float16"], "Cast to this.")
    f.switch("verify", False, "Compare logits with a second path.")
    f.text("strip_prefix", None, "Of tensors' names, as module.; empty: add model.")
    f.switch(
        "ignore_sliding_window",
        False,
        "Attend to everything although config.json has a sliding window.",
    )


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if len(argv) != 2 or argv[1] not in ("from-hf", "from-gguf", "to-hf"):
        sys.exit(f"error: command={argv[1:]}: use from-hf, from-gguf or to-hf.")
    with starting():  # after the flags: jax takes seconds
        from beacon_jax.hf import conversion, hub
        from beacon_jax.hf.writer import check_new
        from beacon_jax.inference import verify

    dst = Path(options.dst)
    try:
        check_folder("--dst", options.dst)
        _check_used(options, argv[1])
        check_new(dst, overwrite=options.overwrite)
        src = hub.find(options.src, "--src")
        if src.is_file() != (argv[1] == "from-gguf"):
            wanted = "a GGUF file" if src.is_dir() else "a folder; use from-gguf"
            raise ValueError(f"--src={src}: {argv[1]} reads {wanted}.")
        if argv[1] == "to-hf" and (src / "checkpoints").is_dir():
            _export(src, dst, options)
        elif argv[1] == "to-hf":
            _to_hf(src, dst, options)
        else:
            conversion.from_hf(
                src,
                dst,
                dtype=options.dtype,
                overwrite=options.overwrite,
                ignore_sliding_window=options.ignore_sliding_window,
                strip_prefix=options.strip_prefix,
            )
    except MENDED as error:
        fail(error)
    print(f"wrote {dst}")
    if options.verify and argv[1] != "to-hf":
        runtime.for_command()
        with Progress().stage("verifying"):
            result = verify.compare(src, dst, strip_prefix=options.strip_prefix)
        print(result.table())
        if not result.passed:
            sys.exit(f"error: --verify: {dst} does not compute what {src} does.")


def _check_used(options: flags.FlagValues, command: str) -> None:
    """Raises ValueError for a flag that this command does not read."""
    for name, readers in _ONLY.items():
        value = options[name].value
        if command not in readers and value not in (None, False):
            given = f"--{name}" if value is True else f"--{name}={value}"
            raise ValueError(
                f"{given} is not for {command}, only for {readers}: leave it out."
            )


def _export(src: Path, dst: Path, options: flags.FlagValues) -> None:
    """Writes what to-hf makes of the newest checkpoint of a training run."""
    with starting():
        from beacon_jax.training.config import read_recorded
        from beacon_jax.training.trainer import export_checkpoint

    if not (options.adapter or read_recorded(src)["beacon"]["rank"]):
        export_checkpoint(src, dst, overwrite=options.overwrite)
        return
    # Beside --dst, where there is room for a model.
    parent = dst.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as folder:
        export_checkpoint(src, Path(folder) / "whole")
        _to_hf(Path(folder) / "whole", dst, options)


def _to_hf(src: Path, dst: Path, options: flags.FlagValues) -> None:
    """Writes what to-hf makes of an HF or a converted folder."""
    from beacon_jax.hf import adapter, conversion
    from beacon_jax.inference import merging

    beacon = conversion.model_config(src, ignore_sliding_window=True).beacon
    if options.adapter:
        adapter.write_adapter(src, dst, overwrite=options.overwrite)
    elif beacon and beacon.rank:
        runtime.for_command()
        print(merging.merge(src, dst, overwrite=options.overwrite))
    else:
        conversion.to_hf(src, dst, overwrite=options.overwrite)
