"""What a run of `bench` measures, one row after the other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from beacon_jax.bench.records import Row
from beacon_jax.bench.timing import CallTime, Compiled
from beacon_jax.model.config import BeaconConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """A thing to measure: its key (JSON values), and what measures it.

    See `records.guarded`."""

    key: Row
    run: Callable[[], Row]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Says what a run measures, and how often.

    Attributes:
      preset: name of the model.
      lengths: tokens of the text.
      ratios: of the beacons; full attention is always measured beside them.
      batches: rows of the decoding.
      queries: of the kernels, tokens and beacons; empty: two kinds of window.
      memory: slots that the kernels' buffer has room for; empty: 16 windows.
      repeats: samples per row.
      dtype: of weights, activations and memory.
      device: the one that is measured.
      window: of the beacons, where it is not the preset's.
      against: other libraries that run the same weights.
    """

    preset: str
    config: ModelConfig
    lengths: Sequence[int]
    ratios: Sequence[int]
    batches: Sequence[int]
    queries: Sequence[int]
    memory: Sequence[int]
    repeats: int
    dtype: str
    device: Any
    window: int | None = None
    against: Sequence[str] = ()

    @property
    def beacon(self) -> BeaconConfig:
        """The model's beacons; every preset has some."""
        assert self.config.beacon is not None
        return self.config.beacon

    @property
    def itemsize(self) -> int:
        """Bytes of a number of `dtype`."""
        return jnp.dtype(self.dtype).itemsize

    def key(self, part: str, **rest: Any) -> Row:
        """Makes the key of a row: its part, the model, and what `rest` says."""
        if self.window is not None:
            rest = {"window": self.window, **rest}
        return {"part": part, "preset": self.preset, "dtype": self.dtype, **rest}


class Latest:
    """Keeps the last thing that was made, and drops it before it makes another.

    So weights and programs of two cases need not fit side by side.
    """

    def __init__(self):
        self._key, self._value = None, None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns what was made for `key` if that is the last, else makes it."""
        if self._value is None or key != self._key:
            self._key = self._value = None
            self._key, self._value = key, make()
        return self._value


def timed(time: CallTime, program: Compiled) -> Row:
    """Makes the fields that every row with a time has."""
    return {
        "seconds": dataclasses.asdict(time),
        "compile_s": program.seconds,
        "program_bytes": program.nbytes,
    }
