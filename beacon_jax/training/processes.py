"""Several processes as one run: who writes, who waits, and that all do the same."""

import hashlib
import json
import os
import signal
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Joins the processes of this run; every one of them calls it first.

    Clusters that jax knows (Slurm, Open MPI, TPU, GKE) need nothing else. Elsewhere
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID")
    )


def is_lead() -> bool:
    """Whether this process prints, and writes what one process has to write."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Arrays that may be spread over processes, whole, on every host."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def check_agreement(what: str, value: Any) -> None:
    """ValueError unless all processes hold the same JSON value.

    Ratio plans above all: a step's branch has to be the same on every device that
    shares its parameters, else collectives meet others and the run hangs.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
    own = np.frombuffer(digest, np.uint8)
    others = np.asarray(multihost_utils.process_allgather(own))
    differ = [i for i, other in enumerate(others) if (other != others[0]).any()]
    if differ:
        raise ValueError(
            f"processes {differ} have another {what} than process 0: start all of them "
            "with the same command, files and versions."
        )


class Signals:
    """Notes SIGTERM and SIGINT instead of dying; a second one of them kills.

    With several processes SIGTERM belongs to jax's preemption service, which makes all
    of them stop at the same step.
    """

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self):
        self._old = {}
        numbers = [signal.SIGINT]
        if jax.process_count() == 1:
            numbers.append(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                self._old[number] = signal.signal(number, self._note)
        return self

    def after(self, step: int) -> signal.Signals | None:
        """The signal because of which the run ends after this step, if any."""
        if jax.process_count() == 1:
            return self.received
        stop = multihost_utils.reached_preemption_sync_point(step)
        return signal.SIGTERM if stop else None

    def _note(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
