"""Beacons for Qwen2-0.5B on one accelerator of 16 GB.

python -m beacon_jax.train --config=configs/qwen2_0_5b_colab.py \
  --workdir=out/qwen2_0_5b_colab --config.init_from=HF_DIR

Trains 25M beacon parameters (q, k, v) on a frozen Qwen2-0.5B (or its -Instruct) in
HF_DIR, windows of 1024 tokens, ratios 2, 4, 8, on the standard library of the running
Python with passkeys inserted, or on the text of --config.data.sources=FOLDER. Few
steps, so the rate is higher than the paper's; 2e-4 is a guess that no run has checked.

Hardware: one device of 16 GB. 16.4M tokens, 1,600 steps of 2 rows of 4096, then 8192.
Arguments and temporaries of the gradient at 2 x 8192 take 6.1 GiB (XLA's analysis of a
CPU compilation, bfloat16). configs/qwen2_0_5b_colab.py:t4 is for GPUs without bfloat16
units: float16 with a float32 residual stream, attention in XLA, and a quarter of the
steps. launch/colab_evaluate.ipynb runs either and measures the result.
Estimate, not measured: 6.6e16 FLOPs, 19 minutes on a TPU v5e at 30 % of 197 TFLOP/s;
:t4 1.7e16 FLOPs, 30 minutes on a T4 at 20 % of 65 TFLOP/s and lm_head's backward pass,
1.1e15 in float32, at 40 % of 8.1.
configs/qwen2_0_5b_colab.py:smoke takes a few tiny steps from scratch on the CPU.
"""

from beacon_jax.training import recipes
from beacon_jax.training.config import Config, stage

PRESET = "qwen2-0.5b"


def get_config(arg: str = "") -> Config:
    config = recipes.start(PRESET)
    config.beacon.window = 1024
    config.beacon.ratios = (2, 4, 8)
    config.data.sources = ("stdlib",)
    config.data.passkey_questions = 4
    t4 = arg == "t4"
    if t4:
        config.dtype = "float16"
    mix = {"text": 0.5, "passkey": 0.4, "copy": 0.1}
    config.data.stages.stage1 = stage(300 if t4 else 1200, 4096, 2, **mix)
    config.data.stages.stage2 = stage(100 if t4 else 400, 8192, 2, **mix)
    config.optimizer.lr = 2e-4
    return recipes.finish(config, PRESET, "qwen2_0_5b_colab", "" if t4 else arg)
