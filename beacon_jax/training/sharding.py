"""Data parallelism: every device trains on its rows with its own ratio plan."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(data: int, rows: Sequence[int]) -> Mesh:
    """The mesh of a run.

    Args:
      data: devices that share a batch; -1: as many as divide every batch.
      rows: the batch sizes of the run.

    Raises:
      ValueError: more devices than there are, or batches that they cannot share.
    """
    devices, common = jax.devices(), math.gcd(*rows)
    if data == -1:
        data = max(n for n in range(1, len(devices) + 1) if common % n == 0)
    if not 1 <= data <= len(devices):
        raise ValueError(
            f"mesh.data={data}: there are {len(devices)} devices; use 1 to "
            f"{len(devices)}, or -1 for as many as the batches allow."
        )
    if common % data:
        uneven = next(n for n in rows if n % data)
        raise ValueError(
            f"mesh.data={data} devices cannot share a stage's batch_size={uneven} "
            f"evenly: make it a multiple of {data}, or set mesh.data=-1."
        )
    return Mesh(devices[:data], ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """The tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def data_parallel(value_and_grad, mesh: Mesh, average: str):
    """(trained, frozen, batch, plans) -> ((loss, aux), gradients) over all rows.

    value_and_grad: of one device's rows: (trained, frozen, batch, plan [N]) to
      ((loss, aux), gradients), aux as `core.train_loss` returns it.
    average: what the loss is a mean over, "token" or "row": a device counts by its
      share of the labels of the whole batch, or of its rows.

    The rows are axis 1 of everything in `batch`; plans is [N, devices]. aux holds
    window_loss and window_count [N, devices].
    """

    def local(trained, frozen, batch, plans):
        (loss, aux), gradients = value_and_grad(trained, frozen, batch, plans[:, 0])
        count = aux["row_count"].sum() if average == "token" else jnp.ones(())
        total = jax.lax.psum(count, "data")
        share = count / jnp.where(total > 0, total, 1.0)
        # One collective for everything.
        loss, gradients = jax.lax.psum(
            jax.tree.map(lambda x: x * share, (loss, gradients)), "data"
        )
        columns = {k: aux[k][:, None] for k in ("window_loss", "window_count")}
        return (loss, columns), gradients

    rows = PartitionSpec(None, "data")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(), rows, rows),
        out_specs=((PartitionSpec(), rows), PartitionSpec()),
        check_vma=False,
    )
