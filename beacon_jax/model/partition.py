"""Logical axes to mesh axes: the one place that turns rules into shardings.

Every parameter names its axes ("embed", "heads", ...), activations name theirs through
`constrain`; rules say over which axes of the mesh each name is split.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Batches are split over data and fsdp, parameters over fsdp and tensor. An axis that is
# not named here is never split.
RULES = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh and the rules ((logical axis, mesh axes), ...); hashable, so that it can
    be a static argument."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def __post_init__(self) -> None:
        for name, axes in self.rules:
            if unknown := set(axes) - set(self.mesh.axis_names):
                raise ValueError(
                    f"rule {name!r} names the mesh axes {sorted(unknown)}; the mesh "
                    f"has {', '.join(self.mesh.axis_names)}."
                )

    def spec(
        self,
        axes: tuple[str | None, ...],
        shape: tuple[int, ...] | None = None,
        name: str = "an array",
    ) -> PartitionSpec:
        """Where an array with these logical axes goes.

        Raises:
          ValueError: two of its axes want the same mesh axis, or one of them cannot be
            divided; names both.
        """
        rules, used, parts = dict(self.rules), {}, []
        for i, axis in enumerate(axes):
            split = [m for m in rules.get(axis or "", ()) if self.mesh.shape[m] > 1]
            for mesh_axis in split:
                if mesh_axis in used:
                    raise ValueError(
                        f"{name}: the axes {used[mesh_axis]!r} and {axis!r} both go to "
                        f"mesh axis {mesh_axis!r}: change one of their rules."
                    )
                used[mesh_axis] = axis
            parts_wanted = math.prod(self.mesh.shape[m] for m in split)
            if shape is not None and shape[i] % parts_wanted:
                raise ValueError(
                    f"{name}: axis {axis!r} has size {shape[i]}, which mesh axes "
                    f"{'x'.join(split)}={parts_wanted} do not divide: use a smaller "
                    f"mesh axis, or change the rule of {axis!r}."
                )
            parts.append(tuple(split) if len(split) > 1 else (split or [None])[0])
        return PartitionSpec(*parts)

    def sharding(
        self,
        axes: tuple[str | None, ...],
        shape: tuple[int, ...] | None = None,
        name: str = "an array",
    ) -> NamedSharding:
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))


_ACTIVE: contextvars.ContextVar[Partition | None] = contextvars.ContextVar(
    "partition", default=None
)


@contextlib.contextmanager
def partitioned(partition: Partition | None) -> Iterator[None]:
    """`constrain` means something while tracing inside of this."""
    token = _ACTIVE.set(partition)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Partition | None:
    """The partition that is being traced."""
    return _ACTIVE.get()


def constrain(x: Any, *axes: str | None) -> Any:
    """x, split by the rules of the `partitioned` that is traced, or as it is."""
    partition = _ACTIVE.get()
    if partition is None:
        return x
    return lax.with_sharding_constraint(x, partition.sharding(axes, x.shape))
