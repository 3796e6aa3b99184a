"""The loop over training windows: a scan, or a pipeline over stages of layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array, Float

from beacon_jax.core import lean_vjp, stage_vjp
from beacon_jax.core.lean_vjp import LoopSettings
from beacon_jax.core.step import Window
from beacon_jax.model import stages
from beacon_jax.model.decoder import Entries
from beacon_jax.model.net import Net

REMAT = ("lean", "lean-layer", "none", "layer", "window")


def window_loop(
    net: Net,
    windows: tuple[Window, ...],
    variables: Any,
    buffers: Entries,
    xs: dict[str, Array],
    *,
    remat: str,
    offload: bool = False,
    watch: Callable[..., Any] | None = None,
) -> tuple[Float[Array, "N B W D"], Any]:
    """Runs all windows, which fill the buffers.

    Args:
      windows: one per static ratio, in the order of xs["index"] - 1.
      buffers: zeros [L, B, S, K, H].
      xs: stacked over windows: tokens [N, B, W]; index [N] of the branch, 0 for a step
        without tokens; ratio [N]; slots [N, B] in front of each window and added [N, B]
        that it appends; with `watch` compared, `attention_loss.Compared`.
      remat: "lean" keeps the activations of one window at a time (2 forwards and a
        backward), "lean-layer" only what enters its layers (3 forwards). "none",
        "layer" and "window" are plain reverse mode, which keeps everything, or
        recomputes that much.
      offload: the filled buffers wait for the lean backward pass in host memory, from
        where every window fetches them again, one layer at a time.
      watch: a function of `attention_loss`, of the net, what a layer's attention has
        seen, x of a window, and what x["compared"] has for the layer. Windows must be
        `watched`. A lean backward pass wants one that returns a number.

    Returns:
      Hidden states [N, B, W, D], and what `watch` found [N, L, ...], or None.

    With a mesh axis "stage" the windows go in a pipeline (`stage_vjp`).

    Raises:
      ValueError: settings that a pipeline does not have.
    """
    settings = LoopSettings(net, windows, remat, offload, watch)
    if stages.count(net) > 1:
        _check_stages(settings)
        return stage_vjp.pipelined(settings, variables, buffers, xs), None
    if remat.startswith("lean"):
        return lean_vjp.lean(settings, variables, buffers, xs)
    step = functools.partial(lean_vjp.run_window, settings, variables)
    if remat == "window":
        step = jax.checkpoint(step, prevent_cse=False)
    return lax.scan(step, buffers, xs)[1]


def _check_stages(settings: LoopSettings) -> None:
    """Raises ValueError for settings that stages do not have."""
    where = f"with mesh.stage={stages.count(settings.net)}"
    if not settings.remat.startswith("lean"):
        raise ValueError(
            f"remat={settings.remat!r} does not go {where}: use 'lean' or 'lean-layer'."
        )
    if settings.offload:
        raise ValueError(
            f"offload=True does not go {where}, whose devices hold the memory of their "
            "own layers: use offload=False."
        )
    if settings.watch:
        raise ValueError(
            f"attention_weight above 0 does not go {where}: use attention_weight=0."
        )
