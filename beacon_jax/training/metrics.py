"""Progress line, metrics.jsonl and TensorBoard."""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np


class Metrics:
    """Collects what the steps return and reports it every now and then.

    Values stay on the device until a report, so that steps are dispatched ahead.
    """

    def __init__(self, workdir: Path, start: int, steps: int):
        from tensorboardX import SummaryWriter  # 0.6 s, and only a run needs it

        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, start)  # a resumed run says every step once
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._first, self._steps = start, steps
        self._begin = self._last = time.perf_counter()
        self._pending: list[tuple[np.ndarray, int, dict[str, Any]]] = []

    def add(self, plans: np.ndarray, tokens: int, values: dict[str, Any]) -> None:
        """One step: its plans [N, devices], its tokens, what the update returned."""
        self._pending.append((plans, tokens, values))

    def report(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Writes and prints the mean since the last report; returns it.

        loss_x4 is the mean loss of the windows whose previous window was compressed at
        ratio 4: what a beacon of that ratio is worth where it matters most.
        """
        rows = jax.device_get([values for _, _, values in self._pending])
        sums: dict[int, float] = defaultdict(float)
        counts: dict[int, float] = defaultdict(float)
        for (plans, _, _), row in zip(self._pending, rows, strict=True):
            for ratio, loss, count in zip(
                plans[:-1].flat,
                row["window_loss"][1:].flat,
                row["window_count"][1:].flat,
                strict=True,
            ):
                sums[int(ratio)] += float(loss)
                counts[int(ratio)] += float(count)
        now = time.perf_counter()
        tokens = sum(tokens for _, tokens, _ in self._pending)
        result = {
            "step": step,
            "loss": float(np.mean([row["loss"] for row in rows])),
            **{f"loss_x{r}": sums[r] / counts[r] for r in sorted(sums) if counts[r]},
            "grad_norm": float(np.mean([row["grad_norm"] for row in rows])),
            "tokens_per_second": tokens / (now - self._last),
            "seconds": now - self._begin,
            **extra,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        for key, value in result.items():
            if key != "step":
                self._board.add_scalar(key, value, step)
        rate = len(self._pending) / (now - self._last)
        ratios = " ".join(
            f"{key[5:]} {value:.3f}"
            for key, value in result.items()
            if key.startswith("loss_x") and key != "loss_x0"
        )
        print(
            f"step {step}/{self._steps}  loss {result['loss']:.3f}"
            + (f" ({ratios})" if ratios else "")
            + f"  {result['tokens_per_second']:.0f} tok/s  {rate:.1f} steps/s"
            + f"  ETA {_clock((self._steps - step) / rate)}"
            + (f"  skipped {extra['skipped']:.0f}" if extra.get("skipped") else ""),
            flush=True,
        )
        self._pending, self._last = [], now
        return result

    @property
    def pending(self) -> int:
        """Steps since the last report."""
        return len(self._pending)

    def close(self) -> None:
        self._board.close()


def _drop_after(path: Path, step: int) -> None:
    """Removes lines of steps after `step`, and a line that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(kept), encoding="utf-8")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
