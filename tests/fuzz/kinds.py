"""What is damaged, and what a user would do with it: one `Kind` for each sort of file.

Whole inputs are made once, small and at random; each try gets a copy.
"""

import dataclasses
import functools
import hashlib
import json
import math
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save_file

from beacon_jax.data.examples import Rules
from beacon_jax.data.grouped import GroupConfig, GroupedBatches
from beacon_jax.data.inspect import marked, report, sample
from beacon_jax.data.prepare import Preparation, prepare
from beacon_jax.data.text import load_documents
from beacon_jax.hf import adapter, conversion
from beacon_jax.hf.keys import table
from beacon_jax.inference import packs
from beacon_jax.inference.chat import Chat
from beacon_jax.inference.loading import load
from beacon_jax.inference.memory import Memory
from beacon_jax.model.config import ModelConfig
from beacon_jax.resources import TOKENIZER_FILES, asset, load_tokenizer
from beacon_jax.training import own
from beacon_jax.training.check import check_settings
from beacon_jax.training.checkpoint import CheckpointError
from beacon_jax.training.config import default_config, stage
from beacon_jax.training.trainer import export_checkpoint, train
from tests.data.source_files import json_lines, write_csv, write_records, write_stream
from tests.fuzz.device import DEVICE
from tests.fuzz.mutate import (
    damage_bytes,
    damage_files,
    damage_json,
    damage_json_file,
    damage_text,
    write_json,
)
from tests.hf.gguf_files import byte_level, gguf_tensors, metadata, write_gguf

ROOT = Path(__file__).parents[2]
TINY = Path(asset("tiny-base"))
TEXT = "The river carries stones from the hills down to the plain. " * 2
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
BEACON = {
    "beacon_window": 8,
    "beacon_stride": 8,
    "beacon_ratio": [2, 4],
    "beacon_ratio_mix": "step-random",
    "beacon_param": ["q", "k", "v"],
    "beacon_embed_init": "eos",
    "beacon_sink_size": 0,
    "beacon_pos": "interleave",
    "beacon_parallel_window": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
MODELS: dict[str, dict[str, Any]] = {
    "beacon": LLAMA | BEACON,
    "llama3": LLAMA | {"rope_scaling": LLAMA3},
    "yarn": LLAMA | {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    "mistral": LLAMA
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    },
    "qwen2": LLAMA
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 64,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% generation %}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _whole(low: int, high: int = 2**31) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and low <= x < high


def _real(low: float, high: float) -> Callable[[Any], bool]:
    return lambda x: type(x) in (int, float) and math.isfinite(x) and low <= x <= high


def _ids(x: Any) -> bool:
    every = x if isinstance(x, list) else [x]
    return all(_whole(0, LLAMA["vocab_size"])(i) for i in every)


_SWITCH = lambda x: x in (True, False)
# What the keys of config.json that decide about numbers may be: a file with anything
# else must not load. None is as if the key were not there.
SENSIBLE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        [
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
            *("max_position_embeddings", "original_max_position_embeddings"),
            *("beacon_window", "beacon_stride", "beacon_parallel_window"),
        ],
        _whole(1),
    ),
    **dict.fromkeys(
        ["attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"],
        _SWITCH,
    ),
    "rms_norm_eps": _real(1e-30, 1),
    "rope_theta": _real(1e-3, 1e30),
    "factor": _real(1, 1e6),
    "low_freq_factor": _real(1e-6, 1e6),
    "high_freq_factor": _real(1e-6, 1e6),
    "rope_type": lambda x: x in ("default", "linear", "llama3", "yarn"),
    "hidden_act": lambda x: x in ("silu", "swish"),
    "model_type": lambda x: x in ("llama", "mistral", "qwen2"),
    "rope_scaling": lambda x: isinstance(x, dict),
    "rope_parameters": lambda x: isinstance(x, dict),
    "bos_token_id": _ids,
    "eos_token_id": _ids,
    "beacon_sink_size": _whole(0, 9),
    "beacon_ratio": lambda x: x and _ids(x),
    "beacon_param": lambda x: isinstance(x, list) and set(x) <= {*"qkvo"},
    "beacon_pos": lambda x: x in ("interleave", "append"),
    "beacon_embed_init": lambda x: x in ("eos", "bos"),
    "beacon_ratio_mix": lambda x: isinstance(x, str),
}


def nonsense(config: Any) -> str:
    """Names a key of a config.json that cannot be meant; "" if there is none."""
    for key, value in config.items() if isinstance(config, dict) else ():
        known = SENSIBLE.get(key)
        if known and value is not None and not known(value):
            return f"{key}={value!r:.60}"
        if key.startswith("rope_") and (found := nonsense(value)):
            return f"{key}.{found}"
    return ""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A sort of input.

    Attributes:
      make: writes whole inputs, a folder each, below a folder.
      damage: changes an input; returns what it did, and the key of a JSON file that
        it did it to.
      uses: what users do with an input: functions of it and of a folder for what they
        write, which return what is wrong with what they made, or None.
    """

    make: Callable[[Path], None]
    damage: Callable[[random.Random, Path], tuple[str, str]]
    uses: tuple[Callable[[Path, Path], str | None], ...]


# --- whole inputs ------------------------------------------------------------------


def write_model(folder: Path, hf: dict[str, Any], *, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf, indent=2))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [0, 1], "temperature": 0.7})
    )
    for name in TOKENIZER_FILES:
        if (TINY / name).exists():
            (folder / name).write_bytes((TINY / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tensors = weights(hf)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, name in enumerate(names):
        keys = [*tensors][i::shards]
        save_file({k: tensors[k] for k in keys}, folder / name, {"format": "pt"})
    conversion.write_index(folder / "model.safetensors.index.json", names)
    return folder


def weights(hf: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    entries = [e for e in table(ModelConfig.from_hf(hf)) if e.keys]
    return {
        key: (0.1 * rng.normal(size=e.hf_shape)).astype(np.float32)
        for e in entries
        for key in e.keys
    }


def make_models(root: Path) -> None:
    for name, hf in MODELS.items():
        write_model(root / name, hf)


def make_beacon(root: Path) -> None:
    write_model(root / "model", MODELS["beacon"])


def make_sharded(root: Path) -> None:
    write_model(root / "model", MODELS["beacon"], shards=3)


def make_converted(root: Path) -> None:
    for name in ("beacon", "llama3"):
        conversion.from_hf(write_model(root / "hf", MODELS[name]), root / name)
        _remove(root / "hf")


def make_adapter(root: Path) -> None:
    src = write_model(root / "adapter" / "base", MODELS["beacon"])
    adapter.write_adapter(src, root / "adapter" / "beacons")


def make_gguf(root: Path) -> None:
    for arch in ("llama", "qwen2"):
        tokens = byte_level(["the", " river", " stones"], "qwen2")
        size = len(tokens["tokenizer.ggml.tokens"])
        hf = MODELS["beacon" if arch == "llama" else arch] | {"vocab_size": size}
        hf = {k: v for k, v in hf.items() if not k.startswith("beacon")}
        hf["tie_word_embeddings"] = False
        values = metadata(hf) | tokens
        (root / arch).mkdir()
        write_gguf(root / arch / "m.gguf", arch, values, gguf_tensors(hf, weights(hf)))


@functools.cache
def beacon_model() -> Any:
    """The model that wrote the packs; one for all tries."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="fuzz-model-")) / "model"
    return load(write_model(folder, MODELS["beacon"]))


def make_packs(root: Path) -> None:
    for name, options in (("plain", {}), ("recent", {"recent": True})):
        (root / name).mkdir(parents=True)
        memory = beacon_model().compress(TEXT, ratio=4, **options)
        memory.save(root / name / "a.beacon")


ROWS = [
    *(
        {"text": f"Row {i}: the river carries stones, é. " * (1 + i % 4)}
        for i in range(9)
    ),
    {
        "conversations": [
            {"role": "user", "content": "What about the river?"},
            {"role": "assistant", "content": [{"type": "text", "text": "Stones."}]},
        ]
    },
    {"messages": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]},
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    {"instruction": "Count.", "output": "One, two.", "input": "to two"},
    {"prompt": "A question", "completion": " and its answer"},
]
PLAIN = ROWS[:9]


def make_rows(root: Path) -> None:
    for name in ("jsonl", "json", "csv", "parquet", "arrow", "array_record", "txt"):
        (root / name).mkdir(parents=True)
    (root / "jsonl" / "a.jsonl").write_bytes(json_lines(ROWS))
    (root / "json" / "a.json").write_text(json.dumps(ROWS))
    write_csv(root / "csv" / "a.csv", PLAIN)
    turns = [row["conversations"] for row in ROWS if "conversations" in row]
    columns = pyarrow.table(
        {
            "text": [*(row["text"] for row in PLAIN), None],
            "input_ids": pyarrow.array([[1, 2, 3]] * 9 + [None]),
            "messages": [None] * 9
            + [[{"role": turn["role"], "content": "Hello."} for turn in turns[0]]],
        }
    )
    pyarrow.parquet.write_table(columns, root / "parquet" / "a.parquet")
    write_stream(root / "arrow" / "a.arrow", columns)
    lines = [json.dumps(row).encode() for row in ROWS]
    write_records(root / "array_record" / "a.array_record", lines)
    (root / "txt" / "a.txt").write_text(TEXT * 20, encoding="utf-8")
    (root / "txt" / "b.md").write_text("# é\n" + TEXT * 3, encoding="utf-8")


def _settings(source: Path, tokenizer: Path = TINY) -> Preparation:
    return Preparation((str(source),), str(tokenizer), Rules(0, 64, "no", "split"))


def make_prepared(root: Path) -> None:
    source = root.parent / f"{root.name}-source.jsonl"
    source.write_bytes(json_lines(ROWS))
    prepare(_settings(source), root / "data", workers=1, max_drop_fraction=1.0)
    (root / "data" / ".lock").unlink()


def make_workdir(root: Path) -> None:
    folder = root / "run"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_chosen().to_dict()))


def make_run(root: Path) -> None:
    """A run of two steps with two checkpoints, whose base lies elsewhere."""
    base = write_model(root.parent / f"{root.name}-base", LLAMA)
    config = default_config()
    config.init_from, config.data.sources = str(base), (_text(),)
    config.beacon.update({"window": 8, "ratios": (2, 4)})
    config.data.stages.stage1 = stage(2, 24, 1)
    config.update({"log_every": 1, "save_every": 1})
    config.mesh.data = 1
    train(config, root / "run")
    _remove(root / "run" / "export")


@functools.cache
def _text() -> str:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="fuzz-text-"))
    for i in range(20):
        (folder / f"{i}.txt").write_text(TEXT * 30)
    return str(folder)


def _own_config() -> Any:
    config = runpy.run_path(str(ROOT / "configs/own.py"))["get_config"]()
    config.init_from, config.data.sources = str(TINY), (_text(),)
    return config.lock()


@functools.cache
def _chosen() -> Any:
    import tempfile

    return own.choose(_own_config(), Path(tempfile.mkdtemp()), lambda line: None)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


# --- damage ------------------------------------------------------------------------


def json_files(*patterns: str) -> Callable[[random.Random, Path], tuple[str, str]]:
    """Damages one of the JSON files of these names."""

    def damage(rng: random.Random, folder: Path) -> tuple[str, str]:
        names = sorted(path for p in patterns for path in folder.rglob(p))
        return damage_json_file(rng, rng.choice(names))

    return damage


def damage_header(rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damages the header of a safetensors file: its JSON, its length or its bytes."""
    path = rng.choice(sorted(folder.rglob("*.safetensors")))
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        data, what = damage_bytes(rng, data, end)
        path.write_bytes(data)
        return f"{path.name}: {what}", ""
    value, what, _ = damage_json(rng, json.loads(data[8:end]))
    header = write_json(value)
    size = len(header)
    if rng.random() < 0.1:
        size = rng.choice((0, size - 1, size + 1, 2**40, 2**64 - 1))
    path.write_bytes(size.to_bytes(8, "little") + header + data[end:])
    return f"{path.name}: {what}", ""


def damage_whole(rng: random.Random, folder: Path) -> tuple[str, str]:
    if rng.random() < 0.2:
        path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
        data, what = damage_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.name}: {what}", ""
    return damage_files(rng, folder), ""


def damage_tokenizer(rng: random.Random, folder: Path) -> tuple[str, str]:
    template = folder / "chat_template.jinja"
    if rng.random() < 0.2:
        template.unlink(missing_ok=True)
        texts = (
            *("{{ messages[99].content }}", "{% for %}", "{{ raise_exception('no') }}"),
            *("", "{{ 1/0 }}", "{{ messages | tojson }}", "\ud800{{ x.y.z }}", "{{"),
            *("{{ bos_token * 3 }}{{ messages[0]['content'] }}", "{{ none.x }}", "é\0"),
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "{% for i in range(10**4) %}{{ messages[0].content }}{% endfor %}",
        )
        text = rng.choice(texts)
        template.write_bytes(text.encode("utf-8", "surrogatepass"))
        return f"{template.name}: {text!r}", ""
    if rng.random() < 0.1:
        data, what = rng.choice((damage_bytes, damage_text))(rng, template.read_bytes())
        template.write_bytes(data)
        return f"{template.name}: {what}", ""
    if rng.random() < 0.15:
        (folder / rng.choice(TOKENIZER_FILES)).write_bytes(
            write_json(rng.choice(({}, [], None, {"a": 1}, "x", {"<x>": 10**30})))
        )
        return "another file of a tokenizer", ""
    names = ("tokenizer.json", "tokenizer_config.json")
    return damage_json_file(rng, folder / rng.choice(names))


def damage_gguf(rng: random.Random, folder: Path) -> tuple[str, str]:
    path = folder / "m.gguf"
    data = path.read_bytes()
    reach = rng.choice((64, 1200, len(data) - 30_000, None))
    data, what = damage_bytes(rng, data, reach)
    path.write_bytes(data)
    return f"{path.name}: {what}", ""


def damage_pack(rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damages a pack; or its manifest, and writes a pack of that manifest.

    The latter is what another version or program might have written.
    """
    path = folder / "a.beacon"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        data, what = damage_bytes(rng, data, rng.choice((20, end, None)))
        path.write_bytes(data)
        return f"{path.name}: {what}", ""
    header = json.loads(data[8:end])
    manifest = json.loads(header["__metadata__"]["manifest"])
    value, what, _ = damage_json(rng, manifest)
    text = write_json(value).decode()
    if rng.random() < 0.1:
        text, what = (
            rng.choice(("", "[", "7", "null", "{", "\ud800", text * 2)),
            "other",
        )
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    header["__metadata__"] |= {"manifest": text, "manifest_sha256": digest}
    tensors = value.get("tensors") if isinstance(value, dict) else None
    if rng.random() < 0.5 and isinstance(tensors, dict):
        for name in [*header]:  # a header that fits the manifest
            if name != "__metadata__" and isinstance(tensors.get(name), dict):
                for key in ("dtype", "shape"):
                    header[name][key] = tensors[name].get(key)
    if rng.random() < 0.1:
        value, what, _ = damage_json(rng, header)
        header = value
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    path.write_bytes(len(written).to_bytes(8, "little") + written + data[end:])
    return f"{path.name} with a checksum that fits: {what}", ""


def damage_rows(rng: random.Random, folder: Path) -> tuple[str, str]:
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data, kind = path.read_bytes(), rng.random()
    if path.suffix in (".jsonl", ".json") and kind < 0.7:
        rows = [json.loads(json.dumps(row)) for row in ROWS]
        done = []
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(rows))
            rows[at], what, _ = damage_json(rng, rows[at])
            done.append(f"row {at}: {what}")
            if not isinstance(rows[at], dict | list) or not rows[at]:
                rows[at] = {"text": rows[at]}
        parts = [write_json(row) for row in rows]
        lines = path.suffix == ".jsonl"
        path.write_bytes(
            b"\n".join(parts) if lines else b"[" + b",\n".join(parts) + b"]"
        )
        return f"{path.name}: {'; '.join(done)}", ""
    if path.suffix == ".parquet" and kind < 0.5:
        return f"{path.name}: {_odd_columns(rng, path)}", ""
    if path.suffix in (".txt", ".md", ".csv", ".json", ".jsonl") and kind < 0.8:
        data, what = damage_text(rng, data)
    elif kind < 0.9:
        data, what = damage_bytes(rng, data)
    else:
        return damage_files(rng, folder), ""
    path.write_bytes(data)
    return f"{path.name}: {what}", ""


def _odd_columns(rng: random.Random, path: Path) -> str:
    """Writes a parquet file whose columns have other types than expected."""
    import datetime

    values: dict[str, Any] = {
        "numbers": [1, 2, None],
        "floats": [0.5, float("nan"), None],
        "bytes": [b"\xff\xfe", b"text", None],
        "dates": [datetime.datetime(2020, 1, 1)] * 3,
        "structs": [{"a": 1}, {"a": None}, None],
        "lists of lists": [[["a"]], [], None],
        "huge": pyarrow.array([2**63, 2**64 - 1, None], "uint64"),
        "decimals": pyarrow.array([1, 2, None]).cast(pyarrow.decimal128(30, 2)),
        "dictionary": pyarrow.array(["a", "b", None]).dictionary_encode(),
        "nulls": pyarrow.nulls(3),
        "lists": pyarrow.array([[1, None], [], None]),
        "fixed lists": pyarrow.array([[1, 2]] * 3, pyarrow.list_(pyarrow.int32(), 2)),
        "views": pyarrow.array(["a", "b", None]).cast(pyarrow.string_view()),
        "maps": pyarrow.array(
            [[("a", 1)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.int32())
        ),
        "durations": pyarrow.array([1, 2**62, None], pyarrow.duration("s")),
        "times": pyarrow.array([2**53, -(2**53), None], pyarrow.timestamp("s")),
    }
    columns = {}
    for name in rng.sample(
        ["text", "input_ids", "labels", "messages", "conversations", "content"], 2
    ):
        kind = rng.choice([*values])
        columns[name] = (kind, values[kind])
    table = pyarrow.table({name: value for name, (_, value) in columns.items()})
    pyarrow.parquet.write_table(table, path)
    return ", ".join(f"{name} of {kind}" for name, (kind, _) in columns.items())


def damage_run(rng: random.Random, folder: Path) -> tuple[str, str]:
    if rng.random() < 0.5:
        return damage_json_file(rng, folder / "config.json")
    newest = folder / "checkpoints" / "2"
    return rng.choice((json_files("*METADATA", "_sharding"), damage_whole))(rng, newest)


def damage_prepared(rng: random.Random, folder: Path) -> tuple[str, str]:
    if rng.random() < 0.6:
        return damage_json_file(rng, folder / "manifest.json")
    return damage_whole(rng, folder)


# --- what users do -----------------------------------------------------------------


def _loads(folder: Path, out: Path) -> str | None:
    load(folder)
    return _meant(folder)


def _converts(folder: Path, out: Path) -> str | None:
    conversion.from_hf(folder, out / "ours")
    return _meant(folder)


def _trains(folder: Path, out: Path) -> str | None:
    """Checks what a training run checks before it reads weights."""
    config = runpy.run_path(str(ROOT / "configs/own.py"))["get_config"]()
    config.init_from, config.data.sources = str(folder), (_text(),)
    config.tokenizer.path = str(TINY)
    check_settings(own.choose(config.lock(), out / "new", lambda line: None), out)
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


def _continues(folder: Path, out: Path) -> str | None:
    model = beacon_model()
    memory = Memory.load(folder / "a.beacon", model)
    model.generate("Who?", memory=memory, max_new_tokens=2)
    return None


def _shows_pack(folder: Path, out: Path) -> str | None:
    packs.read_manifest(folder / "a.beacon")
    Memory.load(folder / "a.beacon").describe()
    return None


def _prepares(folder: Path, out: Path) -> str | None:
    settings = _settings(folder)
    data = prepare(settings, out / "data", workers=1, max_drop_fraction=1.0)
    return _inspects(data)


def _prepares_strictly(folder: Path, out: Path) -> str | None:
    return _inspects(prepare(_settings(folder), out / "data", workers=1))


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
    source = folder.parent.parent / "whole" / "prepared-source.jsonl"
    return _inspects(prepare(_settings(source), folder, workers=1))


def _exports(folder: Path, out: Path) -> str | None:
    try:
        step = export_checkpoint(folder, out / "hf")
    except CheckpointError:
        DEVICE.reset()  # arrays are read when their places are made
        raise
    return None if step in (1, 2) else f"step {step} was exported"


def _goes_on(folder: Path, out: Path) -> str | None:
    made = own.choose(_own_config(), folder, lambda line: None)
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
    "gguf": Kind(make_gguf, damage_gguf, (_reads_gguf, _converts_gguf)),
    "pack": Kind(make_packs, damage_pack, (_continues, _continues, _shows_pack)),
    "rows": Kind(make_rows, damage_rows, (_prepares, _prepares_strictly, _reads_text)),
    "prepared": Kind(make_prepared, damage_prepared, (_trains_on,)),
    "run": Kind(make_run, damage_run, (_exports,)),
    "workdir": Kind(make_workdir, json_files("config.json"), (_goes_on,)),
}
