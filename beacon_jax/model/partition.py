"""Logical axes to mesh axes: the one place that turns rules into shardings.

Every parameter names its axes ("embed", "heads", ...), activations name theirs through
`Net.constrain`; rules say over which axes of the mesh each name is split.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from beacon_jax import runtime
from beacon_jax.names import meant, nearest

AXES = ("data", "fsdp", "tensor", "stage")
# Batches are split over data and fsdp, parameters over fsdp and tensor, and layers with
# their memory over stage (`model.stages`). An axis that is not named here is never
# split.
RULES = {
    "layers": ("stage",),
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


@dataclasses.dataclass(frozen=True)
class Partition:
    """A mesh and the rules ((logical axis, mesh axes), ...); hashable."""

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

    @property
    def free_axes(self) -> set[str]:
        """The mesh axes that no `jax.shard_map` around this code has taken."""
        return set(self.mesh.axis_names) - set(getattr(self.mesh, "manual_axes", ()))

    def without(self, axis: str, mesh: Any) -> "Partition":
        """Returns the rules on another mesh, where nothing is split over `axis`."""
        rest = lambda axes: tuple(a for a in axes if a != axis)
        return Partition(mesh, tuple((name, rest(axes)) for name, axes in self.rules))

    def sharding(
        self,
        axes: tuple[str | None, ...],
        shape: tuple[int, ...] | None = None,
        name: str = "an array",
    ) -> NamedSharding:
        """Returns `spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))


def make_partition(
    mesh: str | Mesh,
    devices: Sequence[Any] = (),
    rules: Mapping[str, Any] | None = None,
) -> Partition:
    """Makes a partition.

    Args:
      mesh: sizes of axes as text, "tensor:8" or "data:2,tensor:4" (an axis that is not
        named has size 1, -1 is all devices that are left), or a mesh with some of the
        axes data, fsdp, tensor and stage.
      devices: to use; all of this process if not given.
      rules: {logical axis: mesh axes}; None: `RULES`, as far as the mesh has the axes.
        Layers are always split over the mesh axis "stage".

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
        devices = list(devices) or jax.devices()
        sizes = fill(_sizes(mesh), len(devices), f"mesh={mesh!r}")
        mesh = make_mesh(sizes, devices)
    if unknown := set(mesh.axis_names) - set(AXES):
        raise ValueError(
            f"mesh has the axes {sorted(unknown)}: {meant(min(unknown), AXES)}use some "
            f"of {', '.join(AXES)}."
        )
    have = mesh.axis_names
    stages = {"layers": [a for a in RULES["layers"] if a in have]}
    if rules is None:
        rules = {name: [a for a in axes if a in have] for name, axes in RULES.items()}
    rules = {**rules, **stages}
    whole = lambda axes: (axes,) if isinstance(axes, str) else tuple(axes)
    return Partition(mesh, tuple((name, whole(axes)) for name, axes in rules.items()))


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """Makes a mesh of the first devices, whose axes the compiler may split over."""
    grid = np.asarray(devices[: math.prod(sizes.values())])
    types = (AxisType.Auto,) * len(sizes)
    return Mesh(grid.reshape(list(sizes.values())), tuple(sizes), axis_types=types)


def fill(
    asked: Mapping[str, int],
    devices: int,
    shown: str,
    fits: Callable[[dict[str, int]], bool] = lambda sizes: True,
) -> dict[str, int]:
    """Returns sizes of mesh axes, with all devices that are left in place of -1.

    Args:
      asked: {axis: size}.
      devices: how many there are.
      shown: the argument as the user gave it, for messages.
      fits: what the sizes have to suit besides; 1 is taken where nothing suits.

    Raises:
      ValueError: two axes of -1, or more devices than there are.
    """
    rest = [name for name, size in asked.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"{shown} has two axes of -1: give all sizes but one.")
    sizes = dict(asked)
    for name in rest:
        known = math.prod(size for size in asked.values() if size != -1)
        most = range(devices // known, 0, -1)
        sizes[name] = next((n for n in most if fits({**sizes, name: n})), 1)
    if (count := math.prod(sizes.values())) > devices:
        raise ValueError(
            f"{shown} needs {count} devices, there are {devices}: use smaller axes, or "
            "-1 for one of them."
        )
    return sizes


def _sizes(text: str) -> dict[str, int]:
    """Reads "data:2,tensor:4"."""
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
    return sizes
