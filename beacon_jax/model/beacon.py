"""The start values of the beacon parameters (docs/specification.md section 1)."""

import math
from typing import Any

import numpy as np

from beacon_jax.model.config import ModelConfig
from beacon_jax.model.shapes import param_shapes


def init_beacon(
    params: dict[str, Any], config: ModelConfig, seed: int = 0
) -> dict[str, Any]:
    """Makes beacons that act exactly like an eos (or bos) token (paper, section 3.2).

    Args:
      params: the base parameters, numpy or jax arrays (tracers are fine).
      config: with a `beacon` that names the token and the projections.
      seed: of the A of low-rank beacons; nothing else is drawn.

    Returns:
      The beacon tree of `param_shapes(config)`, in the dtypes of the base: the
      token's embedding row [1, D] and copies of the base projections, never views, so
      that a trainer may donate them. With a rank, in place of copies, A is normal with
      standard deviation 1/sqrt(inputs) [numpy] and B is zero.
    """
    if config.beacon is None:
        raise ValueError("config.beacon=None: give a BeaconConfig.")
    token = beacon_token(config)
    beacon: dict[str, Any] = {
        "embed": {"embedding": params["embed"]["embedding"][token : token + 1].copy()}
    }
    attention = params["layers"]["attention"]
    if config.beacon.rank:
        shapes = param_shapes(config)["beacon"]["layers"]["attention"]
        draw = np.random.default_rng(seed).standard_normal
        projections = {
            name: _low_rank(shape, draw, attention[name]["kernel"].dtype)
            for name, shape in shapes.items()
        }
    else:
        projections = {
            f"{p}_proj": {k: x.copy() for k, x in attention[f"{p}_proj"].items()}
            for p in config.beacon.param
        }
    if projections:
        beacon["layers"] = {"attention": projections}
    return beacon


def _low_rank(shape: dict[str, Any], draw: Any, dtype: Any) -> dict[str, Any]:
    """Makes A and B of one projection, whose product is zero."""
    a, b = shape["lora_a"], shape["lora_b"]
    scale = 1 / math.sqrt(math.prod(a[1:-1]))
    drawn = draw(a, np.float32) * np.float32(scale)
    return {"lora_a": drawn.astype(dtype), "lora_b": np.zeros(b, dtype)}


def beacon_token(config: ModelConfig) -> int:
    """Returns the token id whose embedding the beacon starts from."""
    assert config.beacon is not None
    name = config.beacon.embed_init
    ids = config.eos_ids if name == "eos" else config.bos_ids
    if not ids or not 0 <= ids[0] < config.vocab_size:
        raise ValueError(
            f"embed_init={name!r} needs {name}_token_id, but config.json has "
            f"{list(ids)} for a vocabulary of {config.vocab_size}: add it, or use the "
            f"other of eos and bos."
        )
    return ids[0]
