"""Logical axes to mesh axes: the one place that turns rules into shardings.

Every parameter names its axes ("embed", "heads", ...), activations name theirs through
`Net.constrain`; rules say over which axes of the mesh each name is split.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beacon_jax import runtime
from beacon_jax.names import meant, nearest

AXES = ("data", "fsdp", "tensor")
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
        """Returns the mesh axes that an array with these logical axes is split over.

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
        """Returns `spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))


def make_partition(mesh: str | Mesh, devices: Sequence[Any] = ()) -> Partition:
    """Makes a partition of the usual rules on a mesh.

    Args:
      mesh: sizes of axes as text, "tensor:8" or "data:2,tensor:4" (an axis that is not
        named has size 1, -1 is all devices that are left), or a mesh with some of the
        axes data, fsdp and tensor.
      devices: to use; all of this process if not given.

    Raises:
      TypeError: neither text nor a mesh.
      ValueError: an unknown axis, or more devices than there are.
    """
    if not isinstance(mesh, str | Mesh):
        what = "None" if mesh is None else f"of type {type(mesh).__name__}"
        raise TypeError(
            f"mesh={mesh!r} is {what}: give the axes as text, 'tensor:8' or "
            "'data:2,tensor:4', or a jax.sharding.Mesh."
        )
    runtime.prepare()
    if isinstance(mesh, str):
        mesh = _mesh(mesh, list(devices) or jax.devices())
    if unknown := set(mesh.axis_names) - set(AXES):
        raise ValueError(
            f"mesh has the axes {sorted(unknown)}: {meant(min(unknown), AXES)}use some "
            f"of {', '.join(AXES)}."
        )
    here = lambda axes: tuple(a for a in axes if a in mesh.axis_names)
    return Partition(mesh, tuple((name, here(axes)) for name, axes in RULES.items()))


def _mesh(text: str, devices: list[Any]) -> Mesh:
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    named: set[str] = set()
    for part in text.split(","):
        name, colon, size = part.strip().partition(":")
        near = nearest(name, AXES)
        what = ""
        if name not in sizes:
            what = f"has an axis {name!r}, which there is not: use {', '.join(AXES)}"
            what += f" (did you mean {near}?)" if near else ""
        elif not colon:
            what = f"has no size for {name!r}: give one"
        elif not re.fullmatch(r"-1|[1-9][0-9]{0,8}", size):
            what = f"has {size!r} as the size of {name!r}: give a number from 1 on"
            what += ", or -1 for all devices that are left"
        elif name in named:
            what = f"names {name!r} twice: give it once"
        if what:
            raise ValueError(f"mesh={text!r} {what}, such as tensor:8.")
        named.add(name)
        sizes[name] = int(size)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh={text!r} has two axes of -1: give all sizes but one.")
    for name in rest:
        sizes[name] = max(len(devices) // -math.prod(sizes.values()), 1)
    count = math.prod(sizes.values())
    if count > len(devices):
        raise ValueError(
            f"mesh={text!r} needs {count} devices, there are {len(devices)}: use "
            "smaller axes, or -1 for one of them."
        )
    grid = np.asarray(devices[:count]).reshape(list(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
