"""python -m tests.training.one_process CONFIG.json WORKDIR: one process of a run.

With ADVERSARIAL_PLANS set, the plans of a step differ as much as they can: windows and
devices take the branches of all ratios in turn.
"""

import json
import os
import sys

import numpy as np
from ml_collections import ConfigDict

from beacon_jax.training import inputs, processes, trainer


def adversarial(draw):
    """`draw_plans` with plans that differ as much as they can."""

    def plans_of(config, model, batches, step, count):
        drawn = draw(config, model, batches, step, count)
        ratios = np.asarray(model.beacon.ratios)
        plans = np.add.outer(np.arange(len(drawn)), np.arange(count)) + step
        plans = ratios[plans % len(ratios)]
        # docs/specification.md section 3 allows one window without beacons per row.
        again = (np.cumsum(plans == 0, axis=0) > 1) & (plans == 0)
        return np.where(again, ratios[1], plans).astype(drawn.dtype)

    return plans_of


def main(config: str, workdir: str) -> None:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        processes.start()
    if "ADVERSARIAL_PLANS" in os.environ:
        inputs.draw_plans = trainer.draw_plans = adversarial(inputs.draw_plans)
    with open(config, encoding="utf-8") as file:
        settings = json.load(file)
    try:
        trainer.train(ConfigDict(settings), workdir)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
