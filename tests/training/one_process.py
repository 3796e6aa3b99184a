"""python -m tests.training.one_process CONFIG.json WORKDIR: one process of a run."""

import json
import os
import sys

from ml_collections import ConfigDict

from beacon_jax.training import processes
from beacon_jax.training.trainer import train


def main(config: str, workdir: str) -> None:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        processes.start()
    with open(config, encoding="utf-8") as file:
        settings = json.load(file)
    try:
        train(ConfigDict(settings), workdir)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
