"""lm-evaluation-harness's own command line, which knows the model `beacon_jax`.

python -m beacon_jax.evaluation.lm_eval --model beacon_jax \
  --model_args pretrained=DIR,ratio=8 --tasks arc_easy,boolq --batch_size 8
"""

import importlib


def main() -> None:
    """Runs lm_eval with the arguments of this process."""
    importlib.import_module("beacon_jax.evaluation.lm_eval")  # registers the model
    importlib.import_module("lm_eval.__main__").cli_evaluate()
