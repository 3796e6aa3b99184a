"""Groups and intervals. These are two-sided, 95 %, and depend on arguments only."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

Z = 1.959964  # 97.5 % quantile of the normal distribution
DRAWS = 2000  # of the bootstrap: its own error on a bound is ~3 % of the half width


type Triple = tuple[float, float, float]  # a number and its interval


def grouped[T](items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Groups items by key(item), groups and items in the order in which they come."""
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def bounds(triple: Triple) -> dict[str, float]:
    """A number and its interval as the fields of a metric."""
    return dict(zip(("value", "low", "high"), triple, strict=True))


def share(hits: Float[np.ndarray, " N"]) -> Triple:
    """The share of hits (1) among hits and misses (0), with its `wilson` interval."""
    count = int(hits.sum())
    return count / len(hits), *wilson(count, len(hits))


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927); sensible at 0 and at 1, unlike normal."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"hits={hits} of count={count} is no proportion")
    p = hits / count
    middle = p + Z * Z / (2 * count)
    half = Z * float(np.sqrt(p * (1 - p) / count + Z * Z / (4 * count * count)))
    scale = 1 + Z * Z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def mean_interval(values: Float[np.ndarray, " N"], seed: int = 0) -> Triple:
    """Mean and its bootstrap interval over sequences (the independent unit)."""
    means = _resample(np.asarray(values, np.float64)[None], seed)[0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def ratio_interval(
    above: Float[np.ndarray, " N"], below: Float[np.ndarray, " N"], seed: int = 0
) -> Triple:
    """mean(above) / mean(below) of paired sequences, with its bootstrap interval.

    nan if mean(below) is not positive: a fraction of no gap means nothing.
    """
    pair = np.stack([above, below]).astype(np.float64)
    if not pair[1].mean() > 0:
        return float("nan"), float("nan"), float("nan")
    means = _resample(pair, seed)
    usable = means[:, means[1] > 0]
    low, high = np.quantile(usable[0] / usable[1], [0.025, 0.975])
    return float(pair[0].mean() / pair[1].mean()), float(low), float(high)


def _resample(values: np.ndarray, seed: int) -> np.ndarray:
    """Means [R, DRAWS] of rows [R, N] resampled together over N."""
    count = values.shape[1]
    pick = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    return values[:, pick].mean(-1)
