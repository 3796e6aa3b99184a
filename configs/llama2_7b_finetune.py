"""Beacons for Llama-2-7B, stage 2 of the paper: long instructions.

python -m beacon_jax.train --config=configs/llama2_7b_finetune.py \
  --workdir=out/llama2_7b_finetune --config.data.root=DIR

Goes on from out/llama2_7b_pretrain/export, the result of configs/llama2_7b_pretrain.py
(or --config.init_from=DIR): 1.61B beacon parameters, windows of 1024 tokens, ratios 2,
4 and 8, lr 1e-5.

Hardware: 8 GPUs of 80 GB, each holding the base. 28,000 rows, 0.39B tokens, 3,500 steps
of 8 rows. Estimate, not measured: 2.2e19 FLOPs, 6.3 hours on A100 at 40 % of 312
TFLOP/s each.

DIR holds the release's archive; rows and estimates: beacon_jax/training/recipes.py.
The paper's LongBench, mean of five groups (Table 1): 41.3. Not measured here.
configs/llama2_7b_finetune.py:smoke takes a few tiny steps from scratch on the CPU.
"""

from beacon_jax.training import recipes
from beacon_jax.training.config import Config


def get_config(arg: str = "") -> Config:
    return recipes.finetune("llama2-7b", arg)
