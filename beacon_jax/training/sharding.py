"""Places the arrays of a training run, and shares a batch among its devices.

There are two settings (config.mesh), as in docs/recipes.md:
  fast  fsdp = tensor = stage = 1: every device holds the whole base, the optimiser's
        state is split over data, and every device draws its own ratio plan, as the
        release's eight processes do. The step is a shard_map.
  lean  anything else: parameters, gradients, optimiser and memory are split by
        `model.partition` rules; all rows of a step share one ratio plan, because its
        branch has to be the same on every device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from beacon_jax import runtime
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import variable_axes
from beacon_jax.model.partition import (
    AXES,
    Partition,
    fill,
    make_mesh,
    make_partition,
)
from beacon_jax.training.config import Config


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh of a run and what is split over it.

    Attributes:
      partition: rules of the parameters, the memory and the activations.
      state_rules: rules of what is trained and of the optimiser.
      own_plans: every device of "data" has its own ratio plan.
    """

    partition: Partition
    state_rules: Partition
    own_plans: bool

    @property
    def mesh(self) -> Mesh:
        return self.partition.mesh

    @property
    def plans(self) -> int:
        """The number of ratio plans per step."""
        return self.mesh.shape["data"] if self.own_plans else 1

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def plan_sharding(self) -> NamedSharding:
        """The sharding of plans [N, P]: a column per device, or all on every device."""
        columns = NamedSharding(self.mesh, PartitionSpec(None, "data"))
        return columns if self.own_plans else self.everywhere

    def plan(self, plans: np.ndarray) -> jax.Array:
        """Makes a global array of plans [N, P], which every process has."""
        return put(plans, self.plan_sharding)

    def batch(self, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Makes global arrays of host arrays [N, B, ...].

        Every process has to fill in only its `rows` of them.
        """
        return {k: put(x, self._batch_sharding(x.shape)) for k, x in arrays.items()}

    def rows(self, count: int) -> list[int]:
        """Returns the rows of a batch of `count` that devices of this process hold."""
        shape = (1, count)
        where = self._batch_sharding(shape).addressable_devices_indices_map(shape)
        indices = [index for index in where.values() if index is not None]
        held = {i for index in indices for i in range(count)[index[1]]}
        return sorted(held)

    def _batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return self.partition.sharding((None, "batch"), shape, "the batch")

    def frozen(self, config: ModelConfig, tree: dict[str, Any]) -> dict[str, Any]:
        """Returns the shardings of parameters that are not trained."""
        return self._variables(config, tree, trained=False)

    def trained(self, config: ModelConfig, tree: dict[str, Any]) -> dict[str, Any]:
        """Returns the shardings of what is trained."""
        return self._variables(config, tree, trained=True)

    def variable(
        self, config: ModelConfig, name: str, shape: tuple[int, ...], *, trained: bool
    ) -> NamedSharding:
        """Returns the sharding of a variable, named "params/..." or "beacon/...".

        Raises:
          ValueError: it cannot be split as the rules say; names it.
        """
        axes: Any = variable_axes(config)
        for key in name.split("/"):
            axes = axes[key]
        rules = self.state_rules if trained else self.partition
        try:
            return rules.sharding(axes, shape, name)
        except ValueError:
            if trained and self.own_plans:  # too small to be worth splitting
                return self.everywhere
            raise

    def _variables(self, config: ModelConfig, tree: Any, *, trained: bool) -> Any:
        place = lambda name, x: self.variable(config, name, x.shape, trained=trained)
        return map_named(place, tree)

    def optimizer(self, state: Any, trained: Any) -> Any:
        """Returns the shardings of an optimiser's state.

        Moments are split as what they belong to, whose path theirs ends with. Counters
        are everywhere.
        """
        owners = dict(jax.tree_util.tree_leaves_with_path(trained))

        def sharding(path: tuple[Any, ...], x: Any) -> NamedSharding:
            ends = [path[i:] for i in range(len(path)) if x.ndim]
            return next((owners[e] for e in ends if e in owners), self.everywhere)

        return jax.tree_util.tree_map_with_path(sharding, state)


def make_placement(
    mesh: Config, rules: Config, rows: Sequence[int], devices: Sequence[Any] = ()
) -> Placement:
    """Makes the mesh of config.mesh, split by config.rules.

    Args:
      mesh: devices along data, fsdp, tensor and stage; one of them may be -1: as many
        as there are and as the batches allow.
      rules: {logical axis: mesh axes}.
      rows: the batch sizes of the run.
      devices: to use; all of this run if not given.

    Raises:
      ValueError: sizes that do not fit the devices or the batches; names the axis.
    """
    runtime.prepare()
    devices = list(devices) or jax.devices()
    # Runs from before there were stages have none in their settings.
    asked = {name: mesh.get(name, 1) for name in AXES}
    sizes = _sizes(asked, rows, len(devices))
    partition = make_partition(make_mesh(sizes, devices), rules=dict(rules.items()))
    own_plans = sizes["fsdp"] == sizes["tensor"] == sizes["stage"] == 1
    state = partition
    if own_plans:
        state = dataclasses.replace(partition, rules=(("embed", ("data",)),))
    return Placement(partition, state, own_plans)


def _sizes(asked: dict[str, int], rows: Sequence[int], devices: int) -> dict[str, int]:
    """Returns the size of each axis: the batches are shared evenly."""
    for name, size in asked.items():
        if size < 1 and size != -1:
            raise ValueError(
                f"mesh.{name}={size} must be a number of devices, or -1 for the rest."
            )
    shares = lambda sizes: sizes["data"] * sizes["fsdp"]
    even = lambda sizes: math.gcd(*rows) % shares(sizes) == 0
    sizes = fill(asked, devices, f"mesh={asked}", even)
    if not even(sizes):
        uneven = next(n for n in rows if n % shares(sizes))
        raise ValueError(
            f"mesh.data={sizes['data']} x mesh.fsdp={sizes['fsdp']} devices cannot "
            f"share a stage's batch_size={uneven} evenly: make it a multiple of "
            f"{shares(sizes)}, or make mesh.data or mesh.fsdp smaller."
        )
    return sizes


def map_named(f: Callable[[str, Any], Any], tree: Any, is_leaf: Any = None) -> Any:
    """Maps f(name, leaf) over a tree of dicts; a name is "params/layers/..."."""
    named = lambda path, x: f("/".join(key.key for key in path), x)
    return jax.tree_util.tree_map_with_path(named, tree, is_leaf=is_leaf)


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """Makes a host array a global one: each device gets its part, nothing else."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def make_value_and_grad(
    loss: Callable[..., Any],
    placement: Placement,
    trained: Any,
    *,
    average: str = "token",
    parts: int = 1,
    scale: float = 1.0,
) -> Callable[..., Any]:
    """Makes the function that gives the loss and its gradients for all rows.

    It is (trained, frozen, batch, plans [N, P]) -> ((loss, aux), gradients).

    Args:
      loss: (trained, frozen, batch, plan [N], partition) -> (loss, aux), as
        `core.train_loss` returns it.
      trained: shardings of what is trained; the gradients get the same.
      average: what the loss is a mean over, "token" or "row": rows count by their
        share of the labels of the whole batch, or all the same.
      parts: pieces of the batch that are computed one after the other, each with plans
        of its own (gradient accumulation).
      scale: the loss is differentiated this much larger; what is returned is not.

    P is placement.plans * parts; aux holds window_loss and window_count [N, P].
    """
    # In the fast setting every device computes on its own, and nothing is split.
    partition = None if placement.own_plans else placement.partition
    one_part = _value_and_grad(functools.partial(loss, partition=partition), scale)
    sums = functools.partial(_sums, one_part, average, parts)

    def whole(trained, frozen, batch, plans):
        value, count, aux, gradients = sums(trained, frozen, batch, plans)
        count = jnp.where(count > 0, count, 1.0)
        return (value / count, aux), jax.tree.map(lambda x: x / count, gradients)

    if not placement.own_plans:
        return whole
    specs = jax.tree.map(lambda sharding: sharding.spec, trained)

    def local(trained, frozen, batch, plans):
        value, count, aux, gradients = sums(trained, frozen, batch, plans)
        total = lax.psum(count, "data")
        total = jnp.where(total > 0, total, 1.0)

        def mean(part, spec):
            """Averages over all devices; each gets the part its optimiser needs."""
            if "data" not in spec:
                return lax.psum(part / total, "data")
            return lax.psum_scatter(
                part / total, "data", scatter_dimension=spec.index("data"), tiled=True
            )

        gradients = jax.tree.map(mean, gradients, specs)
        return (lax.psum(value / total, "data"), aux), gradients

    everywhere, rows = PartitionSpec(), PartitionSpec(None, "data")
    return jax.shard_map(
        local,
        mesh=placement.mesh,
        in_specs=(everywhere, everywhere, rows, rows),
        out_specs=((everywhere, rows), specs),
        check_vma=False,
    )


def _value_and_grad(loss: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """Makes `jax.value_and_grad` of a loss that is scaled only while differentiated."""
    if scale == 1.0:
        return jax.value_and_grad(loss, has_aux=True)

    def scaled(*args):
        value, aux = loss(*args)
        return value * scale, aux

    def value_and_grad(*args):
        (value, aux), gradients = jax.value_and_grad(scaled, has_aux=True)(*args)
        true_size = lambda x: x.astype(jnp.float32) / scale
        return (value / scale, aux), jax.tree.map(true_size, gradients)

    return value_and_grad


def _sums(value_and_grad, average, parts, trained, frozen, batch, plans):
    """Returns (loss * count, count, aux, gradients * count) of rows at hand, float32.

    The rows are computed in `parts`, one after the other.

    `count` is the sum of the label weights, or the share of rows that have a token
    (1 per part, but for the empty rows of a `pad` batch), as `average` says.
    """

    def one(batch, plan):
        (value, aux), gradients = value_and_grad(trained, frozen, batch, plan)
        if average == "token":
            count = scale = aux["row_count"].sum()
        else:  # the mean of row means counts empty rows, as 0: scaled with them
            real = jnp.any(batch["valid"] > 0, axis=0)
            count, scale = jnp.mean(real.astype(jnp.float32)), jnp.ones(())
        weigh = lambda x: x.astype(jnp.float32) * scale
        columns = {name: aux[name] for name in ("window_loss", "window_count")}
        return (value * scale, count, jax.tree.map(weigh, gradients)), columns

    if parts == 1:
        (value, count, gradients), aux = one(batch, plans[:, 0])
        return value, count, jax.tree.map(lambda x: x[:, None], aux), gradients

    # Every parts-th row, so that rows stay on the device where they are.
    deal = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, parts, *x.shape[2:]), 2, 0)

    def step(totals, x):
        new, aux = one(*x)
        return jax.tree.map(jnp.add, totals, new), aux

    pieces = jax.tree.map(deal, batch), plans.T
    shapes, _ = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (value, count, gradients), aux = lax.scan(step, zeros, pieces)
    return value, count, jax.tree.map(lambda x: x.T, aux), gradients
