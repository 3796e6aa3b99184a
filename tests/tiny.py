"""The tiny model of the tests: as many layers, heads and ratios as can be mixed up.

Equal configs share their compiled programs, so take TINY as it is where you can.
"""

import dataclasses
from typing import Any

from beacon_jax.model.config import BeaconConfig, ModelConfig

W = 8  # tokens of a window

TINY = ModelConfig(
    family="llama",
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position=256,
    eos_ids=(2,),
    bos_ids=(1,),
    beacon=BeaconConfig(window=W, ratios=(2, 4)),
)


def tiny(**changes: Any) -> ModelConfig:
    """TINY with other fields."""
    return dataclasses.replace(TINY, **changes)
