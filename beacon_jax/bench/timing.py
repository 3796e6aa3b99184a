"""Compiles once, warms up, measures several times; nothing is left running."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

# One sample lasts at least so long: a call to a small kernel takes less than the clock
# and the launch can tell.
SAMPLE_SECONDS = 0.02
MOST_CALLS = 100
# What lasts so long does not feel that it is the first call.
LONG_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class CallTime:
    """Seconds of one call: median and spread of `repeats` samples of `calls` calls."""

    median_s: float
    min_s: float
    max_s: float
    repeats: int
    calls: int = 1

    def scaled(self, share: float) -> "CallTime":
        """Returns the time of a part of the call, which is `share` of it."""
        times = (self.median_s * share, self.min_s * share, self.max_s * share)
        return CallTime(*times, self.repeats, self.calls)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      run: the program.
      seconds: of lowering and compiling it.
      nbytes: that it needs in all (arguments, results that are not in their place, and
        workspace); None: the platform does not tell.
    """

    run: Any
    seconds: float
    nbytes: int | None


def compile_program(
    function: Callable[..., Any], *args: Any, donate: Sequence[int] = ()
) -> Compiled:
    """Compiles `function` for these arguments (arrays or shapes).

    Args:
      donate: arguments whose memory the results may take.
    """
    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=tuple(donate)).lower(*args).compile()
    seconds = time.perf_counter() - start
    found: Any = program.memory_analysis()
    if found is None:
        return Compiled(program, seconds, None)
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    needed = found.argument_size_in_bytes + results + found.temp_size_in_bytes
    return Compiled(program, seconds, needed)


def seconds_of(call: Callable[[], Any]) -> float:
    """Times one call, and waits for the arrays that it returns."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(call: Callable[[], Any], *, repeats: int = 5) -> CallTime:
    """Times a call that is long enough to be timed by itself."""
    return alternately({"": lambda: seconds_of(call)}, repeats=repeats)[""]


def measure_queued(
    call: Callable[[], Any], *, repeats: int = 5, least: float = SAMPLE_SECONDS
) -> CallTime:
    """Times a short call: as many in a row as last `least` seconds, waited for once.

    Devices run calls in order, so that the time per call is that of the device as long
    as it lasts longer than a launch on the host (5 to 10 us).
    """
    sample = lambda calls: seconds_of(lambda: [call() for _ in range(calls)]) / calls
    first = sample(1)
    if first > LONG_SECONDS:  # no warm-up: it counts
        return _summary([first, *(sample(1) for _ in range(repeats - 1))])
    calls = max(1, min(math.ceil(least / max(sample(1), 1e-9)), MOST_CALLS))
    return _summary([sample(calls) for _ in range(repeats)], calls)


def _summary(samples: list[float], calls: int = 1) -> CallTime:
    median = statistics.median(samples)
    return CallTime(median, min(samples), max(samples), len(samples), calls)


def alternately(
    samplers: Mapping[str, Callable[[], float]], *, repeats: int = 5
) -> dict[str, CallTime]:
    """Times several things in turn, one sample of each and again from the first.

    So whatever else the machine does meets all of them alike.

    Args:
      samplers: by name; each measures once and returns the seconds.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for name, sample in samplers.items():
        # A warm-up, which what lasts long does not need: it counts.
        start = time.perf_counter()
        seconds = sample()
        if time.perf_counter() - start > LONG_SECONDS:
            samples[name].append(seconds)
    while any(len(found) < repeats for found in samples.values()):
        for name, sample in samplers.items():
            if len(samples[name]) < repeats:
                samples[name].append(sample())
    return {name: _summary(found) for name, found in samples.items()}
