"""Says that a model computed what is no number, and what may be the cause."""

import numpy as np
from jaxtyping import Bool


def check_finite(finite: Bool[np.ndarray, "B n"], what: str, dtype: str) -> None:
    """Raises ValueError, naming the first row, unless all of it is finite.

    Args:
      finite: what is, of each row.
      what: what was computed, "logits".
      dtype: that the model computes in.
    """
    rows = np.flatnonzero(~finite.all(axis=1))
    if not rows.size:
        return
    of = f" of row {rows[0]}" if len(finite) > 1 else ""
    damaged = "its weights, or the memory that it reads, are damaged (compare the "
    damaged += "files with those they were copied from, or fetch them again)"
    if dtype == "float16":
        damaged = "float16 ends at 65,504, and values beyond it become infinite (use "
        damaged += "dtype bfloat16 or float32), or its weights or memory are damaged"
    raise ValueError(f"the model's {what}{of} are not finite: {damaged}.")
