"""A model so small that every part of a benchmark takes seconds."""

import dataclasses

from absl import flags

from beacon_jax.bench import runner
from beacon_jax.cli import bench
from beacon_jax.model.config import BeaconConfig
from tests.tiny import tiny

NANO = tiny(
    vocab_size=64,
    intermediate_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=64,
    beacon=BeaconConfig(window=8, ratios=(2,)),
)
assert NANO.beacon is not None
SINK = dataclasses.replace(NANO, beacon=dataclasses.replace(NANO.beacon, sink=1))
ARGUMENTS = "--preset=nano --lengths=21 --ratios=2 --batches=1 --queries=4 --memory=16"


def options(*arguments):
    """Parsed flags of the command line."""
    values = flags.FlagValues()
    bench.define_flags(values)
    values(["bench", *ARGUMENTS.split(), "--repeats=2", *map(str, arguments)])
    return values


def settings(*arguments):
    (made,) = runner.make_settings(options(*arguments))
    return made
