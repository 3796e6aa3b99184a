"""Progress line, metrics.jsonl and TensorBoard.

What a line of metrics.jsonl holds, each as a mean since the line before:

  loss, loss_x4 ...     nats per label; see `Metrics.report`
  grad_norm, lr, skipped
  tokens_per_second     of the batches, without padding
  flops_per_second      model FLOPs (`model.flops`): no padding, nothing twice
  mfu                   flops_per_second / what the devices reach at best
  time_data, time_step  shares of the time, which with time_other add up to 1; see
                        `Metrics.timing`
  memory_gib            of the fullest device of this process, also memory_peak_gib and
                        memory_limit_gib
  seconds               since this process began to train

What is not known (the peak of a CPU, the memory of one) is left out.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beacon_jax.resources import has
from beacon_jax.training.hardware import memory_gib


class Metrics:
    """Collects what the steps return and reports it every now and then.

    Values stay on the device until a report, so that steps are dispatched ahead.
    """

    def __init__(
        self,
        workdir: Path | None,
        start: int,
        steps: int,
        *,
        peak: float | None = None,
        devices: Sequence[Any] | None = None,
    ):
        """
        Args:
          workdir: of the run; None to write and print nothing, as all processes of a
            run but the first do.
          start: steps done before this process.
          steps: of the whole run.
          peak: FLOP/s of all devices together (`hardware.peak_flops`), for the MFU.
          devices: whose memory is reported; this process's by default.
        """
        self._path = self._board = None
        if workdir is not None:
            self._path = workdir / "metrics.jsonl"
            _drop_after(self._path, start)  # a resumed run says every step once
            if has("tensorboardX"):
                from tensorboardX import SummaryWriter  # 0.6 s, and only a run needs it

                folder = str(workdir / "tensorboard")
                self._board = SummaryWriter(folder, purge_step=start + 1)
            else:
                print('no TensorBoard files: pip install "beacon_jax[tensorboard]"')
        self._first, self._steps = start, steps
        self._peak = peak
        self._devices = jax.local_devices() if devices is None else devices
        self._begin = self._last = time.perf_counter()
        self._pending: list[tuple[np.ndarray, int, dict[str, Any]]] = []
        self._flops, self._counted = 0.0, 0
        self._times: dict[str, float] = defaultdict(float)

    def add(
        self,
        plans: np.ndarray,
        tokens: int,
        values: dict[str, Any],
        *,
        flops: float | None = None,
    ) -> None:
        """One step: its plans [N, devices], its tokens, what the update returned and
        its model FLOPs (`model.flops.training_step`)."""
        self._pending.append((plans, tokens, values))
        if flops is not None:
            self._flops += flops
            self._counted += 1

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Counts the time of its body as `name`; the rest of the time is "other".

        This is the time of the host's thread: "data" draws and sends batches while the
        devices work on steps dispatched before, "step" dispatches and, in a report,
        waits for them. Devices that starve show as much "data" and little "step".
        Bodies must not be nested; a report counts its own waiting.
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            self._times[name] += time.perf_counter() - began

    def report(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Writes and prints the mean since the last report; returns it.

        loss_x4 is the mean loss of the windows whose previous window was compressed at
        ratio 4: what a beacon of that ratio is worth where it matters most.
        """
        timed = bool(self._times)
        with self.timing("step"):
            rows = jax.device_get([values for _, _, values in self._pending])
        now = time.perf_counter()
        elapsed = now - self._last
        tokens = sum(tokens for _, tokens, _ in self._pending)
        result = {
            "step": step,
            "loss": float(np.mean([row["loss"] for row in rows])),
            **self._by_ratio(rows),
            "grad_norm": float(np.mean([row["grad_norm"] for row in rows])),
            "tokens_per_second": tokens / elapsed,
            **self._speed(elapsed),
            **(self._shares(elapsed) if timed else {}),
            **memory_gib(self._devices),
            "seconds": now - self._begin,
            **extra,
        }
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            for key, value in result.items():
                if self._board is not None and key != "step":
                    self._board.add_scalar(key, value, step)
            print(self._line(result, len(self._pending) / elapsed), flush=True)
        self._pending, self._last = [], now
        self._flops, self._counted = 0.0, 0
        self._times.clear()
        return result

    def _by_ratio(self, rows: list[dict[str, Any]]) -> dict[str, float]:
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
        return {f"loss_x{r}": sums[r] / counts[r] for r in sorted(sums) if counts[r]}

    def _speed(self, elapsed: float) -> dict[str, float]:
        if not self._pending or self._counted < len(self._pending):
            return {}
        speed = self._flops / elapsed
        return {
            "flops_per_second": speed,
            **({"mfu": speed / self._peak} if self._peak else {}),
        }

    def _shares(self, elapsed: float) -> dict[str, float]:
        other = max(elapsed - sum(self._times.values()), 0.0)
        times = {**self._times, "other": self._times["other"] + other}
        return {f"time_{name}": spent / elapsed for name, spent in times.items()}

    def _line(self, result: dict[str, float], rate: float) -> str:
        step = int(result["step"])
        ratios = " ".join(
            f"{key[5:]} {value:.3f}"
            for key, value in result.items()
            if key.startswith("loss_x") and key != "loss_x0"
        )
        parts = [
            f"step {step}/{self._steps}",
            f"loss {result['loss']:.3f}" + (f" ({ratios})" if ratios else ""),
            f"{result['tokens_per_second']:.0f} tok/s",
            f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step",
        ]
        if "flops_per_second" in result:
            utilisation = f" (MFU {result['mfu']:.1%})" if "mfu" in result else ""
            parts.append(f"{_si(result['flops_per_second'])}FLOP/s" + utilisation)
        if result.get("time_data", 0.0) >= 0.05:
            parts.append(f"data {result['time_data']:.0%}")
        if "memory_peak_gib" in result:
            limit = result.get("memory_limit_gib")
            parts.append(
                f"{result['memory_peak_gib']:.1f}"
                + (f"/{limit:.1f}" if limit else "")
                + " GiB"
            )
        parts.append(f"ETA {_clock((self._steps - step) / rate)}")
        if result.get("skipped"):
            parts.append(f"skipped {result['skipped']:.0f}")
        return "  ".join(parts)

    @property
    def pending(self) -> int:
        """Steps since the last report."""
        return len(self._pending)

    def close(self) -> None:
        if self._board is not None:
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


def _si(value: float) -> str:
    """A number with three digits and the prefix of its thousands: "412 T"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f} {prefixes[power]}"
