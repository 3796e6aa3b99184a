"""The attention op and the choice of its implementation."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from beacon_jax.attention import library
from beacon_jax.attention.blockwise import blockwise
from beacon_jax.attention.blockwise_cpu import blockwise_cpu
from beacon_jax.attention.decode import decode_xla
from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.mean import mean_term
from beacon_jax.attention.reference import WEIGHTS, reference
from beacon_jax.attention.shared import LSE, OUT, Layer, check_bias
from beacon_jax.names import meant


def _kernel(name: str) -> Callable:
    """Returns the kernel of a module of its name, imported at the first call.

    Pallas is half as much to import as jax itself (0.7 s), and a CPU needs none of it.
    """

    def kernel(*args: Any, **options: Any) -> Any:
        try:
            module = importlib.import_module(f"beacon_jax.attention.{name}")
        except ImportError as error:
            lacks = f"this jax lacks what it needs ({error})."
            raise NotImplementedError(lacks) from error
        return getattr(module, name)(*args, **options)

    return kernel


# In a program for another platform, a kernel's name stands for `blockwise`.
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "blockwise": blockwise,
    "blockwise_cpu": blockwise_cpu,
    "mosaic_gpu": _kernel("mosaic_gpu"),
    "pallas_gpu": _kernel("pallas_gpu"),
    "pallas_tpu": _kernel("pallas_tpu"),
    "decode_gpu": _kernel("decode_gpu"),
    "decode_mosaic_gpu": _kernel("decode_mosaic_gpu"),
    "decode_tpu": _kernel("decode_tpu"),
    "decode_xla": decode_xla,
    "cudnn": library.cudnn,
    "tokamax": library.tokamax,
}
# These take an int8 memory.
INT8 = ("decode_gpu", "decode_tpu", "decode_xla", "pallas_tpu")
# Names of what a backward pass needs besides q, k and v, for checkpoint policies.
RESIDUALS = (OUT, LSE, WEIGHTS)
# Up to so many slots all scores at once are cheaper than a loop over blocks. On a CPU
# they soon leave its caches: 320 queries of SmolLM2's heads on 1,024 slots take 20 ms
# in bfloat16, by blocks 5, backward 37 and 14; 64 queries on 128 take 0.4 either way.
SMALL, SMALL_ON_CPU = 1024, 128


def prefix_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"] | Int[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"] | Int[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
    layer: Layer = None,
    queries: Int[Array, " B"] | None = None,
    k_scale: Float[Array, "*_L _B _K _S"] | None = None,
    v_scale: Float[Array, "*_L _B _K _S"] | None = None,
    k_mean: Float[Array, "*L B K H"] | None = None,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
    frequencies: Float[np.ndarray, " pairs"] | None = None,
    target: Target | None = None,
) -> Float[Array, "B T N H"]:
    """Computes causal attention in which query i sees the keys j <= prefix[row] + i.

    With the open window directly behind the memory slots of one buffer, this is the
    attention of the paper's section 3.1 for prefill, pieces of a prompt and decoding.

    Args:
      q: queries, already rotated; N is a multiple of K (grouped-query attention).
      k, v: one buffer of S entries per row, the T queries' own entries included at
        prefix[row] ... prefix[row] + T - 1. With `layer`, stacked over L layers.
      prefix: entries in front of the first query, 0 <= prefix <= S - T.
      scale: of the scores; H ** -0.5 by default.
      implementation: a name, several to try in order, or None for the platform's best,
        as `best` says.
      layer: index into the leading axis of stacked k, v.
      queries: number of valid queries per row; later rows of the result are 0.
      k_scale, v_scale: of int8 k and v, per slot and kv head (`attention.decode`).
      k_mean: what int8 keys lack, un-rotated: slot p holds k minus k_mean rotated by p
        (`attention.mean`; magnitudes like yarn's belong to k_mean).
      bias: float32 to add to the scores, per slot and kv head, after `scale`: softmax
        of scale * q k + bias, in natural-log units. For slots that stand for several
        tokens. It has no gradient. In dead slots it may be anything, as k and v may.
      frequencies: of that rotation, angle per position of each pair (i, i + H/2); not
        used without k_mean.
      target: the device that the program is for; None: the default one.

    Raises:
      NotImplementedError: no named implementation takes these arguments; says which
        argument each refuses.
      ValueError: an unknown implementation; k_mean without frequencies or k_scale; a
        bias that is not float32, or not shaped as k needs it.
    """
    if q.shape[2] % k.shape[-2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, k has {k.shape[-2]}: the first must be a "
            f"multiple of the second."
        )
    if k_mean is not None and (k_scale is None or frequencies is None):
        missing = "k_scale" if k_scale is None else "frequencies"
        raise ValueError(
            f"k_mean with {missing}=None: it belongs to int8 keys with k_scale, and "
            f"needs the frequencies of their rotation."
        )
    check_bias(k, bias)
    target = target or default_target()
    names = implementation
    if names is None:
        names = best(q.shape[1], k.shape[-3], target, int8=k_scale is not None)
    options: dict[str, Any] = {"layer": layer, "queries": queries, "bias": bias}
    options["target"] = target
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    int8: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    if k_mean is not None and frequencies is not None:
        int8["mean"] = mean_term(q, k_mean, frequencies, layer)
    refusals = []
    for name in (names,) if isinstance(names, str) else names:
        if name not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={name!r} is unknown: "
                f"{meant(name, IMPLEMENTATIONS)}use "
                f"{' or '.join(sorted(IMPLEMENTATIONS))}."
            )
        if q.size == 0:
            return q
        try:
            if k_scale is None:
                return IMPLEMENTATIONS[name](q, k, v, prefix, **options)
            if name not in INT8:
                raise NotImplementedError(f"k_scale: for {', '.join(INT8)}.")
            return IMPLEMENTATIONS[name](q, k, v, prefix, **options, **int8)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"implementation={names!r}: {'; '.join(refusals)}")


def best(
    queries: int, slots: int, target: Target, *, int8: bool = False
) -> tuple[str, ...]:
    """Lists the implementations to try for T queries over S slots, the best first.

    The last one always works.

    The device is an argument, because a kernel must know its chip while it is traced,
    for its block sizes: what decides later, like `lax.platform_dependent`, cannot name
    a chip that is not here. Each kernel has that inside, around forward and backward
    apart, so that a program which is lowered for another platform than it was traced
    for still runs. (Pallas itself asks the mesh for the chip, while lowering: whoever
    compiles for one that is not here sets its mesh, too.)

    Mosaic's kernels for GPUs have not been timed yet: they stand behind those of
    Pallas-Triton, which is deprecated, for the day when jax has it no more.
    """
    platform, kind = target
    names = {
        "gpu": (
            *("decode_gpu", "decode_mosaic_gpu"),
            *(*library.preferred(kind, queries), "pallas_gpu", "mosaic_gpu"),
        ),
        "tpu": ("decode_tpu", "pallas_tpu"),
    }.get(platform, ())
    if int8:
        return (*(name for name in names if name in INT8), "decode_xla")
    if slots <= (SMALL_ON_CPU if platform == "cpu" else SMALL):
        return (*names, "reference")
    return (*names, "blockwise_cpu" if platform == "cpu" else "blockwise")
