"""The device that a program is traced for."""

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """platform: "cpu", "gpu" or "tpu". kind: as the device calls itself."""

    platform: str
    kind: str


def target() -> Target:
    """Of the mesh that is set or being mapped over, else of the default device.

    A mesh comes first because its devices need not be here: compiling ahead of time for
    a chip sets its mesh (or is inside of a `shard_map`), and Pallas itself asks it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        chosen = jax.config.jax_default_device
        device = jax.devices(chosen)[0] if isinstance(chosen, str) else chosen
    if device is None:
        device = jax.devices()[0]
    return Target(device.platform, device.device_kind)
