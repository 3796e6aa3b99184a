"""Estimates the bytes that a training step needs on a device, from its shapes alone.

The estimate has the parts that grow with the model or the text. It was measured against
XLA's own `memory_analysis()` for 8 x A100-80GB (docs/recipes.md). It decides between
recomputing layers and keeping the activations of a window.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from beacon_jax.core.law import Law
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.decoder import residual_dtype
from beacon_jax.training.config import Config
from beacon_jax.training.hardware import memory_gib
from beacon_jax.training.inputs import has_teacher
from beacon_jax.training.inputs import slots as memory_room
from beacon_jax.training.sharding import Placement

# Workspace of compiled code: gathered weights of two layers, blocks of scores, logits.
SLACK = 1.1


def resolve_remat(
    config: Config,
    model: ModelConfig,
    placement: Placement,
    trained: Any,
    frozen: Any,
    shapes: Iterable[tuple[int, int]],
) -> str:
    """Returns config.remat, or what "auto" means for the largest batch of a run.

    Args:
      trained, frozen: arrays with shardings.
      shapes: (rows, tokens of the longest row) of all batches.
    """
    if config.remat != "auto":
        return config.remat
    if model.beacon is None:
        return "lean"
    shares = placement.mesh.shape["data"] * placement.mesh.shape["fsdp"]
    needs = [
        step_bytes(
            config,
            model,
            placement,
            trained,
            frozen,
            rows=rows // (config.accumulate * shares),
            windows=-(-length // model.beacon.window),
        )
        for rows, length in shapes
    ]
    return choose_remat(max(needs, key=lambda need: need["lean"]))


def step_bytes(
    config: Config,
    model: ModelConfig,
    placement: Placement,
    trained: Any,
    frozen: Any,
    *,
    rows: int,
    windows: int,
    slots: int = 0,
) -> dict[str, float]:
    """Estimates the bytes per device with remat "lean" and "lean-layer".

    Args:
      config: gives dtype, `offload` and, without `slots`, the room of the memory.
      trained, frozen: arrays or shapes with shardings.
      rows: of one device (of one part, if gradients are accumulated).
      windows: N of a row.
      slots: memory slots of a row without the open window; 0: those of the run.
    """
    assert model.beacon is not None
    dtype, sizes = jnp.dtype(config.dtype), placement.mesh.shape
    tensor, layers = sizes["tensor"], model.num_layers // sizes.get("stage", 1)
    size = dtype.itemsize
    own = sum(_bytes(x, 4) for x in jax.tree.leaves(trained))
    state = 3 * own  # masters and two moments
    base = sum(_bytes(x, x.dtype.itemsize) for x in jax.tree.leaves(frozen))
    whole = sum(math.prod(x.shape) for x in jax.tree.leaves(trained))
    # Gradients are summed where the weights are computed with: whole if replicated.
    gradients = 4 * whole + size * whole if placement.own_plans else 2 * own
    ratios, law = model.beacon.ratios, Law.of(model)
    entries = (slots or memory_room(config, model, windows)) + law.room(ratios)
    kv = 2 * layers * model.num_kv_heads * model.head_dim / tensor
    # Keys and values, and their cotangents in float32.
    buffers = rows * entries * kv * (4 if config.offload else size + 4)
    hidden = 3 * rows * windows * law.window * model.hidden_size * size
    window = int(law.entries(min(r for r in ratios if r), law.window))
    wide = jnp.dtype(residual_dtype(dtype)).itemsize
    inputs = rows * window * layers * model.hidden_size * wide
    if layers < model.num_layers:  # what enters a stage waits for the backward pass
        inputs += rows * windows * window * model.hidden_size * wide
    layer = rows * window * _activations(model, size) / tensor
    fixed = state + base + gradients + buffers + hidden + inputs
    if has_teacher(config):
        # The teacher's hidden states stay; its keys and values of all tokens are gone
        # before the student's backward pass makes what is in `buffers`.
        taught = rows * windows * law.window * size
        fixed += max(taught * kv - buffers, 0)
        if config.loss.kind == "distil":
            fixed += taught * model.hidden_size
    if config.loss.attention_weight > 0:
        # What it pays to each slot stays, too; a layer's tables of scores do not.
        compared = rows * min(config.loss.attention_queries, law.window)
        fixed += compared * windows * layers * entries * size
        layer += compared * 4 * model.num_heads / tensor * (entries + window)
    return {
        "lean": SLACK * (fixed + layers * layer),
        "lean-layer": SLACK * (fixed + layer),
    }


def choose_remat(need: dict[str, float], device: Any = None) -> str:
    """Chooses "lean" if it fits into the device's memory, or if that is not known.

    Otherwise it chooses "lean-layer".
    """
    limit = memory_gib([device or jax.local_devices()[0]]).get("memory_limit_gib")
    fits = limit is None or need["lean"] <= limit * 2**30
    return "lean" if fits else "lean-layer"


def _activations(model: ModelConfig, size: int) -> float:
    """Counts the bytes per token that the backward pass of one layer keeps."""
    d, f = model.hidden_size, model.intermediate_size
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    own = model.beacon.rank * len(model.beacon.param) if model.beacon else 0
    normed = 2 * d + (heads if model.qk_norm else 0)  # in float32
    return size * (4 * d + 2 * heads + 4 * f + own) + 4 * normed


def _bytes(x: Any, size: int) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * size
