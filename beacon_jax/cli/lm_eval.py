"""Runs lm-evaluation-harness against a compressed model, by its own command line.

Every flag is lm_eval's; its --model_args are those of `evaluation.lm_eval.BeaconLM`
(pretrained, beacons, ratio, recent, batch_size, max_length, dtype, mesh, ...). Needs
the extra: pip install "beacon_jax[lm-eval]".

Example:
  beacon-jax lm_eval --model beacon_jax --tasks arc_easy,boolq --batch_size 8 \\
    --model_args pretrained=DIR,ratio=8
"""

import importlib
import sys

from beacon_jax import runtime
from beacon_jax.progress import Progress
from beacon_jax.resources import has, require


def main() -> None:
    """Runs lm_eval with the arguments of this process."""
    if not has("lm_eval") and {"--help", "-h"} & set(sys.argv):
        return print(__doc__)
    try:
        require("lm_eval", extra="lm-eval", for_="beacon-jax lm_eval")
    except ImportError as error:
        sys.exit(f"error: {error}")
    with Progress().stage("loading lm_eval"):
        runtime.for_command()
        importlib.import_module("beacon_jax.evaluation.lm_eval")  # registers the model
        command = importlib.import_module("lm_eval.__main__")
    command.cli_evaluate()
