"""Reports progress: lines on the console, metrics.jsonl and TensorBoard.

metrics.jsonl and TensorBoard get a line every log_every steps, counted from 0, and at
the end. The console gets the same, and between them a shorter line after the first step
and whenever 15 seconds have passed: see `Metrics.due`. Compiling is no part of any time
or speed.

A line of metrics.jsonl holds these, each as a mean since the line before:

  loss, loss_x4 ...     nats per label; see `Metrics.write`
  grad_norm, lr, skipped
  tokens_per_second     of the batches, without padding
  flops_per_second      model FLOPs (`flops.training_step`): no padding, nothing twice
  mfu                   flops_per_second / what the devices reach at best
  time_data, time_step  shares of the time, which with time_other add up to 1; see
                        `Metrics.timing`
  memory_gib            of the fullest device of this process, also memory_peak_gib and
                        memory_limit_gib
  compile_seconds       of the steps that were compiled, if any were
  seconds               since this process began to train, with compiling

What is not known (the peak of a CPU, the memory of one) is left out.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from beacon_jax.data.tally import clock
from beacon_jax.paths import write_whole
from beacon_jax.resources import has
from beacon_jax.training.console import say
from beacon_jax.training.hardware import memory_gib

LINE_SECONDS = 15.0  # the longest silence


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
        """Opens the files of a run.

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
                self._board = _Board(workdir / "tensorboard", start)
            else:
                say('no TensorBoard files: pip install "beacon_jax[tensorboard]"')
        self._steps, self._broken = steps, False
        self._shown: float | None = None
        self._result: dict[str, float] = {}
        self._rate = self._compiled = 0.0
        self._peak = peak
        self._devices = jax.local_devices() if devices is None else devices
        self._begin = self._last = time.perf_counter()
        self._pending: list[_Step] = []
        self._times: dict[str, float] = defaultdict(float)

    def add(
        self,
        plans: np.ndarray,
        tokens: int,
        values: dict[str, Any],
        *,
        flops: float | None = None,
    ) -> None:
        """Takes in one step.

        Args:
          plans: ratios of its windows [N, P], a column for each device or for all.
          tokens: of its rows, without padding.
          values: what the update returned, on the devices.
          flops: its model FLOPs (`flops.training_step`); None: not known.
        """
        self._pending.append(_Step(plans, tokens, values, flops))

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

    def compiled(self, seconds: float) -> None:
        """Takes note that the step to come was compiled, if `seconds` are more than 0.

        The time counts as nothing else.
        """
        if seconds:
            self._times["compile"] += seconds
            self._compiled = seconds

    def due(self) -> bool:
        """Tells whether the console is to get a line.

        It gets one after the first step, after one that was compiled, and after 15
        seconds without a line.
        """
        if self._shown is None or self._compiled:
            return True
        return time.perf_counter() - self._shown >= LINE_SECONDS

    def progress(self, step: int) -> None:
        """Prints the loss since the last report, the speed and the time that is left.

        It waits for the step.
        """
        losses = jax.device_get([step.values["loss"] for step in self._pending])
        now = time.perf_counter()
        busy = max(now - self._last - self._times.get("compile", 0.0), 1e-9)
        self._print(step, f"loss {np.mean(losses):.3f}", len(losses) / busy, [])

    def write(self, step: int, extra: dict[str, float]) -> dict[str, float]:
        """Writes the mean since the last report to the files, and returns it.

        loss_x4 is the mean loss of the windows whose previous window was compressed at
        ratio 4: what a beacon of that ratio is worth where it matters most.

        Raises:
          OSError: a file cannot be written.
        """
        compiling = self._times.pop("compile", 0.0)
        timed = bool(self._times)
        with self.timing("step"):
            rows = jax.device_get([step.values for step in self._pending])
        now = time.perf_counter()
        elapsed = max(now - self._last - compiling, 1e-9)
        speeds = {"tokens_per_second": sum(s.tokens for s in self._pending) / elapsed}
        flops = [s.flops for s in self._pending if s.flops is not None]
        if len(flops) == len(self._pending):
            speeds["flops_per_second"] = sum(flops) / elapsed
            if self._peak:
                speeds["mfu"] = speeds["flops_per_second"] / self._peak
        result = {
            "step": step,
            "loss": float(np.mean([row["loss"] for row in rows])),
            **self._by_ratio(rows),
            "grad_norm": float(np.mean([row["grad_norm"] for row in rows])),
            **speeds,
            **(self._shares(elapsed) if timed else {}),
            **memory_gib(self._devices),
            **({"compile_seconds": compiling} if compiling else {}),
            "seconds": now - self._begin,
            **extra,
        }
        self._result, self._rate = result, len(self._pending) / elapsed
        self._pending, self._last = [], now
        self._times.clear()
        if self._path is not None and not self._broken:
            self._broken = True  # half of a line may be there: no other behind it
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            if self._board is not None:
                self._board.add(result)
            self._broken = False
        return result

    def show(self) -> None:
        """Prints what was written last.

        Raises:
          OutputClosed: nobody reads it.
        """
        result = self._result
        ratios = " ".join(
            f"{key[5:]} {value:.3f}"
            for key, value in result.items()
            if key.startswith("loss_x") and key != "loss_x0"
        )
        loss = f"loss {result['loss']:.3f}" + (f" ({ratios})" if ratios else "")
        parts = []
        if "flops_per_second" in result:
            utilisation = f" (MFU {result['mfu']:.1%})" if "mfu" in result else ""
            parts.append(f"{_si(result['flops_per_second'])}FLOP/s" + utilisation)
        if result.get("time_data", 0.0) >= 0.05:
            parts.append(f"data {result['time_data']:.0%}")
        if "memory_peak_gib" in result:
            limit = result.get("memory_limit_gib")
            of = f"/{limit:.1f}" if limit else ""
            parts.append(f"{result['memory_peak_gib']:.1f}{of} GiB")
        if result.get("skipped"):
            parts.append(f"skipped {result['skipped']:.0f}")
        speed = f"{result['tokens_per_second']:.0f} tok/s"
        self._print(int(result["step"]), f"{loss}  {speed}", self._rate, parts)

    def _print(self, step: int, loss: str, rate: float, parts: list[str]) -> None:
        self._shown = time.perf_counter()
        if self._path is None:
            return
        if self._compiled:
            parts = [f"compiled in {self._compiled:.1f} s", *parts]
            self._compiled = 0.0
        left = f"ETA {clock((self._steps - step) / rate)}"
        speed = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        say("  ".join([f"step {step}/{self._steps}", loss, speed, *parts, left]))

    def _by_ratio(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        sums: dict[int, float] = defaultdict(float)
        counts: dict[int, float] = defaultdict(float)
        for step, row in zip(self._pending, rows, strict=True):
            for ratio, loss, count in zip(
                step.plans[:-1].flat,
                row["window_loss"][1:].flat,
                row["window_count"][1:].flat,
                strict=True,
            ):
                sums[int(ratio)] += float(loss)
                counts[int(ratio)] += float(count)
        return {f"loss_x{r}": sums[r] / counts[r] for r in sorted(sums) if counts[r]}

    def _shares(self, elapsed: float) -> dict[str, float]:
        other = max(elapsed - sum(self._times.values()), 0.0)
        times = {**self._times, "other": self._times["other"] + other}
        return {f"time_{name}": spent / elapsed for name, spent in times.items()}

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class _Step(NamedTuple):
    """One step since the last report; see `Metrics.add`."""

    plans: np.ndarray
    tokens: int
    values: dict[str, Any]
    flops: float | None


class _Board:
    """A TensorBoard event file, written by the thread that calls.

    tensorboardX's own SummaryWriter writes in a thread that dies of a full disk, and
    then waits for it for ever. Events of steps after `start`, from a process before,
    are hidden.
    """

    def __init__(self, folder: Path, start: int):
        # The import takes 0.6 s, and only a run needs it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._proto: Any = event_pb2  # its classes are made when it is imported
        self._scalar = scalar
        self._file = EventsWriter(str(folder / "events"))
        log = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(start + 1, session_log=log)

    def add(self, values: dict[str, float]) -> None:
        """Writes the values of a step; they are on the disk when this returns.

        Raises:
          OSError: they cannot be written.
        """
        for name, value in values.items():
            if name != "step":
                self._write(int(values["step"]), summary=self._scalar(name, value))
        self._file.flush()

    def _write(self, step: int, **what: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), step=step, **what)
        self._file.write_event(event)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whoever added values was told before
            self._file.close()


def _drop_after(path: Path, step: int) -> None:
    """Removes lines of steps after `step`, and a line that a kill left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            text = line.decode()
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    write_whole(path, "".join(kept))


def _si(value: float) -> str:
    """Writes a number with three digits and the prefix of its thousands: "412 T"."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    digits = max(0, 3 - len(str(int(value))))
    return f"{value:.{digits}f} {prefixes[power]}"
