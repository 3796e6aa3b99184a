"""What a model's programs depend on besides arrays: one hashable value, the `Net`."""

import dataclasses
from typing import Any

import numpy as np
from jax import lax

from beacon_jax.attention.device import Target, default_target
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.partition import Partition


@dataclasses.dataclass(frozen=True)
class Net:
    """A model as it is compiled; hashable. Two that are equal share their programs.

    Attributes:
      config: the model and its beacons.
      dtype: of products, keys and values.
      attention: implementation of `attention.prefix_attention`, or several to try in
        order; None: the best for the device.
      partition: how arrays are split over a mesh; None: they are not.
      target: the device that programs are made for; None: that of the mesh, or jax's
        default one.
    """

    config: ModelConfig
    dtype: Any = "float32"
    attention: str | tuple[str, ...] | None = None
    partition: Partition | None = None
    target: Target = None  # pyright: ignore[reportAssignmentType]

    def __post_init__(self) -> None:
        if self.target is None:
            mesh = self.partition and self.partition.mesh
            made = Target.of(mesh.devices.flat[0]) if mesh else default_target()
            object.__setattr__(self, "target", made)
        # jnp.float32 and np.dtype("float32") are equal, but are not hashed alike.
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        variables: dict[str, Any],
        partition: Partition | None = None,
    ) -> "Net":
        """Makes the net of stored weights: it computes in their dtype."""
        return cls(config, compute_dtype(variables), partition=partition)

    def constrain(self, x: Any, *axes: str | None) -> Any:
        """Splits x over the mesh by the names of its axes; without one it stays."""
        if self.partition is None:
            return x
        return lax.with_sharding_constraint(x, self.partition.sharding(axes, x.shape))


def compute_dtype(variables: dict[str, Any]) -> Any:
    """Returns the dtype of activations and memory: that of the stored weights."""
    return variables["params"]["embed"]["embedding"].dtype
