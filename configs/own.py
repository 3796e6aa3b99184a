"""Beacons for your own model on your own text; the rest is chosen for you.

python -m beacon_jax.train --config=configs/own.py --workdir=out/own \\
  --config.init_from=HF_DIR --config.data.sources=FOLDER

HF_DIR is a folder with config.json, weights and tokenizer; FOLDER a folder of .txt,
.md, .rst or .py files, or one such file, or a .jsonl file of {"text": ...} rows. The
base stays frozen. Window, row length, batch, steps and rate are chosen from
config.json, the size of the text and the memory of the device, and printed with the
reason; each can be set by hand, as --config.data.stages.stage1.steps=20, and so can the
ratios, which are 2, 4 and 8: --config.beacon.ratios=4,8,16. The same command goes on
after a stop. Passkeys and copied passages put into the text teach recall; a tenth of
the documents is held out for the evaluation, whose command is printed at the end.

Hardware: anything; on two CPU cores a model of 0.1B trains at about 100 tokens/s.
"""

from beacon_jax.training.config import Config, default_config, leave_open, stage


def get_config(arg: str = "") -> Config:
    if arg:
        raise ValueError(f"own:{arg} is unknown: use nothing.")
    config = default_config()
    config.beacon.ratios = (2, 4, 8)
    # In half of the steps all windows have one ratio, as at inference.
    config.uniform_plans = 0.5
    config.loss.skip_first_window = True  # it sees no beacon
    config.data.passkey_questions = 4
    config.data.stages.stage1 = stage(0, 0, 0, text=0.5, passkey=0.4, copy=0.1)
    config.optimizer.b2 = 0.98
    config.optimizer.decay_start = 0.5
    config.optimizer.end = 0.05
    config.log_every = 10
    config.save_every = 50
    leave_open(config)  # chosen when the run starts, by beacon_jax/training/own.py
    return config
