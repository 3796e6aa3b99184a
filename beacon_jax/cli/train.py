"""Trains beacons on a frozen model, or a small model from scratch.

python -m beacon_jax.train --config=configs/X.py[:arg] --workdir=DIR
  [--config.key=value ...]

The same command goes on from the last checkpoint in DIR. A key that the config does
not have is an error that names the nearest one. --config.profile_steps=10,13 writes a
trace of those steps to DIR/profile.
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Experiment, see configs/.", values, lock_config=True
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run.", required=True, flag_values=values
    )
    flags.DEFINE_bool(
        "distributed", False, "One of several processes.", flag_values=values
    )
    flags.mark_flag_as_required("config", values)


def parse(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Parses the flags; a wrong --config.key ends with its suggestion."""
    try:
        return values(argv)
    except (flags.Error, AttributeError, OSError) as error:
        # ml_collections quotes its message twice: '\'sead\'\nDid you mean "seed" ...'
        text = str(error).replace("\\n", " ").replace("\\'", "'")
        sys.exit(f"error: --config: {' '.join(text.split())}")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option has --.")
    logging.set_verbosity(logging.WARNING)
    from beacon_jax.training import processes  # after the flags: jax takes seconds
    from beacon_jax.training.trainer import train

    if flags.FLAGS.distributed:
        processes.start()
    try:
        train(flags.FLAGS.config, flags.FLAGS.workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
