"""Beacons for Mistral-7B, stage 1 with the paper's settings: long documents.

python -m beacon_jax.train --config=configs/mistral_7b_pretrain.py \
  --workdir=out/mistral_7b_pretrain --config.init_from=HF_DIR --config.data.root=DIR

Trains 0.81B beacon parameters (q, k, v) on the frozen Mistral-7B-Instruct-v0.2 in
HF_DIR: windows of 2048 tokens, ratios 2 to 32 drawn per window, lr 5e-5.

Hardware: 8 GPUs of 80 GB, each holding the base. 1.0B tokens, about 16,300 steps of 8
rows. Estimate, not measured: 5.4e19 FLOPs, 14.9 hours on A100 at 40 % of 312 TFLOP/s
each.

DIR holds the release's archive; rows and estimates: beacon_jax/training/recipes.py.
configs/mistral_7b_pretrain.py:smoke takes a few tiny steps from scratch on the CPU.
"""

from beacon_jax.training import recipes
from beacon_jax.training.config import Config


def get_config(arg: str = "") -> Config:
    return recipes.pretrain("mistral-7b", arg)
