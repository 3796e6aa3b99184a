"""Looks at the values of weights while they are read, for what no good file has.

A file whose end was never written has the right size and zeros there. Values that are
not finite, or too large for a dtype that they are cast to, make every logit NaN.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

MOST_NAMED = 3


class Values:
    """What was seen of the tensors of a folder or file; `say` says it."""

    def __init__(self, where: Path):
        self._where = where
        self._zero: dict[str, None] = {}  # names, each once
        self._no_number: dict[str, None] = {}

    def cast(
        self, name: str, pieces: Iterable[np.ndarray], dtype: np.dtype
    ) -> Iterator[np.ndarray]:
        """Casts one tensor, piece by piece.

        Raises:
          ValueError: a finite value is infinite in `dtype`.
        """
        zero = number = True
        for piece in pieces:
            zero = zero and not _any(piece)
            with np.errstate(over="ignore"):  # that is the error below
                made = piece.astype(dtype, copy=False)
            if not finite(made):
                if finite(piece):
                    largest = float(np.abs(piece.astype(np.float64)).max())
                    raise ValueError(
                        f"{self._where}: tensor {name} has a value of size "
                        f"{largest:g}, beyond the largest of {dtype.name}: use dtype "
                        f"float32{' or bfloat16' if largest < 3e38 else ''}."
                    )
                number = False
            yield made
        # A bias may be zero, and B of low-rank beacons begins so.
        if zero and not re.search(r"bias\b|lora_b\b", name, re.IGNORECASE):
            self._zero[name] = None
        if not number:
            self._no_number[name] = None

    def say(self) -> None:
        """Names in a line of warning each the tensors that no good file has."""
        for names, what in (
            (self._zero, "zero from end to end"),
            (self._no_number, "not finite (NaN or infinity) in places"),
        ):
            if names:
                more = len(names) - MOST_NAMED
                logger.warning(
                    "%s: %s%s %s %s. The file seems to be damaged: compare it with its "
                    "source, or fetch it again.",
                    *(self._where, ", ".join([*names][:MOST_NAMED])),
                    f" and {more} more" if more > 0 else "",
                    *("are" if len(names) > 1 else "is", what),
                )
            names.clear()


def finite(values: np.ndarray) -> bool:
    """Tells whether all values of a floating-point array are finite.

    Read as integers, infinity and NaN are the largest of both signs: 0.15 s for 1 GiB
    of bfloat16 on one core, where np.isfinite takes 1.6.
    """
    if not values.size:
        return True
    if not values.flags.c_contiguous or values.dtype.itemsize not in (2, 4):
        return bool(np.isfinite(values).all())
    bits, kind = values.dtype.itemsize * 8, values.dtype.itemsize
    infinity = int(np.array(np.inf, values.dtype).view(f"u{kind}"))
    signed, unsigned = values.view(f"i{kind}"), values.view(f"u{kind}")
    return bool(signed.max() < infinity and unsigned.max() < infinity + (1 << bits - 1))


def _any(values: np.ndarray) -> bool:
    """Tells whether a value is not 0; mostly the first are not."""
    flat = values.reshape(-1)
    return bool(flat[:64].any() or flat.any())
