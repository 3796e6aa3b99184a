"""The start values of the beacon parameters (docs/specification.md section 1)."""

from typing import Any

from beacon_jax.model.config import ModelConfig


def init_beacon(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Makes beacons that act exactly like an eos (or bos) token (paper, section 3.2).

    Args:
      params: the base parameters, numpy or jax arrays (tracers are fine).
      config: with a `beacon` that names the token and the projections.

    Returns:
      The beacon tree of `param_shapes(config)`, in the dtypes of the base: the
      token's embedding row [1, D] and copies of the base projections, never views, so
      that a trainer may donate them.
    """
    if config.beacon is None:
        raise ValueError("config.beacon=None: give a BeaconConfig.")
    token = beacon_token(config)
    beacon: dict[str, Any] = {
        "embed": {"embedding": params["embed"]["embedding"][token : token + 1].copy()}
    }
    attention = params["layers"]["attention"]
    projections = {
        f"{letter}_proj": {k: x.copy() for k, x in attention[f"{letter}_proj"].items()}
        for letter in config.beacon.param
    }
    if projections:
        beacon["layers"] = {"attention": projections}
    return beacon


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
