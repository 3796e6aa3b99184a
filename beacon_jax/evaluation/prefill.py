"""What full attention makes of a batch, once for all methods that start from it.

Every method and ratio answers a batch before the next batch begins (`runner.together`).
So the past of a row is read once at ratio 0, and each of them compresses a copy. What
it asks the model for its scores is asked once for all ratios, too. Results are those of
methods that run alone, bit for bit: it is the same program on the same numbers.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from beacon_jax.compiling import Stopwatch
from beacon_jax.evaluation import reading
from beacon_jax.evaluation.peak import Meter
from beacon_jax.evaluation.reading import Rows
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.inference.room import free_slots


class Prefill:
    """Texts as full attention reads them, and what was asked about them.

    The last texts that were asked for are kept, if the device has room for a second
    memory of that size.

    Attributes:
      saved: seconds that answers from what was kept would have taken since `begin`.
    """

    def __init__(self) -> None:
        self._kept: tuple[Model, Any, Memory] | None = None
        self._seen: tuple[Any, dict[Hashable, tuple[Any, float, int]]] = (), {}
        self._read = 0.0, 0  # seconds and bytes that reading the last texts took
        self._meter, self._peak, self._lent = Meter(), 0, False
        self.saved = 0.0

    def begin(self) -> None:
        """Begins a batch of one method."""
        self.saved, self._peak, self._lent = 0.0, 0, False
        self._meter.begin(self._held)

    def peak(self) -> int | None:
        """Returns the most bytes that the method's batch had in use; None: not known.

        They are those that it takes alone, beside the weights: what is kept for others
        does not count, and what another method has read or asked does.
        """
        found = max(self._peak, self._own())
        return found or None

    def __call__(self, model: Model, rows: Rows, longest: int) -> Memory:
        """Returns the memory of `rows`, as `read` at ratio 0 does. Donate it never."""
        self._lent = True
        return self._memory(model, rows, longest)

    def copy(self, model: Model, rows: Rows, longest: int) -> Memory:
        """Returns a memory of `rows` that is the caller's own, to be donated."""
        memory = self._memory(model, rows, longest)
        if self._kept is None:  # no room for a second one, which nobody else has then
            return memory
        return dataclasses.replace(memory, state=jax.tree.map(jnp.copy, memory.state))

    def once(
        self, model: Model, rows: Rows, name: Hashable, make: Callable[[], Any]
    ) -> Any:
        """Returns what make() does, which is called once for the same texts."""
        asked = id(model), *(row.tobytes() for row in rows)
        if self._seen[0] != asked:
            self._seen = asked, {}
        found = self._seen[1]
        if name in found:
            made, seconds, peak = found[name]
            self.saved += seconds
            self._peak = max(self._peak, peak)
            return made
        self._peak = max(self._peak, self._own())
        self._meter.restart()
        watch = Stopwatch()
        made = jax.block_until_ready(make())
        found[name] = made, watch.read()[0], self._own()
        self._peak = max(self._peak, found[name][2])
        return made

    def _memory(self, model: Model, rows: Rows, longest: int) -> Memory:
        asked = longest, [row.tobytes() for row in rows]
        if self._kept is not None:
            of, texts, memory = self._kept
            if of is model and texts == asked:
                self.saved += self._read[0]
                self._peak = max(self._peak, self._read[1])
                return memory
        self._kept = None
        self._meter.restart()
        watch = Stopwatch()
        memory = reading.read(model, rows, 0, longest=longest, wanted=False)[1]
        jax.block_until_ready(memory.state)
        self._read = watch.read()[0], self._meter.highest()
        self._peak = max(self._peak, self._read[1])
        free = free_slots(model, len(rows), memory.dtype)
        if free is None or 2 * memory.capacity <= free:
            self._kept = model, asked, memory
        return memory

    @property
    def _held(self) -> int:
        """The bytes that are kept for other methods."""
        return 0 if self._kept is None else self._kept[2].nbytes

    def _own(self) -> int:
        """The most bytes since the meter was restarted, without others' memory."""
        return max(self._meter.highest() - (0 if self._lent else self._held), 0)
