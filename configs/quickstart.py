"""Beacons on the tiny base model: `make quickstart`, and assets/tiny-beacon.

python -m beacon_jax.train --config=configs/quickstart.py --workdir=out/quickstart/train

Trains the 0.2M beacon parameters, the base frozen: windows of 32 tokens, a ratio of 2,
4 or 8 drawn for every window, real text with passkeys inserted, the loss of the first
window (which sees no beacon) left out.

Hardware: two CPU cores. Not measured yet; aimed at (configs/quickstart_floors.json), at
256 tokens: passkey x2 >= 85 %, x4 >= 75 %, last window at x4 >= 0.08 nats/token below
window-only.
configs/quickstart.py:long trains longer, :smoke takes a few tiny steps.
"""

from beacon_jax.training.config import Config, default_config, stage


def get_config(arg: str = "") -> Config:
    if arg not in ("", "long", "smoke"):
        raise ValueError(f"quickstart:{arg} is unknown: use :long, :smoke or nothing.")
    config = default_config()
    config.init_from = "assets/tiny-base"
    config.beacon.window = 32
    config.beacon.ratios = (2, 4, 8)
    config.loss.skip_first_window = True
    config.data.passkey_questions = 4
    config.data.answer_weight = 20.0
    # Passkeys and a high rate teach recall, short rows make it cheap; text comes back
    # quickly in the long stages at the end.
    recall = {"passkey": 0.8, "text": 0.15, "copy": 0.05}
    both = {"passkey": 0.6, "text": 0.3, "copy": 0.1}
    stages = config.data.stages
    long = 4 if arg == "long" else 1
    stages.stage1 = stage(1800 * long, 128, 8, **recall)
    stages.stage2 = stage(600 * long, 256, 8, **recall)
    stages.stage3 = stage(800 * long, 256, 8, **both)
    optimizer = config.optimizer
    optimizer.lr = 6e-3
    optimizer.b2 = 0.98
    optimizer.warmup = 50
    optimizer.decay_start = 0.5
    optimizer.end = 0.05
    config.log_every = 100
    if arg == "long":
        # Some rows of twice the length, so that x2 holds there too.
        stages.stage4 = stage(1000, 512, 4, **both)
    if arg == "smoke":
        for name in stages:
            stages[name].update({"steps": 2, "length": 96, "batch_size": 2})
        config.log_every = 2
    return config
