"""What the devices hold of a server, and all that is done with it.

Every process of a server has a `Device`. Devices that belong to several processes have
to be told the same things in the same order; `followers` does that.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from beacon_jax.core.loss import Likely
from beacon_jax.core.memory import MemoryState
from beacon_jax.inference.decode import Rows
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.serving import programs
from beacon_jax.training.processes import fetch

PIECE = 256  # tokens of a text that are read at a time, or a window if that is longer


class Device:
    """The running batch, and a state for every prompt that is being read.

    Attributes:
      rows: of the batch.
      dtype: of keys and values.
    """

    def __init__(self, model: Model, rows: int, dtype: str):
        self.model, self.rows, self.dtype = model, rows, dtype
        self._states: dict[int, MemoryState] = {}
        self._logits: dict[int, jax.Array] = {}
        self._batch: programs.Batch | None = None

    def warm(self, size: int, static: tuple[int, ...], biased: bool = False) -> None:
        """Compiles the programs of one size."""
        programs.warm(self.model, self.rows, size, self.dtype, static, biased)

    # --- a prompt ----------------------------------------------------------------

    def place(self, prompt: int, memory: Memory | None, size: int) -> None:
        """Makes the state of a prompt, behind a memory, of `size` slots."""
        state = programs.placed(self.model, memory, size, self.dtype)
        self._states[prompt] = state

    def window(
        self,
        prompt: int,
        tokens: Int[np.ndarray, " n"],
        ratio: int,
        static: tuple[int, ...],
        labels: Int[np.ndarray, " n"] | None,
    ) -> Likely | None:
        """Feeds up to a window; returns how likely `labels` were, if there are any."""
        state = self._states.pop(prompt)  # it is taken over
        out, state = programs.window(self.model, state, tokens, ratio, static, labels)
        self._logits[prompt] = jax.block_until_ready(out.last_logits)
        self._states[prompt] = state
        if labels is None:
            return None
        return Likely(*(x[0, : len(tokens)] for x in fetch(out.likely)))

    def drop(self, prompt: int) -> None:
        """Forgets a prompt."""
        self._states.pop(prompt, None)
        self._logits.pop(prompt, None)

    # --- the batch ---------------------------------------------------------------

    def insert(
        self, prompt: int, row: int, seen: Bool[np.ndarray, " V"], alone: bool
    ) -> None:
        """Copies a prompt's state into a row; `alone`: all others are free."""
        state, batch = self._states[prompt], self._batch
        size, biased = state.capacity, state.biased
        if batch is not None and alone:
            same = batch.memory.capacity == size and batch.memory.biased == biased
            if not same:
                batch = self._batch = None  # gone before there is a new one
        if batch is None:
            batch = programs.empty(self.model, self.rows, size, self.dtype, biased)
        has = batch.memory
        if size > has.capacity or (biased and not has.biased):
            size = max(size, has.capacity)
            batch = programs.grown(batch, size, biased or has.biased)
        logits = self._logits[prompt]
        self._batch = programs.insert(batch, state, logits, seen, np.int32(row))

    def block(
        self,
        active: Bool[np.ndarray, " N"],
        ratios: Int[np.ndarray, "N 1"],
        asked: Rows,
        static: tuple[int, ...],
    ) -> tuple[np.ndarray, np.ndarray, Likely | None]:
        """Makes up to a block of tokens of every active row.

        Returns:
          The tokens [N, n], which rows go on [N], and how likely the tokens were, if
          `asked.told`.
        """
        assert self._batch is not None
        batch, self._batch = self._batch, None
        tokens, loop, self._batch = programs.block(
            self.model, batch, active, ratios, asked, static
        )
        likely = fetch(loop.likely) if asked.told else None
        return *fetch((tokens, loop.active)), likely

    def release(self, row: int) -> None:
        """Empties a row."""
        if self._batch is not None:
            self._batch = programs.release(self._batch, np.int32(row))

    def taken(self, row: int) -> MemoryState:
        """Copies a row to the host."""
        assert self._batch is not None
        return fetch(programs.taken(self._batch.memory, np.int32(row)))

    def reset(self) -> None:
        """Forgets everything, after an error."""
        self._states.clear()
        self._logits.clear()
        self._batch = None

    # --- texts -------------------------------------------------------------------

    def compress(
        self,
        tokens: Int[np.ndarray, " n"],
        parent: Memory | None,
        settings: dict[str, Any],
        on_note: Callable[[str], None],
        on_progress: Callable[[int, int], None],
    ) -> Memory:
        """Reads a text into a memory, which is returned on the host.

        Args:
          on_progress: called between pieces; others may use the devices meanwhile.
        """
        memory = self.model.compress(
            tokens,
            memory=None if parent is None else programs.on_device(self.model, parent),
            on_note=on_note,
            on_progress=on_progress,
            progress_windows=max(PIECE // self.model.window, 1),
            **settings,
        )
        return programs.on_host(memory)
