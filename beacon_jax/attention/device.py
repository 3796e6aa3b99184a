"""The device that a program is for."""

from typing import Any, NamedTuple

import jax

# In the names of NVIDIA's chips before compute capability 8.0, a T4 or V100 say.
BEFORE_AMPERE = ("Tesla", "TITAN", "GTX", "RTX 20", "Quadro RTX")


class Target(NamedTuple):
    """A device that need not be here.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: what the device calls itself, "NVIDIA H200" or "TPU v5 lite" say.
    """

    platform: str
    kind: str

    @classmethod
    def of(cls, device: Any) -> "Target":
        """Makes the target of a `jax.Device`, of a topology that is not here, too."""
        return cls(device.platform, device.device_kind)


def default_target() -> Target:
    """Returns the default device of this process, whatever mesh is set."""
    chosen = jax.config.jax_default_device
    if chosen is None or isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    return Target.of(chosen)


def check_triton(target: Target) -> None:
    """Raises NotImplementedError where Triton compiles nothing (jax #26799)."""
    if any(name in target.kind for name in BEFORE_AMPERE):
        raise NotImplementedError(
            f"device {target.kind}: Triton needs compute capability 8.0, an A100 or "
            f"later."
        )
