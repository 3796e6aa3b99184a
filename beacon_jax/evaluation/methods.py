"""The model under evaluation, and the methods: how a past becomes a memory.

Every method answers from `MemoryState` + the last window, and all methods of one run
read the same tokens, so that results differ by what the memory keeps and nothing else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax.core import loop, windows
from beacon_jax.core.memory import MemoryState, init_memory
from beacon_jax.hf.checkpoint import Checkpoint, load, load_tokenizer
from beacon_jax.model.config import BeaconConfig, ModelConfig, check_ratio

Rows = Sequence[np.ndarray]  # one int32 [n] per row, lengths may differ


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint with the shapes of this run.

    Attributes:
      config: always with a `beacon` part, because that holds the window.
      longest: largest number of raw tokens of an example, generated ones included.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    variables: dict[str, Any]
    tokenizer: Any
    longest: int

    @property
    def window(self) -> int:
        assert self.config.beacon is not None
        return self.config.beacon.window

    @property
    def dtype(self) -> np.dtype:
        """Of the parameters, and so of the computation and of the memory."""
        return self.variables["params"]["embed"]["embedding"].dtype

    def new_memory(self, batch: int, ratio: int) -> MemoryState:
        """An empty memory with room for `longest` tokens at this ratio."""
        slots = windows.capacity(self.config, self.plan(ratio))
        return init_memory(self.config, batch, slots, self.dtype)

    def feed(
        self,
        memory: MemoryState,
        rows: Rows,
        ratio: int,
        *,
        outputs: str = "last",
        labels: Rows | None = None,
    ) -> tuple[loop.FeedOutput, MemoryState]:
        """Feeds each row's next tokens; the windows that begin now have `ratio`.

        Rows are padded to one window or, if they are longer, to `longest`: two
        compiled programs per ratio for all lengths and tasks.
        """
        lengths = np.asarray([len(row) for row in rows], np.int32)
        size = self.window if lengths.max() <= self.window else self._padded
        return loop.feed(
            self.config,
            self.variables,
            memory,
            jnp.asarray(_pad(rows, size, 0)),
            jnp.asarray(lengths),
            jnp.asarray(self.plan(ratio)),
            outputs=outputs,
            labels=None if labels is None else jnp.asarray(_pad(labels, size, -100)),
            dtype=self.dtype,
        )

    def decode(
        self, memory: MemoryState, logits: jax.Array, steps: int, ratio: int
    ) -> np.ndarray:
        """Greedy tokens [B, steps]; `logits` [B, V] are those of the prompt's end."""
        plan, active = jnp.asarray(self.plan(ratio)), jnp.ones(len(logits), bool)
        tokens = [jnp.argmax(logits, axis=-1).astype(jnp.int32)]
        for _ in range(steps - 1):
            logits, memory = loop.decode_step(
                self.config,
                self.variables,
                memory,
                tokens[-1],
                plan,
                active,
                static=(ratio,),
                dtype=self.dtype,
            )
            tokens.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        return np.stack([np.asarray(t) for t in tokens], axis=1)

    def plan(self, ratio: int) -> np.ndarray:
        """int32 [P], the ratio of every window of a sequence."""
        return np.full(self._padded // self.window + 1, ratio, np.int32)

    @property
    def _padded(self) -> int:
        return -(-self.longest // self.window) * self.window


def load_model(
    path: str,
    longest: int,
    ratios: Sequence[int],
    *,
    window: int | None = None,
    dtype: str | None = None,
) -> Model:
    """Reads a checkpoint for evaluation.

    Args:
      ratios: ratios > 0 that beacons will be asked for (they need not be those of the
        config, which is how unseen ratios are measured).
      window: for a model without beacons only, which has no window of its own.

    Raises:
      ValueError: beacons asked of a model that has none, or a window of one that does.
    """
    found = load(path, dtype=dtype)
    if found.config.beacon is None:
        if ratios:
            raise ValueError(
                f"--model={path} has no beacons: train some, or use "
                "--methods=full,window."
            )
        if not window:
            raise ValueError(
                f"--model={path} has no beacons and so no window: name one, for "
                "example --window=64."
            )
        found = load(
            path, dtype=dtype, beacon=BeaconConfig(window=window, ratios=(window,))
        )
    elif window and window != found.config.beacon.window:
        raise ValueError(
            f"--window={window} differs from the {found.config.beacon.window} that "
            f"the beacons of --model={path} were trained with: leave it out."
        )
    assert found.config.beacon is not None
    for ratio in ratios:
        check_ratio(ratio, found.config.beacon.window)
    variables = jax.tree.map(jnp.asarray, found.variables)
    return Model(found, found.config, variables, load_tokenizer(path), longest)


class Method:
    """How the past of an example becomes a memory. Baselines subclass this.

    Attributes:
      name: unique, as in tables and file names.
      family: what --methods calls it.
      ratio: raw tokens per kept slot; None if the family has no ratio.
      live_ratio: ratio of the windows that are fed after the past (0: no beacons).
    """

    family: str = ""
    per_ratio: bool = False

    def __init__(self, ratio: int | None = None):
        self.ratio = ratio
        self.name = self.family if ratio is None else f"{self.family}_x{ratio}"
        self.live_ratio = 0

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        """The memory after `past` (whole windows, B rows).

        `following` is what will be fed next. Only a method that says so in its name
        (question-aware) may look at it.
        """
        raise NotImplementedError

    def kv_bytes(self, memory: MemoryState) -> list[int]:
        """Bytes of keys and values that each row keeps of its past."""
        return [int(n) * memory.slot_nbytes for n in np.asarray(memory.slots)]


class Beacon(Method):
    """Activation Beacon: the past compressed window by window, as at inference."""

    family, per_ratio = "beacon", True

    def __init__(self, ratio: int | None = None):
        super().__init__(ratio)
        assert ratio is not None
        self.live_ratio = ratio

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        memory = model.new_memory(len(past), self.live_ratio)
        return model.feed(memory, past, self.live_ratio)[1]


class Full(Method):
    """Full attention: ratio 0 everywhere, nothing is dropped."""

    family = "full"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        return model.feed(model.new_memory(len(past), 0), past, 0)[1]


class Window(Method):
    """The last window alone: the past is forgotten."""

    family = "window"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        return model.new_memory(len(past), 0)


FAMILIES: dict[str, Callable[..., Method]] = {
    m.family: m for m in (Beacon, Full, Window)
}


def make_methods(names: Sequence[str], ratios: Sequence[int]) -> list[Method]:
    """The methods of --methods; those with a ratio once per ratio.

    Raises:
      ValueError: an unknown name, or a method that needs ratios and gets none.
    """
    made: list[Method] = []
    for name in names:
        if name not in FAMILIES:
            raise ValueError(
                f"--methods names {name!r}; known are {', '.join(sorted(FAMILIES))}."
            )
        family: Any = FAMILIES[name]
        if family.per_ratio and not ratios:
            raise ValueError(f"--methods={name} needs --ratios, for example 2,4,8.")
        made += [family(r) for r in ratios] if family.per_ratio else [family()]
    return made


def _pad(rows: Rows, size: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), size), fill, np.int32)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return out
