"""Converts checkpoints.

python -m beacon_jax.convert from-hf --src=HF --dst=DIR [--dtype=bfloat16] [--verify]
python -m beacon_jax.convert to-hf   --src=DIR --dst=HF

DIR of to-hf is a converted folder, or the --workdir of a training run, whose newest
checkpoint is exported while the run goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from beacon_jax.hf import conversion, verify


def define_flags() -> None:
    flags.DEFINE_string("src", None, "Folder to read.", required=True)
    flags.DEFINE_string("dst", None, "Folder to write.", required=True)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16", "float16"], "from-hf: cast to this."
    )
    flags.DEFINE_bool("verify", False, "from-hf: compare logits with a second path.")
    flags.DEFINE_bool("overwrite", False, "Replace a checkpoint at --dst.")
    flags.DEFINE_bool(
        "ignore_sliding_window",
        False,
        "from-hf: attend to everything although config.json has a sliding window.",
    )


def main(argv: Sequence[str]) -> None:
    options = flags.FLAGS
    if len(argv) != 2 or argv[1] not in ("from-hf", "to-hf"):
        raise app.UsageError(f"command={argv[1:]}: use from-hf or to-hf.")
    src, dst = Path(options.src), Path(options.dst)
    try:
        if argv[1] == "to-hf" and (src / "checkpoints").is_dir():
            from beacon_jax.training.trainer import export_checkpoint  # takes seconds

            export_checkpoint(src, dst, overwrite=options.overwrite)
        elif argv[1] == "to-hf":
            conversion.to_hf(src, dst, overwrite=options.overwrite)
        else:
            conversion.from_hf(
                src,
                dst,
                dtype=options.dtype,
                overwrite=options.overwrite,
                ignore_sliding_window=options.ignore_sliding_window,
            )
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {dst}")
    if options.verify and argv[1] == "from-hf":
        result = verify.compare(src, dst)
        print(result.table())
        if not result.passed:
            sys.exit(f"error: --verify: {dst} does not compute what {src} does.")
