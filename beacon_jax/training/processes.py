"""Runs several processes as one: who writes, who waits, and that all do the same."""

import hashlib
import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Joins the processes of this run; every one of them calls it first.

    Clusters that jax knows (Slurm, Open MPI, TPU, GKE) need nothing else. Elsewhere
    JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the
    run.
    """
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID")
    )


def is_lead() -> bool:
    """Tells whether this process prints, and writes what one process has to write."""
    return jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fetch(tree: Any) -> Any:
    """Fetches arrays that may be spread over processes, whole, to every host."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def check_agreement(what: str, value: Any) -> None:
    """Raises ValueError unless all processes hold the same JSON value.

    This matters for ratio plans above all: a step's branch has to be the same on every
    device that shares its parameters. Otherwise collectives meet others and the run
    hangs.
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


def worst(value: int) -> int:
    """Returns the largest value of all processes."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.asarray(value))))
