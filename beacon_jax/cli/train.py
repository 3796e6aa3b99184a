"""Trains beacons on a frozen model, or a small model from scratch.

The same command goes on from the last checkpoint in --workdir. A key that the config
does not have is an error that names the nearest one. --config.profile_steps=10,13
writes a trace of those steps to WORKDIR/profile.

Example:
  beacon-jax train --config=quickstart:smoke --workdir=out/smoke --config.seed=1
"""

from absl import flags, logging

from beacon_jax.cli.ending import command
from beacon_jax.cli.options import Group
from beacon_jax.progress import starting


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    f = Group(values, "Run")
    f.config()
    f.text("workdir", None, "Folder of the run.", required=True)
    f.switch("distributed", False, "One of several processes.")


@command
def main(o: flags.FlagValues) -> None:
    logging.set_verbosity(logging.WARNING)
    with starting():  # after the flags: jax takes seconds
        from beacon_jax.training import processes
        from beacon_jax.training.console import drop_unread
        from beacon_jax.training.trainer import train

        if o.distributed:
            processes.start()
    try:
        train(o.config, o.workdir)
    finally:
        drop_unread()
