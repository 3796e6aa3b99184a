"""Peaks of accelerators, as published, and of processors, as measured.

The sources are NVIDIA's data sheets (data center cards), its Ada and GA102 whitepapers
(RTX) and Google Cloud's TPU documentation ("peak compute per chip"). H20 and H800 have
no public sheet: theirs are what resellers quote. NVIDIA prints most rates "with
sparsity"; these are dense, half of that.
"""

import dataclasses
import re
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from beacon_jax import host


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device.

    Attributes:
      tflops: dense bf16 matrix products with float32 accumulation, TFLOP/s; fp16 on
        chips without bf16 units (V100, T4).
      bandwidth: of the device's memory, GB/s.
      memory: GB as printed, about the GiB that the device reports.
    """

    tflops: float
    bandwidth: float
    memory: float


# Words that the device kind has, most specific first. "NVIDIA A100-SXM4-80GB" has the
# words nvidia, a100, sxm4 and 80gb.
CHIPS: tuple[tuple[str, Chip], ...] = (
    ("B200", Chip(2250, 8000, 180)),
    ("GB200", Chip(2500, 8000, 186)),
    ("GH200 144G", Chip(989.5, 4900, 144)),
    ("GH200", Chip(989.5, 4000, 96)),
    ("H200 NVL", Chip(835.5, 4800, 141)),
    ("H200", Chip(989.5, 4800, 141)),
    ("H100 PCIe", Chip(756, 2000, 80)),
    ("H100 NVL", Chip(835.5, 3900, 94)),
    ("H100", Chip(989.5, 3350, 80)),
    ("H800 PCIe", Chip(756, 2000, 80)),
    ("H800", Chip(989.5, 3350, 80)),
    ("H20", Chip(148, 4000, 96)),
    ("A100 80GB PCIe", Chip(312, 1935, 80)),
    ("A100 80GB", Chip(312, 2039, 80)),
    ("A100", Chip(312, 1555, 40)),
    ("A800 80GB PCIe", Chip(312, 1935, 80)),
    ("A800 80GB", Chip(312, 2039, 80)),
    ("A800", Chip(312, 1555, 40)),
    ("A40", Chip(149.7, 696, 48)),
    ("A30", Chip(165, 933, 24)),
    ("A10", Chip(125, 600, 24)),
    ("L40S", Chip(362, 864, 48)),
    ("L40", Chip(181, 864, 48)),
    ("L4", Chip(121, 300, 24)),
    ("RTX 4090 D", Chip(147.1, 1008, 24)),
    ("RTX 4090", Chip(165.2, 1008, 24)),
    ("RTX 3090 Ti", Chip(80, 1008, 24)),
    ("RTX 3090", Chip(71, 936, 24)),
    ("V100 PCIe", Chip(112, 900, 16)),
    ("V100 32GB", Chip(125, 900, 32)),
    ("V100", Chip(125, 900, 16)),
    ("T4", Chip(65, 320, 16)),
    # A v3 and a v7 chip are two devices each.
    ("TPU7x", Chip(2307 / 2, 7380 / 2, 96)),
    ("TPU v6e", Chip(918, 1638, 32)),
    ("TPU v6 lite", Chip(918, 1638, 32)),
    ("TPU v5e", Chip(197, 819, 16)),
    ("TPU v5 lite", Chip(197, 819, 16)),
    ("TPU v5p", Chip(459, 2765, 95)),
    ("TPU v5", Chip(459, 2765, 95)),
    ("TPU v4", Chip(275, 1200, 32)),
    ("TPU v3", Chip(123 / 2, 900 / 2, 16)),
)
# Namesakes: a slice of a chip, a slower one, one that is no v4.
_OTHERS = {"mig", "laptop", "v4 lite"}


CPU_DTYPES = ("float32", "bfloat16")
# Steps in bfloat16 took 1.45 times as long in float32 on a CPU whose products are 1.8
# times as fast in bfloat16 (AVX512-BF16), and 1.5 times where these are 4 times (AMX).
WORTH = 1.5


def find_chip(kind: str) -> Chip | None:
    """Finds the peaks of a `device_kind`; None: not in the table (a CPU, say)."""
    words = _words(kind)
    if any(_words(other) <= words for other in _OTHERS):
        return None
    return next((chip for name, chip in CHIPS if _words(name) <= words), None)


def peak_flops(devices: Iterable[Any], tflops: float = 0.0) -> float | None:
    """Returns the FLOP/s that devices reach together at best.

    Args:
      devices: jax devices, those of every process that share the work.
      tflops: TFLOP/s of one device; 0 for what the table says.

    Returns:
      None if the table does not know one of them.

    Raises:
      ValueError: a negative `tflops`.
    """
    if tflops < 0:
        raise ValueError(
            f"peak_tflops={tflops} must not be negative: give the TFLOP/s of one "
            "device, or 0 for the table of known devices."
        )
    total = 0.0
    for device in devices:
        chip = find_chip(device.device_kind)
        if not tflops and chip is None:
            return None
        total += tflops or (chip.tflops if chip else 0.0)
    return 1e12 * total or None


def fastest_dtype(device: Any, width: int, out: int) -> tuple[str, str]:
    """Returns the dtype that training is fastest in, and the reason.

    Args:
      width, out: of the products that a CPU is measured with: a model's hidden and
        intermediate size.
    """
    if device.platform == "cpu":
        slow, fast = (product_rate(device, x, width, out) for x in CPU_DTYPES)
        dtype = CPU_DTYPES[fast >= WORTH * slow]
        return dtype, f"bfloat16 products are {fast / slow:.2g} times as fast"
    capability = float(getattr(device, "compute_capability", 8.0) or 8.0)
    if capability < 8:
        return "float16", f"{device.device_kind} has no bfloat16 units"
    return "bfloat16", f"{device.device_kind} computes it fastest"


def product_rate(
    device: Any, dtype: Any, width: int, out: int, *, rows: int = 512
) -> float:
    """Measures the FLOP/s of a device in products [rows, width] x [width, out].

    The best of 20 counts.
    """
    x, w = (
        jax.device_put(jnp.ones(shape, dtype), device)
        for shape in ((rows, width), (width, out))
    )
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(x, w))
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(multiply(x, w))
        best = min(best, time.perf_counter() - began)
    return 2 * rows * width * out / best


def memory_gib(devices: Iterable[Any]) -> dict[str, float]:
    """Returns the memory of the fullest of this process's devices, in GiB.

    The keys are memory_gib (in use), memory_peak_gib (the most so far) and
    memory_limit_gib (all there is). What the platform does not tell is left out; a CPU
    tells nothing.
    """
    names = {
        "memory_gib": "bytes_in_use",
        "memory_peak_gib": "peak_bytes_in_use",
        "memory_limit_gib": "bytes_limit",
    }
    stats = [device.memory_stats() or {} for device in devices]
    return {
        name: max(s[key] for s in stats if key in s) / 2**30
        for name, key in names.items()
        if any(key in s for s in stats)
    }


def device_bytes(device: Any) -> int | None:
    """Returns the bytes a device has for arrays; None if the platform does not tell.

    For a CPU it is what this computer, or the container it runs in, has left now, for
    all CPU devices together.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    return host.free_bytes()


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))
