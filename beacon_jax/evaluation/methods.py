"""The methods: how the past of an example becomes a memory.

Every method answers from a `Memory` + what is read after it, and all methods of one run
read the same tokens, so that results differ by what the memory keeps and by nothing
else. Baselines are in `baselines/`.
"""

import copy
import re
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from beacon_jax.core.law import Law, default_window
from beacon_jax.core.memory import slot_nbytes
from beacon_jax.core.plan import adaptive_ratio
from beacon_jax.data.passkey import last_window_start
from beacon_jax.evaluation.prefill import Prefill
from beacon_jax.evaluation.reading import Rows, empty, read
from beacon_jax.inference.account import ID_NBYTES
from beacon_jax.inference.memory import Memory
from beacon_jax.inference.model import Model
from beacon_jax.model.config import ModelConfig

ADAPT = "adapt"
RECENT = "_recent"  # ends the name of a method `with_recent`
ADAPT_FUTURE = 1024  # tokens that the release's rule `adapt-1024` leaves room for


class Method:
    """How the past of an example becomes a memory. Baselines subclass this.

    Attributes:
      family: what --methods calls it.
      per_ratio: whether the family has a ratio, and so a budget of bytes.
      question_aware: whether it sees what follows the past before it decides.
      exact: whether it keeps as many slots as fit into the bytes of beacons of its
        ratio; False: it may keep fewer (a text may become shorter than it had to).
      name: unique, as in tables and file names.
      ratio: raw tokens per kept slot; "adapt" until `resolve`; None if the family has
        no ratio.
      live_ratio: ratio of the windows that are read after the past (0: no beacons).
      takes_recent: whether it can have the budget of beacons that keep the last full
        window raw, or be them.
      recent: whether it has.
      weights: hash of what it was fitted to, which its predictions depend on; "": it
        has no weights of its own.
      longest: tokens of the longest text of a run, from which memories have their
        sizes; 0: each has the size that its text needs.
      prefill: of a run, the same for all its methods; None: nothing is shared.
    """

    family: str = ""
    per_ratio: bool = False
    question_aware: bool = False
    exact: bool = True
    takes_recent: bool = False
    recent: bool = False
    weights: str = ""
    longest: int = 0
    prefill: Prefill | None = None

    def __init__(self, ratio: int | str | None = None):
        self.ratio = ratio
        self.tag = "" if ratio is None else "_adapt" if ratio == ADAPT else f"_x{ratio}"
        self.name = self.family + self.tag
        self.live_ratio = 0

    def with_recent(self) -> "Method":
        """This method at the bytes of beacons that keep the last full window raw."""
        assert self.takes_recent
        made = copy.copy(self)
        made.recent = True
        made.family = self.family + RECENT
        made.name = made.family + self.tag
        return made

    def resolve(self, model: Model, tokens: int) -> "Method":
        """Returns this method for a text of `tokens`: "adapt" becomes a number."""
        if self.ratio != ADAPT:
            return self
        made = copy.copy(self)
        made.ratio = adapted(model.config, tokens)
        made.live_ratio = made.ratio if self.live_ratio else 0
        return made

    def sized(self, longest: int, prefill: Prefill | None = None) -> "Method":
        """This method in a run whose longest text has so many tokens."""
        made = copy.copy(self)
        made.longest, made.prefill = longest, prefill
        return made

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        """The memory after `past` (whole windows of each row, maybe none).

        `following` is what will be read next. Only a method that says so in its name
        (question-aware) may look at it.
        """
        raise NotImplementedError

    def once(
        self, model: Model, rows: Rows, name: Hashable, make: Callable[[], Any]
    ) -> Any:
        """Returns what make() does; methods of a run share it by these texts and name.

        So it may depend on nothing else: not on the ratio, above all.
        """
        if self.prefill is None:
            return make()
        return self.prefill.once(model, rows, name, make)

    def kv_bytes(self, memory: Memory) -> list[int]:
        """Bytes of keys, values and ids that each row keeps of its past."""
        ids = ID_NBYTES * memory.state.window
        each = [ids if row.own is not None else 0 for row in memory.rows]
        return (memory.slots * memory.slot_nbytes + each).tolist()

    @property
    def number(self) -> int:
        """The ratio of a method that has one and is resolved."""
        assert isinstance(self.ratio, int)
        return self.ratio


def split_name(method: str) -> tuple[str, str]:
    """Family and tag ("x4", "adapt", "") of a method's name."""
    found = re.fullmatch(r"(.+)_(x\d+|adapt)", method)
    return (found[1], found[2]) if found else (method, "")


def adapted(config: ModelConfig, tokens: int) -> int:
    """Returns the ratio of a text by the release's rule `adapt-1024`.

    It is the smallest one whose memory has positions for the text and 1,024 tokens
    more, else the largest; 0 without beacons.
    """
    trained = config.beacon.ratios if config.beacon else ()
    ratios = [r for r in trained if r > 0] or [0]
    return adaptive_ratio(config, ratios, tokens, ADAPT_FUTURE)


def budget_slots(
    config: ModelConfig, tokens: int, ratio: int, recent: bool = False
) -> int:
    """Slots that beacons of this ratio make of a past of `tokens` (whole windows).

    recent: the last window is kept raw.
    """
    law = Law.of(config)
    windows = tokens // law.window
    if recent and windows:
        return law.closed(ratio, windows - 1) + law.window
    return law.closed(ratio, windows)


def fitting(slots: int, slot: int, own: int) -> int:
    """Counts the slots of `own` bytes that fit where these of `slot` bytes would."""
    return slots * slot // own if own > slot else slots


def id_nbytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of the ids that beacons keep beside a raw last window of a past."""
    window = default_window(config)
    return ID_NBYTES * window if tokens >= window else 0


def remember(
    model: Model, method: Method, past: Rows, following: Rows
) -> tuple[Memory, list[int]]:
    """Calls `Method.remember`; returns also the bytes that each row keeps.

    Methods of one ratio are compared at the bytes that its beacons take; a method that
    keeps another number is a fault of ours, hence the assertion. Slots of int8 are
    smaller than the model's own, and there are as many; of those that are larger,
    because they have a bias, there are fewer.
    """
    memory = method.remember(model, past, following)
    kept = method.kv_bytes(memory)
    if method.ratio is None:
        return memory, kept
    own, slot = memory.slot_nbytes, slot_nbytes(model.config, model.net.dtype)
    for row, held in zip(past, kept, strict=True):
        slots = budget_slots(model.config, len(row), method.number, method.recent)
        ids = id_nbytes(model.config, len(row)) if method.recent else 0
        # Sinks and low ratios may leave more slots than there are tokens to keep.
        least = min(fitting(slots, slot, own), len(row)) * own if method.exact else 0
        most = slots * (min(own, slot) if method.exact else slot) + ids
        if not least <= held <= most:
            raise AssertionError(
                f"{method.name} keeps {held:,} bytes of {len(row)} tokens; the budget "
                f"of x{method.ratio} is {most:,}."
            )
    return memory, kept


def remember_prompts(
    model: Model, method: Method, prompts: Rows
) -> tuple[Memory, list[np.ndarray], list[int]]:
    """Remembers prompts but for their last windows.

    Returns:
      the memory, the rest of each prompt, which is to be read next, and the bytes.
    """
    cuts = [last_window_start(len(row), model.window) for row in prompts]
    past = [row[:cut] for row, cut in zip(prompts, cuts, strict=True)]
    rest = [row[cut:] for row, cut in zip(prompts, cuts, strict=True)]
    memory, kept = remember(model, method, past, rest)
    return memory, rest, kept


class Incremental(Method):
    """A method whose memory grows with the text: reading on is as reading all at once.

    So a text whose every window is asked for is read once.

    Attributes:
      dtype: of keys and values; None: that of the model.
    """

    dtype: str | None = None

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        return read(
            model,
            past,
            self.live_ratio,
            longest=self.longest,
            dtype=self.dtype,
            recent=self.recent,
            wanted=False,
        )[1]


class Beacon(Incremental):
    """Activation Beacon: the past compressed window by window, as at inference."""

    family, per_ratio, takes_recent = "beacon", True, True

    def __init__(self, ratio: int | str | None = None):
        super().__init__(ratio)
        assert ratio is not None
        # Until `resolve`, any number above 0 stands for "compresses what follows".
        self.live_ratio = 1 if ratio == ADAPT else int(ratio)


class Full(Incremental):
    """Full attention: ratio 0 everywhere, nothing is dropped."""

    family = "full"

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        if self.prefill is None or self.dtype is not None:
            return super().remember(model, past, following)
        return self.prefill(model, past, self.longest)


class Int8(Full):
    """The whole past, uncompressed, in int8 (`model.quantize`).

    Its bytes and those of `BeaconInt8` are of int8 slots (a byte per element and a
    float32 scale per slot and head), whatever other methods keep; tables show them.
    """

    family, dtype = "int8", "int8"


class BeaconInt8(Beacon):
    """Beacons in int8: as many slots as beacons of this ratio, of fewer bytes."""

    family, dtype = "beacon_int8", "int8"


class WindowOnly(Method):
    """The last window alone: the past is forgotten."""

    family = "window"

    def remember(self, model: Model, past: Rows, following: Rows) -> Memory:
        return empty(model, len(past), 0, self.longest)
