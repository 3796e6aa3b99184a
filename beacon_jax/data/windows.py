"""Cuts right-padded rows into windows, on the host."""

import numpy as np
from jaxtyping import Int


def split_windows(
    tokens: np.ndarray,
    lengths: np.ndarray | None,
    window: int,
    *,
    count: int | None = None,
    align: str = "left",
    fill: float = 0,
) -> tuple[np.ndarray, Int[np.ndarray, "N B"]]:
    """Cuts right-padded rows [B, T] into windows [N, B, W] and counts valid entries.

    Args:
      lengths: real entries per row; T if not given.
      count: N, at least the windows that the longest row needs.
      align: "left", or "right": every row's LAST window is the last one (training,
        docs/specification.md section 3), shorter rows having empty windows in front.
      fill: value of entries that no row has.

    Returns:
      windows [N, B, W] and valid [N, B], the real entries of each.
    """
    b, t = tokens.shape
    lengths = np.full(b, t, np.int32) if lengths is None else np.asarray(lengths)
    needed = -(-lengths // window)
    n = int(needed.max(initial=1)) if count is None else count
    if n < needed.max(initial=0):
        raise ValueError(
            f"count={count} windows are too few: the longest row needs {needed.max()}."
        )
    out = np.full((b, n * window), fill, tokens.dtype)
    valid = np.zeros((b, n), np.int32)
    for row in range(b):
        skip = n - needed[row] if align == "right" else 0
        out[row, skip * window :][: lengths[row]] = tokens[row, : lengths[row]]
        valid[row] = np.clip(lengths[row] - window * (np.arange(n) - skip), 0, window)
        valid[row, :skip] = 0
    return out.reshape(b, n, window).transpose(1, 0, 2), valid.T
