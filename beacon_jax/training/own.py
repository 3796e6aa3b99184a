"""Fills in what a config leaves open, for a model and a text of the user.

configs/own.py leaves the keys of OPEN at None. Before anything is read into memory they
are chosen from config.json, the size of the text and the memory of the device, one
printed line each; what the command line sets stays. A run that goes on takes the
choices that its workdir recorded.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beacon_jax import hf
from beacon_jax.core.law import Law
from beacon_jax.data.sources import open_parts, source_bytes
from beacon_jax.data.tally import clock, si
from beacon_jax.data.text import load_documents, run_documents
from beacon_jax.forms import unlike
from beacon_jax.hf.conversion import model_config
from beacon_jax.model.config import ModelConfig
from beacon_jax.model.shapes import param_shapes
from beacon_jax.tokenise import encode_all
from beacon_jax.training.config import OPEN, Config, lookup, read_recorded
from beacon_jax.training.hardware import (
    device_bytes,
    fastest_dtype,
    find_chip,
    product_rate,
)
from beacon_jax.training.initial import (
    base_folder,
    beacon_config,
    tokenizer_folder,
    trained_trees,
)
from beacon_jax.training.inputs import slots, step_flops
from beacon_jax.training.memory import step_bytes
from beacon_jax.training.sharding import make_placement, map_named

STAGE = "data.stages.stage1"
WINDOWS = (1024, 512, 256, 128, 64, 32)
# A CPU computes a window of 256 about as fast per token as one of 1024, and rows of six
# of them take seconds a step on a model of 0.1B, not minutes.
CPU_WINDOW = 256
ROW_WINDOWS = (8, 6, 4, 3)  # windows of a row; the last one has no beacons in training
STEP_TOKENS = {"cpu": 2048, "other": 16384}
SHARE = 0.8  # of the device's memory that a step may take by the estimate
PASSES = 2  # over the text, at most
STEPS = (20, 2000)
HOUR = 3600
# A process with jax, its compiled programs and what the compiler needs meanwhile,
# on a CPU, where all of it is in the memory that the arrays are in.
PROCESS_BYTES = int(1.5e9)
UTILISATION = {"cpu": 0.4, "other": 0.3}  # of the peak
SAMPLES = 128  # rows that `evaluate` takes, whose last windows do not overlap
SAMPLE_BYTES = 4_000_000  # larger texts are counted by their size


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Facts that are known before anything is loaded.

    Attributes:
      config: with the choices made so far.
      tokens: of the text, approximately.
    """

    config: Config
    model: ModelConfig
    tokens: int
    devices: list[Any]

    @property
    def kind(self) -> str:
        return "cpu" if self.devices[0].platform == "cpu" else "other"

    @property
    def room(self) -> int | None:
        """Bytes of a device, on a CPU of all; None: the platform does not tell."""
        return device_bytes(self.devices[0])

    def with_beacons(self, window: int) -> ModelConfig:
        beacon = beacon_config(self.config, window=window, use=True)
        return dataclasses.replace(self.model, beacon=beacon)


def choose(
    config: Config, workdir: Path, show: Callable[[str], None] = print
) -> Config:
    """Returns the config with a value for every key of OPEN; itself if none is None.

    Raises:
      ValueError, FileNotFoundError: no model or text, a text that is too short, too few
        positions, a device that is too small, or several processes.
    """
    missing = [key for key in OPEN if lookup(config, key, "") is None]
    if not missing:
        return config
    if jax.process_count() > 1:
        raise ValueError(
            f"{', '.join(missing)} are left open, which several processes would choose "
            "differently: set them."
        )
    for name in ("steps", "length", "batch_size"):
        value = lookup(config, f"{STAGE}.{name}", None)
        if value is not None and value < 1:
            raise ValueError(
                f"{STAGE}.{name}={value} must be at least 1; leave it out, and it is "
                "chosen."
            )
    config = copy.deepcopy(config)
    if (workdir / "config.json").exists():
        chosen = read_recorded(workdir)
        for key in missing:
            group, _, name = key.rpartition(".")
            kind = (lookup(config, group) if group else config).get_type(name)
            if wrong := unlike(lookup(chosen, key), kind, key):
                raise ValueError(
                    f"{workdir / 'config.json'} is damaged: {wrong}. It says what was "
                    f"chosen for this run: repair it, set {', '.join(missing)} by "
                    "hand, or use another --workdir."
                )
        config.update_from_flattened_dict({key: lookup(chosen, key) for key in missing})
        show(f"going on with what was chosen for {workdir}")
        return config
    facts = _facts(config)
    show(
        f"model {config.init_from}: {facts.model.family}, {facts.model.num_layers} "
        f"layers of {facts.model.hidden_size}, {si(_size(facts.model))} parameters, "
        f"{facts.model.trained_positions:,} positions"
    )
    held = _heldout(config)
    show(
        f"text {', '.join(config.data.sources)}: about {si(facts.tokens)} tokens to "
        "train on; "
        + (
            f"{si(held)} bytes of held-out documents for the evaluation"
            if held
            else f"data.heldout={config.data.heldout:g} holds out none of its "
            "documents (a hash of each name decides), so it is evaluated on other "
            "text: raise it, add documents, or name a single file, which is cut into "
            "documents"
        )
    )
    show("chosen for them; --config.KEY=VALUE chooses otherwise:")
    for step in (_dtype, _shape, _steps, _rates):
        for key, value, why in step(facts):
            if key in missing:
                config.update_from_flattened_dict({key: value})
                show(f"  {key}={value}: {why}")
    return config


def next_commands(config: Config, export: Path) -> str:
    """Says what to type after a run: ask the model, and measure it."""
    data, ratios = config.data, sorted(r for r in config.beacon.ratios if r)
    ratio = 4 if 4 in ratios else ratios[-1]
    out = export.parent / "evaluation"
    text = ""  # the standard library, where the text's own held-out part is too short
    window = config.beacon.window
    length = max((s.length for s in data.stages.values()), default=data.max_length)
    lengths = sorted({2 * window, max(2, length // window) * window})
    if _heldout(config) >= 4 * (lengths[-1] + SAMPLES * window):
        text = f"--text={quote(str(data.sources[0]))} "
    return (
        "next:\n"
        f"  python -m beacon_jax.generate --model={quote(str(export))} "
        f"--context={quote(str(_file(data.sources, data.root)))} "
        f'--prompt="What is this text about?" --ratio={ratio}\n'
        f"  python -m beacon_jax.evaluate --model={quote(str(export))} {text}"
        f"--tasks=perplexity,passkey --ratios={','.join(map(str, ratios))} "
        f"--lengths={','.join(map(str, lengths))} --out={quote(str(out))}"
    )


def _heldout(config: Config) -> int:
    """Counts the bytes of the first source's documents that are held out.

    For much text the number is estimated from its size.
    """
    data = config.data
    if not data.heldout:
        return 0
    try:
        size = sum(source_bytes(data.sources[:1], data.root))
        if size > SAMPLE_BYTES:
            return int(size * data.heldout)
        texts = load_documents(
            data.sources[0], "heldout", data.heldout, root=data.root, quiet=True
        )
    except (OSError, ValueError):  # none of them is held out
        return 0
    return sum(len(text.encode()) for text in texts)


def _file(sources: Sequence[str], root: str) -> str:
    """Finds a file of text to ask about: the largest of up to 256 KiB."""
    with contextlib.suppress(OSError, ValueError):
        parts = [p for p in open_parts(sources[:1], root) if p.kind == "text"]
        sizes = [(p.size, p.path) for p in parts if p.size <= 2**18]
        return max(sizes)[1]
    return "FILE"


def _facts(config: Config) -> _Facts:
    """Reads what choices depend on: config.json, the size of the text, the devices."""
    if not config.init_from:
        raise ValueError(
            "init_from='': name a folder with a model: --config.init_from=HF_DIR"
        )
    if not config.data.sources:
        raise ValueError(
            "data.sources=(): name a folder or file of text: "
            "--config.data.sources=FOLDER"
        )
    folder = base_folder(config)
    model = model_config(folder)
    size = sum(source_bytes(config.data.sources, config.data.root))
    tokenizer = hf.load_tokenizer(tokenizer_folder(config))
    if size <= SAMPLE_BYTES:
        texts = run_documents(config, quiet=True)
        tokens = sum(map(len, encode_all(tokenizer, texts)))
    else:
        # Bytes of a token of English and code: 3.5 with 49,152 tokens, 2 with 512.
        tokens = int(size / (3.5 if len(tokenizer) > 8192 else 2.0))
    return _Facts(config, model, tokens, jax.devices())


def _dtype(facts: _Facts):
    """Yields the dtype that the device computes in fastest."""
    shape = facts.model.hidden_size, facts.model.intermediate_size
    yield "dtype", *fastest_dtype(facts.devices[0], *shape)


def _shape(facts: _Facts):
    """Yields window, length, batch size and remat: the largest window that fits."""
    config, positions = facts.config, facts.model.trained_positions
    if positions < 4 * WINDOWS[-1]:
        raise ValueError(
            f"init_from={config.init_from} has {positions} positions: beacons need at "
            f"least {4 * WINDOWS[-1]}, four windows of {WINDOWS[-1]}: use another one."
        )
    most = CPU_WINDOW if facts.kind == "cpu" else WINDOWS[0]
    asked, length = config.beacon.window, lookup(config, f"{STAGE}.length")
    limit = f"the largest for a {facts.kind} device" if facts.kind == "cpu" else ""
    for w in [asked] if asked else [w for w in WINDOWS if w <= most]:
        model = facts.with_beacons(w)
        for t in [length] if length else [n * w for n in ROW_WINDOWS]:
            refused = _limit(facts, model, t, free=not asked)
            if refused:
                limit = refused
                continue
            rows = _rows(facts, model, t)
            need, remat = _need(facts, model, rows, t)
            there = "the device does not say"
            if facts.room:
                there = f"{facts.room / 2**30:.1f} GiB are there"
            yield "beacon.window", w, limit or "the largest that is tried"
            yield f"{STAGE}.length", t, f"{-(-t // w)} windows"
            yield f"{STAGE}.batch_size", rows, f"{rows * t:,} tokens a step"
            by = f"a step needs about {need / 2**30:.1f} GiB by the estimate"
            yield "remat", remat, f"{by}, {there}"
            return
    raise ValueError(
        f"init_from={config.init_from} and data.sources={tuple(config.data.sources)}: "
        f"no window and row fit: {limit}. Rows of {ROW_WINDOWS[-1]} windows of "
        f"{WINDOWS[-1]} tokens are the least: use more text, a smaller model or "
        "another device."
    )


def _limit(facts: _Facts, model: ModelConfig, length: int, *, free: bool) -> str:
    """Says why rows of `length` are too much; "" if they are not.

    Args:
      free: the window was not asked for; then eight of them have to fit.
    """
    assert model.beacon is not None
    w, positions = model.beacon.window, facts.model.trained_positions
    used = slots(facts.config, model, -(-length // w))
    used += Law.of(model).room(model.beacon.ratios)
    if used > positions or (free and w > max(positions // 8, WINDOWS[-1])):
        return f"{positions:,} positions allow no larger one"
    if facts.tokens < (2 if length == ROW_WINDOWS[-1] * WINDOWS[-1] else 8) * length:
        return f"about {si(facts.tokens)} tokens of text allow no larger one"
    if not _fits(facts, model, len(facts.devices), length):
        return f"the device's {(facts.room or 0) / 2**30:.1f} GiB allow no larger one"
    return ""


def _rows(facts: _Facts, model: ModelConfig, length: int) -> int:
    """Chooses the rows of a step: a multiple of the devices.

    There are as many as STEP_TOKENS and the memory allow.
    """
    if asked := lookup(facts.config, f"{STAGE}.batch_size"):
        return asked
    count = len(facts.devices)
    rows, most = count, min(STEP_TOKENS[facts.kind] // length, 8) * count
    while 2 * rows <= most and _fits(facts, model, 2 * rows, length):
        rows *= 2
    return rows


def _fits(facts: _Facts, model: ModelConfig, rows: int, length: int) -> bool:
    """Says whether a step fits into SHARE of a device's memory, by the estimate."""
    room = facts.room
    return room is None or _need(facts, model, rows, length)[0] <= SHARE * room


def _steps(facts: _Facts):
    """Yields the number of steps: PASSES over the text, or about an hour."""
    stage = facts.config.data.stages.stage1
    tokens = stage.batch_size * stage.length
    seconds = _step_seconds(facts)
    passes = max(1, PASSES * facts.tokens // tokens)
    hour = max(1, int(HOUR / seconds))
    steps = _rounded(min(max(min(passes, hour), STEPS[0]), STEPS[1]))
    why = "about an hour"
    if passes <= hour:
        why = f"{steps * tokens / facts.tokens:.2g} x the text"
    steps = stage.steps or steps
    yield (
        f"{STAGE}.steps",
        steps,
        f"{why}; about {clock(seconds * steps)} by the FLOPs, the ETA in the first "
        "lines below is measured",
    )


def _rates(facts: _Facts):
    """Yields the learning rate and the steps of its warmup."""
    # Rates that trained well: 3e-3 at 96 wide, 2e-4 at 896, 5e-5 (paper) at 4096.
    rate = float(f"{min(3e-3, 0.2 / facts.model.hidden_size):.1e}")
    yield "optimizer.lr", rate, f"0.2 / hidden_size {facts.model.hidden_size}"
    steps = facts.config.data.stages.stage1.steps
    yield "optimizer.warmup", max(1, steps // 20), "a twentieth of the steps"


def _step_seconds(facts: _Facts) -> float:
    """Estimates the seconds of a step by its FLOPs and the peak of the devices."""
    config = facts.config
    stage, w = config.data.stages.stage1, config.beacon.window
    valid = np.full((-(-stage.length // w), stage.batch_size), w)
    plans = np.full((len(valid), 1), min(r for r in config.beacon.ratios if r))
    model = facts.with_beacons(w)
    flops = step_flops(config, model, plans, valid)
    chip = find_chip(facts.devices[0].device_kind)
    if chip:
        peak = len(facts.devices) * chip.tflops * 1e12
    else:
        shape = model.hidden_size, model.intermediate_size
        peak = product_rate(facts.devices[0], config.dtype, *shape)
        if config.dtype != "float32":
            peak /= 2  # steps gain less than products, see hardware.WORTH
    return flops / (UTILISATION[facts.kind] * peak)


def _need(
    facts: _Facts, model: ModelConfig, rows: int, length: int
) -> tuple[float, str]:
    """Estimates the bytes of a step on a device (on a CPU: in all), and its remat."""
    assert model.beacon is not None
    config = facts.config
    placement = make_placement(config.mesh, config.rules, [rows])
    names = trained_trees(config)

    def arrays(own: bool) -> dict[str, Any]:
        dtype = jnp.dtype(jnp.float32 if own else config.dtype)

        def make(name: str, shape: tuple[int, ...]) -> Any:
            where = placement.variable(model, name, shape, trained=own)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

        chosen = {k: x for k, x in param_shapes(model).items() if (k in names) == own}
        return map_named(make, chosen, _is_shape)

    shares = placement.mesh.shape["data"] * placement.mesh.shape["fsdp"]
    needs = step_bytes(
        config,
        model,
        placement,
        arrays(True),
        arrays(False),
        rows=max(rows // shares, 1),
        windows=-(-length // model.beacon.window),
    )
    room, asked = facts.room, config.remat
    for remat in [asked] if asked in needs else ["lean", "lean-layer"]:
        need = needs[remat]
        if facts.kind == "cpu":
            need = PROCESS_BYTES + len(facts.devices) * need
        if room is None or need <= SHARE * room:
            break
    return need, remat


def _size(model: ModelConfig) -> int:
    shapes = jax.tree.leaves(param_shapes(model)["params"], is_leaf=_is_shape)
    return sum(map(math.prod, shapes))


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def _rounded(steps: int) -> int:
    """Rounds down to two digits, so that it reads as what it is: an estimate."""
    unit = 10 ** max(len(str(steps)) - 2, 0)
    return steps // unit * unit
