"""Tells whether a buffer can be made at all: its bytes against those that devices have.

The check is made twice before anything is fed. `check_request` comes before the plan of
the windows, because a plan of 10^9 tokens takes minutes: it takes the fewest slots that
a request can come to. `check_buffer` comes after the plan, with the exact number.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from beacon_jax import host
from beacon_jax.core.law import Law
from beacon_jax.core.memory import MemoryState, slot_nbytes
from beacon_jax.inference.history import History
from beacon_jax.inference.options import Reading
from beacon_jax.inference.validate import ArgumentError

if TYPE_CHECKING:
    from beacon_jax.inference.model import Model

_GIB = 2**30
_ROUNDED = 0.8  # a buffer is up to 25 % larger than what is needed (`buffer_size`)


def check_request(
    model: "Model",
    asked: Reading,
    lengths: Sequence[int],
    new: int,
    before: Sequence[History],
    dtype: str,
) -> None:
    """Raises ArgumentError if not even the highest ratio that may be meant fits.

    Args:
      lengths: tokens of each row.
      new: tokens that may follow.
      before: the rows' histories.
      dtype: of the memory.
    """
    law, rows = Law.of(model.config), len(lengths)
    w = law.window
    free = free_slots(model, rows, dtype)
    if free is None:
        return
    if asked.capacity and asked.capacity > free:
        raise _too_large(
            "capacity", asked.capacity, asked.capacity, free, rows, model, dtype
        )
    for length, row in zip(lengths, before, strict=True):
        per = _highest(asked, row, model) or 1
        total = row.raw + length + new
        each = int(law.kept(per, 1))
        own = row.slots - (0 if row.own is None else w)  # is compressed, too
        slots = own + total // w * each
        if slots <= free:
            continue
        held = own + law.room([per])
        fit = int((free * _ROUNDED - held) // each * w) - row.raw - length
        if new > length and fit > 0:
            name = "max_new_tokens" if hasattr(asked, "max_new_tokens") else "reserve"
            raise _too_large(name, new, slots, free, rows, model, dtype, fit)
        raise _too_large("ratio", asked.ratio, slots, free, rows, model, dtype)


def check_buffer(model: "Model", rows: int, slots: int, dtype: str) -> None:
    """Raises ArgumentError if a buffer of `slots` per row cannot be made."""
    free = free_slots(model, rows, dtype)
    if free is not None and slots > free:
        raise _too_large("capacity", slots, slots, free, rows, model, dtype)


def check_copies(state: MemoryState, count: int) -> None:
    """Raises ArgumentError if `count` copies of a state of one row have no room."""
    devices = list(state.slots.devices())
    free = _free_of(devices[0], 0)
    if free is None:
        return
    free *= len(devices) if devices[0].platform != "cpu" else 1
    if count * state.nbytes > free:
        raise ArgumentError(
            "count",
            count,
            f"needs {count * state.nbytes / _GIB:,.1f} GiB, {free / _GIB:,.1f} GiB are "
            "free",
            remedy=f"at most {free // max(state.nbytes, 1):,} copies fit",
        )


def free_slots(model: "Model", rows: int, dtype: str) -> int | None:
    """Counts the slots per row of the largest buffer; None: not known."""
    free = _free_bytes(model)
    if free is None:
        return None
    return int(free / (rows * slot_nbytes(model.config, dtype) * _share(model, rows)))


def _highest(asked: Reading, row: History, model: "Model") -> int:
    """Returns the highest ratio that the request can come to: the fewest slots."""
    beacon, ratio = model.config.beacon, asked.ratio
    if beacon is None or (isinstance(ratio, str) and ratio == "full"):
        return 0
    if callable(ratio) or asked.max_slots is not None or asked.max_bytes is not None:
        return beacon.window
    if isinstance(ratio, str):
        number = ratio.removeprefix("auto-")
        return int(number) if number.isdigit() else max(beacon.ratios)
    if ratio is None:
        return max(*beacon.ratios, *row.ratios.tolist(), row.ratio)
    given = np.atleast_1d(np.asarray(ratio))
    # Any number of a list may come up; 0 is the lowest of all, not the highest.
    return min(int(given.max()), beacon.window)


def _too_large(
    name: str,
    value: Any,
    slots: int,
    free: int,
    rows: int,
    model: "Model",
    dtype: str,
    fit: int = 0,
) -> ArgumentError:
    """Makes the error: bytes needed and free, and what would fit.

    Args:
      name, value: the argument to blame.
      slots, free: needed and free, per row.
      fit: the largest value that fits; 0: the remedies are of other arguments.
    """
    slot = slot_nbytes(model.config, dtype)
    each = "1 row" if rows == 1 else f"{rows} rows"
    why = (
        f"needs a buffer of {rows * slots * slot / _GIB:,.1f} GiB ({each} of {slots:,} "
        f"slots of {slot:,} bytes), {rows * free * slot / _GIB:,.1f} GiB are free"
    )
    if fit:
        return ArgumentError(name, value, why, remedy=f"at most {fit:,} fit")
    most = f"at most {int(free * _ROUNDED):,} slots per row fit; a shorter text, fewer "
    most += "rows, a higher ratio or "
    return ArgumentError(
        name,
        value,
        why,
        remedy=most + "memory_dtype='int8' helps",
        flags=most + "--memory_dtype=int8 helps",
    )


def _share(model: "Model", rows: int) -> float:
    """Returns the part of a buffer that one device holds."""
    if model.partition is None:
        return 1.0
    rules, sizes = dict(model.partition.rules), model.partition.mesh.shape
    share, config = 1.0, model.config
    counts = {"layers": config.num_layers, "kv_heads": config.num_kv_heads}
    for axis, count in {"batch": rows, **counts}.items():
        split = math.prod(sizes[m] for m in rules.get(axis, ()))
        share /= split if count % split == 0 else 1
    return share


def _free_bytes(model: "Model") -> int | None:
    """Returns the bytes that one device has for a buffer; None: not known."""
    leaf = jax.tree.leaves(model.variables)[0]
    device = next(iter(leaf.sharding.addressable_devices))  # others tell nothing
    # Not what is in use at the moment: other memories may be gone by then.
    weights = sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(model.variables)
    )
    free = _free_of(device, weights)
    if free is None or device.platform != "cpu":
        return free
    return free // (model.partition.mesh.size if model.partition else 1)


def _free_of(device: Any, taken: int) -> int | None:
    """Returns the bytes of a device without those taken; of a CPU what is free now."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return max(stats["bytes_limit"] - taken, 0)
    return host.free_bytes() if device.platform == "cpu" else None
