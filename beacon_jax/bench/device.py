"""The device that is measured: its memory, its real peaks, random arrays made on it."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from beacon_jax import host
from beacon_jax.bench.records import DoesNotFit, Row
from beacon_jax.bench.sizes import GIB
from beacon_jax.bench.timing import compile_program, measure_queued
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.shapes import param_shapes

# Edge of the square product and bytes of the copied array, per platform: large enough
# to reach the peak, and 0.1 s on a CPU.
MATMUL = {"cpu": 512}
COPY = {"cpu": 2**26}


def memory_limit(device: Any) -> int | None:
    """Returns the bytes of a device, in use or not; None: nobody tells."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return host.total_bytes() if device.platform == "cpu" and not limit else limit


def check_fits(device: Any, needed: float) -> None:
    """Raises DoesNotFit if the formula's bytes are more than there are."""
    limit = memory_limit(device)
    if limit is not None and needed > limit:
        raise DoesNotFit(
            f"{needed / GIB:.1f} GiB by formula, {device.device_kind} has "
            f"{limit / GIB:.1f}"
        )


def check_platform(implementation: str, device: Any) -> None:
    """Raises NotImplementedError for a kernel of another platform.

    It would run interpreted, or be another implementation in its place.
    """
    platform = implementation.rpartition("_")[2]
    if platform in {"gpu", "tpu", "cpu"} - {device.platform}:
        raise NotImplementedError(
            f"implementation={implementation!r} is for {platform}, this is "
            f"{device.platform}."
        )


def whole_tiles(slots: int) -> int:
    """Rounds slots up to a multiple of 8, as Mosaic's kernels for Hopper want them."""
    return -(-slots // 8) * 8


def peak_bytes(device: Any) -> int | None:
    """Returns the most bytes that this process had at once so far.

    A device cannot be asked to forget, so the rows of a run go from small to large.
    """
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def risen(device: Any, before: int | None) -> int | None:
    """Returns the process's peak, if it has risen since it was `before`."""
    after = peak_bytes(device)
    return after if after != before else None


def random_array(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws normal numbers on the device, one index of the leading axis at a time.

    So the float32 and uint32 numbers behind them never exist for all of a large array.
    """
    return _random(key, tuple(shape), jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random(key, shape, dtype):
    if len(shape) < 3:
        return jax.random.normal(key, shape, dtype)
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda k: jax.random.normal(k, shape[1:], dtype), keys)


def random_variables(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Draws {"params", "beacon"} of the usual size (0.02), norms 1."""
    # rbg: an accelerator's own generator, many times as fast as threefry.
    root, numbers = jax.random.key(0, impl="rbg"), itertools.count()

    def make(path: tuple[Any, ...], shape: tuple[int, ...]) -> Array:
        key = jax.random.fold_in(root, next(numbers))
        if path[-1].key == "scale":
            return jnp.ones(shape, dtype)
        return _small(random_array(key, shape, dtype))

    is_shape = lambda x: isinstance(x, tuple)
    made = jax.tree.map_with_path(make, param_shapes(config), is_leaf=is_shape)
    return jax.block_until_ready(made)  # else the first call that is timed waits


@functools.partial(jax.jit, donate_argnums=0)
def _small(x):
    return x * jnp.asarray(0.02, x.dtype)


def measure_peaks(device: Any, dtype: Any, repeats: int) -> Row:
    """Measures TFLOP/s of a large matrix product and GB/s of a copy."""
    n = MATMUL.get(device.platform, 8192)
    key = jax.random.key(0, impl="rbg")
    a = random_array(key, (n, n), dtype)
    product = compile_program(lambda a, b: a @ b, a, a)
    matmul = measure_queued(lambda: product.run(a, a), repeats=repeats)
    size = jnp.dtype(dtype).itemsize
    x = jnp.ones((COPY.get(device.platform, 2**31) // size,), dtype)
    copy = compile_program(lambda x: x + 1, x)
    moved = measure_queued(lambda: copy.run(x), repeats=repeats)
    return {
        "tflops": 2 * n**3 / matmul.median_s / 1e12,
        "bandwidth_gbs": 2 * x.nbytes / moved.median_s / 1e9,
        "matmul": n,
        "copied_bytes": x.nbytes,
    }
