"""`prefix_attention` by other people's kernels, where a table says they are faster.

Neither knows this op: cuDNN visits the whole capacity under a mask, tokamax's Mosaic
kernel for Hopper takes one prefix per call. Both multiply dead entries by 0, so that
these are copied out as 0 first.
"""

import importlib
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from beacon_jax.attention.device import Target, default_target
from beacon_jax.attention.shared import Layer, live_layer, zero_invalid

HALVES = (jnp.bfloat16, jnp.float16)
HOPPER = ("H100", "H200")
# What of a device's kind makes which library the first choice, from how many queries.
# bfloat16, H = 128, T = 2048, forward, TFLOP/s: H100 tokamax 492, Pallas-Triton 310,
# masked XLA 34; A100 Pallas-Triton 139, cuDNN without a mask 137, masked XLA 17.
PREFERRED = {"H100": ("tokamax", 1024), "H200": ("tokamax", 1024)}


def preferred(kind: str, queries: int) -> tuple[str, ...]:
    """Names the implementations to try before our kernel, on a device of this kind."""
    return tuple(
        name
        for chip, (name, least) in PREFERRED.items()
        if chip in kind and queries >= least
    )


def cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float,
    layer: Layer = None,
    queries: Int[Array, " B"] | None = None,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
    target: Target | None = None,
    backend: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` by `jax.nn.dot_product_attention` under a mask.

    backend: its implementation; "xla" has no limits.

    Raises:
      NotImplementedError: the program is not for a GPU; q is not of two bytes; H is not
        a multiple of 8 up to 128 (256 on Hopper); T or S is odd; a bias.
    """
    _check_no_bias(bias)
    if backend == "cudnn":
        _check_cudnn(q, k, target or default_target())
    q = zero_invalid(q, queries)
    k, v = live_layer(k, v, prefix + q.shape[1], layer)
    last = prefix[:, None] + jnp.arange(q.shape[1])
    mask = jnp.arange(k.shape[1]) <= last[..., None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask[:, None], scale=scale, implementation=backend
    )
    return zero_invalid(out, queries)


def _check_cudnn(q: Array, k: Array, target: Target) -> None:
    platform, kind = target
    most = 256 if any(chip in kind for chip in HOPPER) else 128
    t, h, s = q.shape[1], q.shape[-1], k.shape[-3]
    if platform != "gpu":
        raise NotImplementedError(f"platform {platform}: cuDNN needs a GPU.")
    _check_dtypes(q, k)
    if h % 8 or h > most:
        raise NotImplementedError(f"head_dim={h} of q: a multiple of 8 up to {most}.")
    if t % 2 or s % 2:
        raise NotImplementedError(f"T={t} of q, S={s} of k: both must be even.")


def _check_no_bias(bias: Array | None) -> None:
    """Raises NotImplementedError if there is one.

    Both libraries want it for every head, query and key, N x T x S numbers, and what
    they do with it has not been tried on a GPU.
    """
    if bias is not None:
        raise NotImplementedError("bias: not tried with this library.")


def _check_dtypes(q: Array, k: Array) -> None:
    if q.dtype not in HALVES or k.dtype != q.dtype:
        dtypes = f"q of dtype {q.dtype}, k of dtype {k.dtype}"
        raise NotImplementedError(f"{dtypes}: bfloat16 or float16 for both.")


def tokamax(
    q: Float[Array, "B T N H"],
    k: Float[Array, "*L B S K H"],
    v: Float[Array, "*L B S K H"],
    prefix: Int[Array, " B"],
    *,
    scale: float,
    layer: Layer = None,
    queries: Int[Array, " B"] | None = None,
    bias: Float[Array, "*_L _B _K _S"] | None = None,
    target: Target | None = None,
    backend: str = "mosaic_gpu",
) -> Float[Array, "B T N H"]:
    """Computes `api.prefix_attention` by tokamax's attention (0.0.17), row by row.

    backend: its implementation; "xla" has no limits.

    Raises:
      NotImplementedError: tokamax is not installed (the extra `tokamax` brings it); the
        program is not for a Hopper GPU; q is not of two bytes; or what tokamax itself
        refuses, such as a program for another device than the default one; a bias.
    """
    _check_no_bias(bias)
    try:
        library = importlib.import_module("tokamax")
    except ImportError as error:
        install = 'pip install "beacon_jax[tokamax]"'
        raise NotImplementedError(f"not installed here: {install}.") from error
    if backend == "mosaic_gpu":
        kind = (target or default_target()).kind
        if not any(chip in kind for chip in HOPPER):
            raise NotImplementedError(f"device {kind}: tokamax needs Hopper.")
        _check_dtypes(q, k)
    q = zero_invalid(q, queries)
    k, v = live_layer(k, v, prefix + q.shape[1], layer)

    def row(i: int) -> Float[Array, "1 T N H"]:
        one = slice(i, i + 1)
        # Keys from S before a query to `prefix` behind its index: all up to its last.
        return library.dot_product_attention(
            q[one],
            k[one],
            v[one],
            scale=scale,
            local_window_size=(k.shape[1], prefix[i]),
            implementation=backend,
        )

    out = jnp.concatenate([row(i) for i in range(q.shape[0])])
    return zero_invalid(out, queries)
