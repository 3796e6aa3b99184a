"""The methods: how the past of an example becomes a memory.

Every method answers from `MemoryState` + what is fed after it, and all methods of one
run read the same tokens, so that results differ by what the memory keeps and by nothing
else. Baselines are in `baselines/`, one file each.
"""

import copy

import numpy as np

from beacon_jax.core import windows
from beacon_jax.core.memory import MemoryState, slot_nbytes
from beacon_jax.evaluation.model import Model, Rows
from beacon_jax.model.config import ModelConfig

ADAPT = "adapt"
ADAPT_FUTURE = 1024  # tokens that the release's rule `adapt-1024` leaves room for


class Method:
    """How the past of an example becomes a memory. Baselines subclass this.

    Attributes:
      family: what --methods calls it.
      per_ratio: whether the family has a ratio, and so a budget of bytes.
      question_aware: whether it sees what follows the past before it decides.
      exact_bytes: whether it keeps exactly the bytes of the budget; False: no more than
        them (a text may become shorter than it had to, int8 slots are smaller).
      name: unique, as in tables and file names.
      ratio: raw tokens per kept slot; "adapt" until `resolve`; None if the family has
        no ratio.
      live_ratio: ratio of the windows that are fed after the past (0: no beacons).
    """

    family: str = ""
    per_ratio: bool = False
    question_aware: bool = False
    exact_bytes: bool = True

    def __init__(self, ratio: int | str | None = None):
        self.ratio = ratio
        tag = "" if ratio is None else "_adapt" if ratio == ADAPT else f"_x{ratio}"
        self.name = self.family + tag
        self.live_ratio = 0

    def resolve(self, model: Model, tokens: int) -> "Method":
        """This method for a text of `tokens`: with a number where the ratio is "adapt".

        The release's rule: the smallest ratio whose memory has positions for the text
        and 1024 tokens more, else the largest.
        """
        if self.ratio != ADAPT:
            return self
        assert model.config.beacon is not None
        ratios = [r for r in model.config.beacon.ratios if r > 0]
        made = copy.copy(self)
        made.ratio = windows.adaptive_ratio(model.config, ratios, tokens, ADAPT_FUTURE)
        made.live_ratio = made.ratio if self.live_ratio else 0
        return made

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        """The memory after `past` (whole windows of each row, maybe none).

        `following` is what will be fed next. Only a method that says so in its name
        (question-aware) may look at it.
        """
        raise NotImplementedError

    def kv_bytes(self, memory: MemoryState) -> list[int]:
        """Bytes of keys and values that each row keeps of its past."""
        return [int(n) * memory.slot_nbytes for n in np.asarray(memory.slots)]

    @property
    def number(self) -> int:
        """The ratio of a method that has one and is resolved."""
        assert isinstance(self.ratio, int)
        return self.ratio


def budget_slots(config: ModelConfig, tokens: int, ratio: int) -> int:
    """Slots that beacons of this ratio make of a past of `tokens` (whole windows)."""
    assert config.beacon is not None
    sink = config.beacon.sink if tokens else 0
    return tokens // ratio + sink


def remember(
    model: Model, method: Method, past: Rows, following: Rows
) -> tuple[MemoryState, list[int]]:
    """`Method.remember`, and the bytes that each row keeps of its past.

    Methods of one ratio are compared at the bytes that its beacons take; a method that
    keeps another number is a fault of ours, hence the assertion.
    """
    memory = method.remember(model, past, following)
    kept = method.kv_bytes(memory)
    if method.ratio is None:
        return memory, kept
    slot = slot_nbytes(model.config, model.dtype)
    for row, held in zip(past, kept, strict=True):
        slots = budget_slots(model.config, len(row), method.number)
        # Sinks and low ratios may leave more slots than there are tokens to keep.
        least = min(slots, len(row)) * slot if method.exact_bytes else 0
        if not least <= held <= slots * slot:
            raise AssertionError(
                f"{method.name} keeps {held:,} bytes of {len(row)} tokens; the budget "
                f"of x{method.ratio} is {slots * slot:,}."
            )
    return memory, kept


class Beacon(Method):
    """Activation Beacon: the past compressed window by window, as at inference."""

    family, per_ratio = "beacon", True

    def __init__(self, ratio: int | str | None = None):
        super().__init__(ratio)
        assert ratio is not None
        # Until `resolve`, any number above 0 stands for "compresses what follows".
        self.live_ratio = 1 if ratio == ADAPT else int(ratio)

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        memory = model.new_memory(len(past), self.number)
        return feed_past(model, memory, past, self.number)


class Full(Method):
    """Full attention: ratio 0 everywhere, nothing is dropped."""

    family = "full"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        return feed_past(model, model.new_memory(len(past), 0), past, 0)


class Window(Method):
    """The last window alone: the past is forgotten."""

    family = "window"

    def remember(self, model: Model, past: Rows, following: Rows) -> MemoryState:
        return model.new_memory(len(past), 0)


def feed_past(model: Model, memory: MemoryState, past: Rows, ratio: int) -> MemoryState:
    """The memory after `past`; rows without a past stay as they are."""
    if not max(map(len, past), default=0):
        return memory
    return model.feed(memory, past, ratio)[1]
