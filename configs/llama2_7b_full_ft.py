"""All weights of Llama-2-7B with full attention: the paper's Full-FT baseline.

python -m beacon_jax.train --config=configs/llama2_7b_full_ft.py \
  --workdir=out/llama2_7b_full_ft --config.init_from=HF_DIR --config.data.root=DIR

Trains Llama-2-7B-chat in HF_DIR without beacons on the rows and with the rate (1e-5) of
stage 2; more about the baseline's settings is not known. Rows of 20480 tokens lie
beyond its 4096 positions: put a rope_scaling into HF_DIR/config.json first.

Hardware: 8 GPUs of 80 GB, the weights in eight shards. 28,000 rows, 0.39B tokens, 3,500
steps of 8 rows. Estimate, not measured: 2.7e19 FLOPs, 7.5 hours on A100 at 40 % of 312
TFLOP/s each.

DIR holds the release's archive; rows and estimates: beacon_jax/training/recipes.py.
The paper's LongBench, mean of five groups (Table 1): 41.0. Not measured here.
configs/llama2_7b_full_ft.py:smoke takes a few tiny steps from scratch on the CPU.
"""

from beacon_jax.training import recipes
from beacon_jax.training.config import Config


def get_config(arg: str = "") -> Config:
    return recipes.full_ft("llama2-7b", arg)
