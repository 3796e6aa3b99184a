"""Writes scalars for TensorBoard."""

import contextlib
import time
from pathlib import Path
from typing import Any


class Board:
    """An event file, written by the thread that calls.

    tensorboardX's own SummaryWriter writes in a thread that dies of a full disk, and
    then waits for it for ever.
    """

    def __init__(self, folder: Path, start: int):
        """Opens the file.

        Args:
          folder: receives the file.
          start: events of later steps, from a process before, are hidden.

        Raises:
          OSError: the file cannot be written.
        """
        # The import takes 0.6 s, and only a run needs it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        proto: Any = event_pb2  # its classes are made when it is imported
        self._event, self._scalar = proto.Event, scalar
        self._file = EventsWriter(str(folder / "events"))
        log = proto.SessionLog(status=proto.SessionLog.START)
        self._file.write_event(
            proto.Event(wall_time=time.time(), step=start + 1, session_log=log)
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of a step; they are on the disk when this returns.

        Raises:
          OSError: they cannot be written.
        """
        for name, value in values.items():
            self._file.write_event(
                self._event(
                    wall_time=time.time(), step=step, summary=self._scalar(name, value)
                )
            )
        self._file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # whoever added values was told before
            self._file.close()
