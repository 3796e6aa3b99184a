"""The paper's training settings (docs/specification.md section 3), for configs/.

Both stages have AdamW, linear decay, no warm-up, 8 rows per step (one per device),
bfloat16 and a frozen base. The loss is a mean of row means, which is what eight
processes of one row compute. Windows and sinks are those of `model.presets`.

The data are the sources of the release under its names (docs/evaluation-protocols.md
section 4.1), relative to `config.data.root`, the folder of its archive. They are
prepared once, into WORKDIR/data, and read for one epoch in batches of equal numbers of
windows (`data.grouped`, strict).

Estimates in the recipes (nothing has been run at these sizes, and none of the sources
could be read here) count every product that is computed, the repeated ones too. In the
forward pass a window costs 2 P (W + b) in linear layers, P without embeddings and
lm_head on raw tokens only, and 4 L N H (W + b)(m + (W + b) / 2) in attention. Here
b = W / ratio is averaged over the ratios (0 in the last window), and m slots lie before
the window. Training costs 3 x linear + 4 x attention with a frozen base (two forwards;
backward one linear and two attentions more), 4 x both with all weights. Hours assume
40 % of the peak of 8 A100 or A800, 312 TFLOP/s each: an MFU, which counts nothing twice
(`beacon_jax.flops`), of 27 %, or 30 % with all weights.
"""

from ml_collections import ConfigDict

from beacon_jax.model.presets import get_preset
from beacon_jax.training.config import Config, default_config

PRETRAIN_TOKENS = 1_000_000_000
PRETRAIN_SOURCES = ("long-llm:redpajama/train.json",)
FINETUNE_SOURCES = (
    "long-llm:gpt/one_detail_book.train.16K.json",  # 13,000 rows
    "long-llm:gpt/one_detail_paper.train.16K.json",  # 3,000 rows
    "long-llm:longalpaca/train.json[5000]",
    "long-llm:booksum/train.16K.json[2000]",
    "long-llm:redpajama/train.json[5000]",
)
MAX_LENGTH = 20480
BATCH = 8

CHAT_TEMPLATES = {"llama2": "llama-2", "llama3": "llama-3", "mistral": "mistral"}

# Fast: every device holds the base and draws its own ratios, as the release does.
REPLICATED = {"data": 8, "fsdp": 1, "tensor": 1}
# Lean: parameters and optimiser in eight shards; all weights are trained this way.
SHARDED = {"data": 1, "fsdp": 8, "tensor": 1}


def pretrain(preset: str, arg: str = "") -> Config:
    """Makes stage 1: beacons on a frozen base, ratios 2 to 32, lr 5e-5, 1B tokens.

    Rows are RedPajama documents of 2,400 to 20,480 tokens, longer ones cut as in the
    release (`data.long="drop"` leaves them out, as the paper says). Estimates assume a
    third of the tokens each in documents of 4,096, 10,240 and 20,480.

    Args:
      preset: a name of `model.presets`.
      arg: "smoke" for a few tiny steps from scratch.
    """
    config = start(preset)
    config.data.update(
        {
            "sources": PRETRAIN_SOURCES,
            "heldout": 0.0,
            "min_length": 2400,
            "long": "cut",
            "tokens": PRETRAIN_TOKENS,
        }
    )
    return finish(config, preset, f"{_file(preset)}_pretrain", arg, REPLICATED)


def finetune(preset: str, arg: str = "") -> Config:
    """Makes stage 2, from the export of stage 1: ratios 2, 4 and 8, lr 1e-5.

    The 28,000 rows of 7,200 to 20,480 tokens are 16,000 synthetic questions about books
    and papers, 5,000 LongAlpaca, 2,000 BookSum and 5,000 stage-1 rows, counted before
    the length rules, longer conversations left out. The release's command also names
    needle/train.16K.json, which the paper does not: add it to `data.sources` to train
    as the release does. Estimates assume that none is dropped, and a third of the rows
    each of 7,200, 13,840 and 20,480 tokens.
    """
    config = start(preset)
    config.init_from = f"out/{_file(preset)}_pretrain/export"
    config.beacon.ratios = (2, 4, 8)
    _finetuning_rows(config, preset)
    return finish(config, preset, f"{_file(preset)}_finetune", arg, REPLICATED)


def full_ft(preset: str, arg: str = "") -> Config:
    """Makes the paper's Full-FT baseline: all weights, no beacons, rows of stage 2."""
    config = start(preset)
    config.trainable = "all"
    config.beacon.use = False
    # The backward pass repeats this many tokens at a time, as it does with beacons.
    config.window = config.beacon.window
    _finetuning_rows(config, preset)
    return finish(config, preset, f"{_file(preset)}_full_ft", arg, SHARDED)


def start(preset: str) -> Config:
    """Makes what all recipes share.

    `default_config` has the release's optimiser already.
    """
    config = default_config()
    config.dtype = "bfloat16"
    config.loss.average = "row"
    config.log_every = 10
    config.data.update({"max_length": MAX_LENGTH, "batch_size": BATCH})
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


def _finetuning_rows(config: Config, preset: str) -> None:
    family = preset.split("-")[0]
    config.optimizer.lr = 1e-5
    config.data.update(
        {
            "sources": FINETUNE_SOURCES,
            "heldout": 0.0,
            "long": "cut",
            "min_length": 7200,
            "chat_template": CHAT_TEMPLATES.get(family, "qwen"),
        }
    )


def _shrink(config: Config, preset: str) -> None:
    """Makes a random model of the preset's kind, windows of 32 tokens and short rows.

    It trains six steps on the rows of assets/smoke, or two steps a stage.
    """
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
    config.beacon.window = 32
    if config.window:
        config.window = 32
    for name in config.data.stages:
        config.data.stages[name].update({"steps": 2, "length": 112})
    if not config.data.stages:
        sources = ["assets/smoke/text.jsonl"]
        if config.data.chat_template:
            sources.append("assets/smoke/chat.jsonl")
            # Marks of the real template are no tokens of a tokenizer trained on text.
            config.data.chat_template = "no"
        limits = {"min_length": 16, "max_length": 112, "steps": 6, "epochs": 0}
        config.data.update({**limits, "sources": tuple(sources), "tokens": 0})
        config.data.update({"group": "pad", "workers": 1})
    config.log_every = 2


def _file(preset: str) -> str:
    return preset.replace("-", "_").replace(".", "_")
