"""What is damaged, and what a user would do with it: one `Kind` for each."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from beacon_jax.cli import context
from beacon_jax.data.examples import Rules
from beacon_jax.data.grouped import GroupConfig, GroupedBatches
from beacon_jax.data.inspect import marked, report, sample
from beacon_jax.data.prepare import Preparation, prepare
from beacon_jax.data.text import load_documents
from beacon_jax.hf import conversion
from beacon_jax.inference import packs
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.compressors import Retention, find
from beacon_jax.inference.loading import load
from beacon_jax.inference.memory import Memory
from beacon_jax.resources import load_tokenizer
from beacon_jax.training import own
from beacon_jax.training.check import check_settings
from beacon_jax.training.checkpoint import CheckpointError
from beacon_jax.training.trainer import export_checkpoint
from tests.data.source_files import json_lines
from tests.fuzz.damage import (
    damage_gguf,
    damage_header,
    damage_pack,
    damage_prepared,
    damage_rows,
    damage_run,
    damage_tokenizer,
    damage_whole,
    json_files,
)
from tests.fuzz.device import DEVICE
from tests.fuzz.inputs import (
    LLAMA,
    ROWS,
    TEXT,
    TINY,
    beacon_model,
    make_adapter,
    make_beacon,
    make_converted,
    make_gguf,
    make_models,
    make_packs,
    make_prepared,
    make_retention,
    make_rows,
    make_run,
    make_sharded,
    make_texts,
    make_unfinished,
    make_workdir,
    own_config,
    settings_of,
)
from tests.fuzz.sense import nonsense


@dataclasses.dataclass(frozen=True)
class Kind:
    """A sort of input.

    Attributes:
      make: writes whole inputs, a folder each, below a folder.
      damage: changes an input; returns what it did, and the key of a JSON file that
        it did it to.
      uses: what users do with an input: functions of it and of a folder for what they
        write, which return what is wrong with what they made, or None.
      writes: whether they go on with the input itself.
    """

    make: Callable[[Path], None]
    damage: Callable[[random.Random, Path], tuple[str, str]]
    uses: tuple[Callable[[Path, Path], str | None], ...]
    writes: bool = False


def _loads(folder: Path, out: Path) -> str | None:
    load(folder)
    return _meant(folder)


def _converts(folder: Path, out: Path) -> str | None:
    conversion.from_hf(folder, out / "ours")
    return _meant(folder)


def _trains(folder: Path, out: Path) -> str | None:
    """Checks what a training run checks before it reads weights."""
    config = own_config(folder, folder.parents[1])
    config.tokenizer.path = str(TINY)
    check_settings(own.choose(config, out / "new", lambda line: None), out)
    return _meant(folder)


def _meant(folder: Path) -> str | None:
    try:
        hf = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return "a config.json that is none was used"
    found = nonsense(hf)
    return f"{found} was used" if found else None


def _writes_hf(folder: Path, out: Path) -> str | None:
    conversion.to_hf(folder, out / "hf")
    return _meant(folder)


def _adapts(folder: Path, out: Path) -> str | None:
    load(folder / "base", beacons=folder / "beacons")
    return _meant(folder / "beacons")


def _reads_gguf(folder: Path, out: Path) -> str | None:
    load(folder / "m.gguf")
    found = nonsense(conversion.read_config(folder / "m.gguf"))
    return f"{found} was used" if found else None


def _converts_gguf(folder: Path, out: Path) -> str | None:
    conversion.from_hf(folder / "m.gguf", out / "ours")
    return None


def _loaded(folder: Path) -> Any:
    model = load(folder)
    DEVICE.reset()  # errors from here on are about what it is asked
    return model


def _generates(folder: Path, out: Path) -> str | None:
    _loaded(folder).generate(TEXT[:20], max_new_tokens=2)
    return None


def _asks(folder: Path, out: Path) -> str | None:
    _loaded(folder).generate("Who?", max_new_tokens=2, instruct=True)
    return None


def _chats(folder: Path, out: Path) -> str | None:
    Chat(_loaded(folder), system="Be short.", max_new_tokens=2).say("Who?")
    return None


def _prepares_with(folder: Path, out: Path) -> str | None:
    source = out / "a.jsonl"
    source.write_bytes(json_lines(ROWS))
    settings = Preparation((str(source),), str(folder), Rules(0, 64, "hf", "split"))
    prepare(settings, out / "data", workers=1, max_drop_fraction=1.0)
    return None


def _scores(folder: Path, out: Path) -> str | None:
    made = find(f"retention:{folder}")
    assert isinstance(made, Retention)
    numbers = [made.weights, made.sample, made.bias, made.threshold]
    numbers += [] if made.correction is None else [made.correction]
    finite = all(np.isfinite(x).all() for x in numbers)
    return None if finite else "values that are no numbers would be used"


def _continues(folder: Path, out: Path) -> str | None:
    model = beacon_model(folder.parents[1])
    memory = Memory.load(folder / "a.beacon", model)
    model.generate("Who?", memory=memory, max_new_tokens=2)
    return None


def _shows_pack(folder: Path, out: Path) -> str | None:
    packs.read_manifest(folder / "a.beacon")
    Memory.load(folder / "a.beacon").describe()
    return None


def _prepares(folder: Path, out: Path) -> str | None:
    settings = settings_of(folder)
    data = prepare(settings, out / "data", workers=1, max_drop_fraction=1.0)
    return _inspects(data)


def _prepares_strictly(folder: Path, out: Path) -> str | None:
    return _inspects(prepare(settings_of(folder), out / "data", workers=1))


def _reads_text(folder: Path, out: Path) -> str | None:
    load_documents(str(folder), "all", turns=True, quiet=True)
    return None


def _inspects(data: Any) -> str | None:
    """Does what `inspect` shows, and reads what training would read."""
    config = GroupConfig(8, 2, "relaxed")
    report(data, config)
    marked(data.read(sample(data)), load_tokenizer(TINY))
    batches = GroupedBatches(data, config)
    for step in range(min(batches.steps, 20)):
        batch = batches.batch(step)
        tokens = batch["tokens"]
        if tokens.min() < 0 or tokens.max() >= LLAMA["vocab_size"]:
            return f"tokens from {tokens.min()} to {tokens.max()} would be trained"
    return None


def _trains_on(folder: Path, out: Path) -> str | None:
    source = folder.parents[1] / "whole" / "prepared-source.jsonl"
    return _inspects(prepare(settings_of(source), folder, workers=1))


def _exports(folder: Path, out: Path) -> str | None:
    try:
        step = export_checkpoint(folder, out / "hf")
    except CheckpointError:
        DEVICE.reset()  # arrays are read when their places are made
        raise
    return None if step in (1, 2) else f"step {step} was exported"


def _finishes(folder: Path, out: Path) -> str | None:
    source = folder.parents[1] / "whole" / "unfinished-source.jsonl"
    settings = settings_of(source)
    return _inspects(prepare(settings, folder, workers=1, max_drop_fraction=1.0))


def _reads_context(folder: Path, out: Path) -> str | None:
    context.read_text("context", str(folder / "a.txt"))
    return None


def _goes_on(folder: Path, out: Path) -> str | None:
    made = own.choose(own_config(TINY, folder.parents[1]), folder, lambda line: None)
    check_settings(made, out)
    return None


KINDS = {
    "config": Kind(
        make_models, json_files("config.json"), (_loads, _loads, _converts, _trains)
    ),
    "generation": Kind(
        make_beacon, json_files("generation_config.json"), (_generates,)
    ),
    "weights": Kind(make_models, damage_header, (_loads, _converts)),
    "index": Kind(
        make_sharded,
        json_files("model.safetensors.index.json"),
        (_loads, _converts, _trains),
    ),
    "files": Kind(make_sharded, damage_whole, (_loads, _converts, _trains, _asks)),
    "tokenizer": Kind(
        make_beacon, damage_tokenizer, (_generates, _asks, _chats, _prepares_with)
    ),
    "converted": Kind(
        make_converted,
        lambda rng, folder: rng.choice(
            (json_files("beacon_jax.json", "config.json"), damage_header, damage_whole)
        )(rng, folder),
        (_loads, _writes_hf),
    ),
    "adapter": Kind(
        make_adapter,
        lambda rng, folder: rng.choice(
            (json_files("config.json"), damage_header, damage_whole)
        )(rng, folder / "beacons"),
        (_adapts,),
    ),
    "retention": Kind(
        make_retention,
        lambda rng, folder: rng.choice((damage_header, damage_whole))(rng, folder),
        (_scores,),
    ),
    "gguf": Kind(make_gguf, damage_gguf, (_reads_gguf, _converts_gguf)),
    "pack": Kind(make_packs, damage_pack, (_continues, _continues, _shows_pack)),
    "rows": Kind(make_rows, damage_rows, (_prepares, _prepares_strictly, _reads_text)),
    "prepared": Kind(make_prepared, damage_prepared, (_trains_on,)),
    "run": Kind(make_run, damage_run, (_exports,)),
    "unfinished": Kind(make_unfinished, damage_whole, (_finishes,), writes=True),
    "texts": Kind(make_texts, damage_whole, (_reads_context,)),
    "workdir": Kind(make_workdir, json_files("config.json"), (_goes_on,)),
}
