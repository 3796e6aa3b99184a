"""The paper's training settings, shared by the recipes in configs/ (SPEC section 3).

AdamW, linear decay, no warm-up, 8 rows per step (one per device), bfloat16, base
frozen; stage 1: 1B tokens, ratios 2 to 32, lr 5e-5; stage 2: 28,000 rows, ratios 2, 4
and 8, lr 1e-5. The loss is a mean of row means, which is what eight processes of one
row compute. Windows and sinks are those of `model.presets`.

Data today: rows of fixed length cut from the plain text under `config.text.uri`, eos
between documents; stages run one after the other, where the paper mixes lengths. The
sources of the paper are not read yet. Stage 1 (RedPajama, documents of 2,400 to 20,480
tokens) becomes equal shares of tokens in rows of `PRETRAIN_LENGTHS`; stage 2
(LongAlpaca, BookSum, synthetic questions and stage-1 samples of 7,200 to 20,480 tokens)
becomes as many rows of `FINETUNE_LENGTHS`, with `FINETUNE_MIX` standing in for the
questions. The paper's results are not to be expected from such rows.

Estimates in the recipes (nothing has been run at these sizes) count every product that
is computed, the repeated ones too. Forward, a window costs linear 2 P (W + b), P
without embeddings and lm_head on raw tokens only, and attention 4 L N H (W + b)(m + (W
+ b) / 2); b = W / ratio is averaged over the ratios (0 in the last window), m slots lie
before it. Training costs 3 x linear + 4 x attention with a frozen base (two forwards;
backward one linear and two attentions more), 4 x both with all weights. Hours assume 40
% of the peak of 8 A100 or A800, 312 TFLOP/s each: an MFU, which counts nothing twice
(`model.flops`), of 27 %, or 30 % with all weights.
"""

from ml_collections import ConfigDict

from beacon_jax.model.presets import get_preset
from beacon_jax.training.config import Config, default_config, stage

PRETRAIN_TOKENS = 1_000_000_000
PRETRAIN_LENGTHS = (4096, 10240, 20480)
FINETUNE_ROWS = 5000 + 2000 + 16000 + 5000
FINETUNE_LENGTHS = (7200, 13840, 20480)
FINETUNE_MIX = {"text": 0.5, "passkey": 0.4, "copy": 0.1}
BATCH = 8

# Fast: every device holds the base and draws its own ratios, as the release does.
REPLICATED = {"data": 8, "fsdp": 1, "tensor": 1}
# Lean: parameters and optimiser in eight shards; all weights are trained this way.
SHARDED = {"data": 1, "fsdp": 8, "tensor": 1}


def pretrain(preset: str, arg: str = "") -> Config:
    """Stage 1: beacons on a frozen base. `preset`: a name of `model.presets`."""
    config = start(preset)
    config.text.uri = "FOLDER"  # to be named on the command line
    share = PRETRAIN_TOKENS / len(PRETRAIN_LENGTHS) / BATCH
    for i, length in enumerate(PRETRAIN_LENGTHS, 1):
        config.data.stages[f"stage{i}"] = stage(round(share / length), length, BATCH)
    return finish(config, preset, f"{_file(preset)}_pretrain", arg, REPLICATED)


def finetune(preset: str, arg: str = "") -> Config:
    """Stage 2, from the export of stage 1."""
    config = start(preset)
    config.init_from = f"out/{_file(preset)}_pretrain/export"
    config.beacon.ratios = (2, 4, 8)
    _finetuning_rows(config)
    return finish(config, preset, f"{_file(preset)}_finetune", arg, REPLICATED)


def full_ft(preset: str, arg: str = "") -> Config:
    """The paper's Full-FT baseline: all weights, no beacons, the rows of stage 2."""
    config = start(preset)
    config.trainable = "all"
    config.beacon.use = False
    # The backward pass repeats this many tokens at a time, as it does with beacons.
    config.window = config.beacon.window
    _finetuning_rows(config)
    return finish(config, preset, f"{_file(preset)}_full_ft", arg, SHARDED)


def start(preset: str) -> Config:
    """What all recipes share; `default_config` has the release's optimiser already."""
    config = default_config()
    config.dtype = "bfloat16"
    config.loss.average = "row"
    config.log_every = 10
    beacon = get_preset(preset).beacon
    assert beacon is not None
    config.beacon.update({"window": beacon.window, "sink": beacon.sink})
    return config


def finish(
    config: Config, preset: str, name: str, arg: str, mesh: dict[str, int] | None = None
) -> Config:
    """Sets the mesh, or shrinks everything for `:smoke`.

    Args:
      name: of the recipe's file, for messages.
      mesh: devices per axis; None: the default of `default_config`.

    Raises:
      ValueError: an `arg` that the recipe does not have.
    """
    if arg not in ("", "smoke"):
        raise ValueError(f"{name}:{arg} is unknown: use :smoke or nothing.")
    if arg == "smoke":
        _shrink(config, preset)
    elif mesh is not None:
        config.mesh = ConfigDict(mesh)
    return config


def _finetuning_rows(config: Config) -> None:
    config.text.uri = "FOLDER"  # to be named on the command line
    config.optimizer.lr = 1e-5
    config.data.passkey_questions = 4
    steps = FINETUNE_ROWS // BATCH
    for i, length in enumerate(FINETUNE_LENGTHS):
        count = (steps + i) // len(FINETUNE_LENGTHS)
        config.data.stages[f"stage{i + 1}"] = stage(
            count, length, BATCH, **FINETUNE_MIX
        )


def _shrink(config: Config, preset: str) -> None:
    """A random model of the preset's kind, windows of 32 tokens, two steps a stage."""
    real = get_preset(preset)
    heads = 4
    config.init_from = ""
    config.model = ConfigDict(
        {
            "family": real.family,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_layers": 2,
            "num_heads": heads,
            "num_kv_heads": heads if real.num_kv_heads == real.num_heads else 2,
            "head_dim": 8,
            "max_position": 256,
            "rms_norm_eps": real.rms_norm_eps,
            "rope": ConfigDict({"theta": real.rope.theta}),
            "tie_embeddings": real.tie_embeddings,
            "qkv_bias": real.qkv_bias,
        }
    )
    config.tokenizer.update({"train": True, "vocab_size": 300})
    config.text.uri = "stdlib"
    config.beacon.window = 32
    if config.window:
        config.window = 32
    for name in config.data.stages:
        config.data.stages[name].update({"steps": 2, "length": 112})
    config.log_every = 2


def _file(preset: str) -> str:
    return preset.replace("-", "_").replace(".", "_")
