"""Every setting of a training run, with its default; experiments change some of them.

A config file imports `default_config`, so that a key exists in exactly one place and a
typo, in a file or on the command line, is an error. So is a key of an earlier version:
the error names the key that took its place (`MOVED`).
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from beacon_jax.forms import form_of, unlike
from beacon_jax.model.partition import RULES
from beacon_jax.paths import read_object

# A ConfigDict; Any, because a type checker knows nothing of its keys.
Config = Any

_SOURCES = (
    "config.data.sources, which takes the same URIs (--config.data.sources=FOLDER, or "
    "several times)"
)
# Keys of earlier versions and what to write instead; "data.": those of config.data.
MOVED = {
    "text": f"config.text.uri is now {_SOURCES}, and config.text.heldout_fraction is "
    "now config.data.heldout",
    "uri": f"config.uri is now {_SOURCES}",
    "heldout_fraction": "config.heldout_fraction is now config.data.heldout",
    "data.uri": f"config.data.uri is now {_SOURCES}",
    "data.heldout_fraction": "config.data.heldout_fraction is now config.data.heldout",
    "data.cut_long": "config.data.cut_long is now config.data.long: 'cut' for True, "
    "'drop' for False, or 'split', which keeps all of a long text",
}


class _RunConfigDict(ConfigDict):
    """A ConfigDict that says where a key of an earlier version went."""

    _prefix = ""

    def __getitem__(self, key):
        self._refuse(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self._refuse(key)
        super().__setitem__(key, value)

    def _refuse(self, key):
        if (moved := MOVED.get(f"{self._prefix}{key}")) is not None:
            raise AttributeError(moved)


class _DataConfigDict(_RunConfigDict):
    _prefix = "data."


def default_config() -> Config:
    """Makes a config with the optimiser and loss of the released recipe, and no data.

    See docs/specification.md section 3.
    """
    config: Config = _RunConfigDict()
    config.init_from = ""  # HF or converted folder, GGUF file; "": `model`, at random
    config.model = ConfigDict()  # fields of ModelConfig, for random initialisation
    # Adapter folder that beacons start from, with a fresh optimiser; "": from the base.
    config.beacons_from = ""
    config.trainable = "beacon"  # what is trained; or "all": every parameter
    config.seed = 0  # of data, ratios and random initialisation
    # Of computing; or "bfloat16", "float16". Masters are always float32.
    config.dtype = "float32"
    config.allow_config_change = False  # resume although the config is another one
    # Steps between lines of metrics.jsonl and TensorBoard. The console gets them too,
    # the first step, and a line at least every 15 seconds.
    config.log_every = 50
    config.save_every = 500  # steps between checkpoints
    config.keep = 2  # checkpoints that are kept
    config.profile_steps = ()  # first and last step to trace, as 10,13; (): none
    config.peak_tflops = 0.0  # of a device, for the MFU; 0: of the chips that are known
    # Folder of compiled programs; "": ~/.cache/beacon_jax/xla; "off": none.
    config.compilation_cache = ""
    config.window = 0  # tokens computed at once by a model without beacons; 0: the row
    # Devices along each axis; -1: as many as there are and as the batches allow.
    # fsdp = tensor = stage = 1: the base on every device, a ratio plan for each (fast).
    # Otherwise everything is split, one plan per step (lean). See training.sharding.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "stage": 1})
    config.rules = ConfigDict(RULES)  # {logical axis: mesh axes} of the lean setting
    config.accumulate = 1  # parts of a batch that are computed one after the other
    # "lean", "lean-layer", ...: see core.window_loop. "auto": "lean" if the
    # estimate of training.memory fits the device, else "lean-layer".
    config.remat = "auto"
    config.attention = ""  # a name of docs/kernels.md; "": the platform's best
    config.offload = False  # the memory waits in host memory for the backward pass
    config.memory_slots = 0  # room for them; 0: for the lowest ratio in every window

    config.beacon = ConfigDict(
        {
            "use": True,  # False: a plain decoder
            "window": 1024,  # tokens of a window
            # Tokens per beacon that training draws from; each must divide the window.
            # 0: a window without beacons, all of whose tokens stay.
            "ratios": (2, 4, 8, 16, 32),
            # How they are drawn: "step-random" for every window, "instance-random"
            # once per row, "sequence" in turn, or "adapt-F" (see the specification).
            "ratio_mix": "step-random",
            # Projections that beacons have of their own, of q, k, v and o.
            "param": ("q", "k", "v"),
            # 0: weights of their own; 64: changes of that rank, x W + (x A) B with the
            # base's W, of Llama-2-7B 50 million parameters in place of 1.6 billion.
            "rank": 0,
            # "last": the keys and values that a low-rank beacon changes are those of
            # the token in front of it, not its own x W: it starts as a copy of it.
            "anchor": "none",
            "embed_init": "eos",  # or "bos": token whose embedding a beacon starts from
            "sink": 0,  # entries of the first window that are kept for ever
            # Beacons after every `ratio` tokens, or behind the window: "append".
            "placement": "interleave",
        }
    )
    # Share of the steps in which all windows have one ratio, as at inference. Drawn per
    # window, the memory seldom gets as long as the lowest ratio makes it (seven windows
    # at x2: one plan in 2,187), and recall at that ratio does not reach that far.
    config.uniform_plans = 0.0
    config.loss = ConfigDict(
        {
            # "labels": cross entropy. "distil": the divergence from what the model
            # itself predicts with full attention, behind the first window of a row.
            "kind": "labels",
            # Of "distil": how much of a label's cross entropy is added at its token.
            "label_weight": 0.0,
            # How much is added of the cross entropy between the attention that tokens
            # pay to the memory and what full attention pays to the tokens that it
            # stands for: beacons learn to be found. It costs a teacher's pass.
            "attention_weight": 0.0,
            # Tokens of a window whose attention is compared, those that weigh most.
            "attention_queries": 64,
            # Leaves out the loss of the first window, which sees no beacon.
            "skip_first_window": False,
            "average": "token",  # mean over labels; "row": mean of the rows' means
            # float16 only: the loss is multiplied by this and gradients are divided,
            # or those of single labels would be less than its smallest number, 6e-8.
            "scale": 4096.0,
        }
    )
    config.tokenizer = ConfigDict(
        {
            "path": "",  # folder of the tokenizer; "": the one of init_from
            # Trains a small BPE on the text of data.sources, for a model from scratch.
            "train": False,
            "vocab_size": 512,  # tokens of a tokenizer that is trained
            # Share of passkey sentences in the text that the tokenizer is trained on.
            "passkey_fraction": 0.03,
        }
    )
    # What a run reads, and in which order: see docs/data.md.
    config.data = _DataConfigDict(
        {
            # URIs of `data.sources`: files, folders, globs, "stdlib", "tfds:name", ...
            "sources": (),
            "root": "",  # folder that long-llm: URIs are relative to
            # Share of the documents that is kept for evaluation, by a hash of their
            # names; `evaluate` measures on those of 0.1. 0: trains on all of them.
            "heldout": 0.1,
            # Rows of `length` tokens, cut at random from the text of all sources, in
            # stages that run in the order of their names (`training.config.stage`).
            # Empty: whole rows, in epochs.
            "stages": ConfigDict(),
            # Only for stages: label weights and shape of passkeys and copies.
            "answer_weight": 10.0,  # of the digits of a passkey's answers
            "second_weight": 3.0,  # of the key's second mention
            "passkey_questions": 1,  # most times that a key is asked for
            # Tokens of a window; above 0 the key stands before the row's last window.
            "passkey_window": 0,
            "passkey_tail": 0,  # most tokens of text that follow the last question
            "copy_weight": 1.0,  # of the tokens of a copied passage
            "dummy_every": (2, 4, 8),  # spacings of a stage's dummies
            # Steps of runs before this one: its first batch and ratios are those that
            # they would have had next.
            "first_step": 0,
            # Only for whole rows, which are tokenised once, into a prepared folder.
            "prepared": "",  # that folder; "": `data` in the workdir
            "weights": (),  # a number per source; (): every row once per epoch
            "min_length": 0,  # tokens; shorter rows are left out
            "max_length": 20480,  # tokens; longer conversations are left out
            # What becomes of longer text: "split" into rows of max_length, all of it
            # kept; "cut" after max_length, as the release does; or left out ("drop"),
            # as the paper says.
            "long": "split",
            # How conversations are written: qwen, llama-2, llama-3, mistral, hf or no,
            # see `data.chat`; "": there are none.
            "chat_template": "",
            # Batches hold rows of one number of windows ("strict"), of several
            # ("relaxed"), or of several with the last batch filled up ("pad").
            "group": "strict",
            "batch_size": 8,  # rows of a step, of all devices together
            # The run ends at whichever comes first; 0: no such limit.
            "epochs": 1,
            "steps": 0,
            "tokens": 0,
            "max_drop_fraction": 0.05,  # of bad rows, above which preparing stops
            "workers": 0,  # processes that tokenise; 0: one per core
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # or "muon": matrices by Muon, the rest by Adam
            "lr": 5e-5,  # learning rate, at its highest
            "adam_lr": 5e-3,  # muon: of everything that is not a matrix of a layer
            "b1": 0.9,  # of AdamW: decay of the mean of gradients
            "b2": 0.999,  # decay of the mean of their squares
            "eps": 1e-8,  # added to the root of that mean
            "weight_decay": 0.0,  # share that every update takes off, times lr
            "clip": 1.0,  # global norm; 0: off
            "schedule": "linear",  # or "cosine": how the rate falls
            "warmup": 0,  # steps
            "decay_start": 0.0,  # share of the steps before the decay begins
            "end": 0.0,  # the rate never falls below this share of lr
            "max_nonfinite": 10,  # updates in a row skipped before the run stops
        }
    )
    return config


# What `training.own` chooses for a model, a text and a device.
OPEN = (
    "dtype",
    "remat",
    "beacon.window",
    "data.stages.stage1.length",
    "data.stages.stage1.batch_size",
    "data.stages.stage1.steps",
    "optimizer.lr",
    "optimizer.warmup",
)


def lookup(config: Any, key: str, absent: Any = None) -> Any:
    """Returns the value of a dotted key, or `absent` if there is no such key."""
    for name in key.split("."):
        if not hasattr(config, "keys") or name not in config:
            return absent
        config = config[name]
    return config


def read_recorded(workdir: Path) -> dict[str, Any]:
    """Reads the config.json of a run: the settings that it was made with.

    Keys that an earlier version did not have are there with their defaults.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged; names the key.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: give the --workdir of a training run."
        )
    defaults = default_config().to_dict()
    form = form_of(defaults) | {"rules?": {str: (str, [str], None)}}
    try:
        found = read_object(path)
        if wrong := unlike(found, form, "config"):
            raise ValueError(f"{path} is damaged: {wrong}.")
    except ValueError as error:
        raise ValueError(
            f"{error} It says with what settings the run was made: repair it, or use "
            "another --workdir."
        ) from None
    return _filled(found, defaults)


def _filled(found: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Returns `found` with the defaults of keys that it does not have."""
    groups = {k: x for k, x in defaults.items() if isinstance(x, dict) and k in found}
    inner = {k: _filled(found[k], x) for k, x in groups.items() if k != "rules"}
    return defaults | found | inner


def leave_open(config: Config) -> None:
    """Sets the keys of OPEN to None: they are chosen when a run starts.

    The keys keep their types, so that the command line can set them.
    config.data.stages must have a stage1.
    """
    for key in OPEN:
        parent, _, last = key.rpartition(".")
        part = lookup(config, parent) if parent else config
        part[last] = placeholder(type(part[last]))


def stage(
    steps: int,
    length: int,
    batch_size: int,
    *,
    text: float = 1.0,
    passkey: float = 0.0,
    repeat: float = 0.0,
    copy: float = 0.0,
    dummies: float = 0.0,
) -> Config:
    """Makes one stage of config.data.stages, with the weights of its kinds of rows.

    Args:
      steps: how many batches.
      length: tokens of a row.
      batch_size: rows of a batch.
      text, passkey, repeat, copy: weights of the kinds (`data.batches`); a row is of
        each kind with probability weight / sum.
      dummies: share of the rows that are interleaved with eos.
    """
    mix = {"text": text, "passkey": passkey, "repeat": repeat, "copy": copy}
    return ConfigDict(
        {
            "steps": steps,
            "length": length,
            "batch_size": batch_size,
            "dummies": dummies,
            "mix": mix,
        }
    )
