"""The device that a program is traced for."""

from typing import Any, NamedTuple

import jax

# In the names of NVIDIA's chips before compute capability 8.0, a T4 or V100 say.
BEFORE_AMPERE = ("Tesla", "TITAN", "GTX", "RTX 20", "Quadro RTX")


class Target(NamedTuple):
    """A device: its platform, "cpu", "gpu" or "tpu", and what it calls itself."""

    platform: str
    kind: str

    @classmethod
    def of(cls, device: Any) -> "Target":
        """Returns what a device of jax is."""
        return cls(device.platform, device.device_kind)


def default_target() -> Target:
    """Returns jax's default device, without looking at any mesh."""
    chosen = jax.config.jax_default_device
    device = jax.devices(chosen)[0] if isinstance(chosen, str) else chosen
    return Target.of(jax.devices()[0] if device is None else device)


def target() -> Target:
    """Returns the device of the mesh that is set or mapped over, else the default one.

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


def check_triton() -> None:
    """Raises NotImplementedError where Triton compiles nothing (jax #26799)."""
    kind = target().kind
    if any(name in kind for name in BEFORE_AMPERE):
        raise NotImplementedError(
            f"device {kind}: Triton needs compute capability 8.0, an A100 or later."
        )
