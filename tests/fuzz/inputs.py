"""Makes whole inputs, small and at random: a folder for each."""

import bz2
import contextlib
import functools
import gzip
import json
import lzma
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors.numpy import save_file

from beacon_jax.data import prepare as preparing
from beacon_jax.data.examples import Rules
from beacon_jax.data.prepare import Preparation, prepare
from beacon_jax.hf import adapter, conversion
from beacon_jax.hf.keys import table
from beacon_jax.inference.compressors import Retention
from beacon_jax.inference.loading import load
from beacon_jax.model.config import ModelConfig
from beacon_jax.resources import TOKENIZER_FILES, asset
from beacon_jax.training import own
from beacon_jax.training.config import default_config, stage
from beacon_jax.training.trainer import train
from tests.data.source_files import (
    indented,
    json_lines,
    write_csv,
    write_records,
    write_stream,
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
    "qwen3": LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": False,
    },
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    "{% generation %}{% endgeneration %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
        shutil.rmtree(root / "hf")


def make_adapter(root: Path) -> None:
    src = write_model(root / "adapter" / "base", MODELS["beacon"])
    adapter.write_adapter(src, root / "adapter" / "beacons")


def make_retention(root: Path) -> None:
    rng = np.random.default_rng(0)
    some = lambda *shape: rng.normal(size=shape).astype(np.float32)
    made = Retention(some(2, 2, 8), 0.5, 0.25, some(2, 8))
    made.save(root / "scores")
    made.with_correction(some(2, 2, 8)).save(root / "corrected")


def make_gguf(root: Path) -> None:
    for arch in ("llama", "qwen2", "qwen3"):
        tokens = byte_level(["the", " river", " stones"], "qwen2")
        size = len(tokens["tokenizer.ggml.tokens"])
        hf = MODELS["beacon" if arch == "llama" else arch] | {"vocab_size": size}
        hf = {k: v for k, v in hf.items() if not k.startswith("beacon")}
        hf["tie_word_embeddings"] = False
        values = metadata(hf) | tokens
        (root / arch).mkdir()
        write_gguf(root / arch / "m.gguf", arch, values, gguf_tensors(hf, weights(hf)))


@functools.cache
def beacon_model(home: Path) -> Any:
    """The model that wrote the packs; one for all tries."""
    return load(write_model(home / "model", MODELS["beacon"]))


def make_packs(root: Path) -> None:
    made = {
        "plain": {},
        "recent": {"recent": True},
        "biased": {"method": "attention-matching"},
    }
    for name, options in made.items():
        (root / name).mkdir(parents=True)
        memory = beacon_model(root.parents[1]).compress(TEXT, ratio=4, **options)
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
    {
        "system": "Be brief.",
        "history": [],  # turns in it would be more than chat_template=no writes
        "prompt": [{"role": "User", "text": "Why?"}],
        "response": "So.",
    },
    {"question": "Who?", "answers": {"text": ["I.", "Me."], "answer_start": [1, 2]}},
    {
        "dialogue": '[{"role": "user", "content": "So?"}, '
        '{"role": "ai", "content": ["Yes", "."], "weight": 0}]',
        "tools": [1],
    },
]
PLAIN = ROWS[:9]


def make_rows(root: Path) -> None:
    for name in ("jsonl", "json", "csv", "parquet", "arrow", "array_record", "txt"):
        (root / name).mkdir(parents=True)
    for name, pack in (
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
    ):
        (root / name).mkdir()
        (root / name / f"a.jsonl.{name}").write_bytes(pack(json_lines(ROWS)))
        (root / name / f"b.txt.{name}").write_bytes(pack(TEXT.encode("utf-16")))
    (root / "objects").mkdir()
    (root / "objects" / "a.ndjson").write_bytes(indented(ROWS))
    write_csv(root / "objects" / "b.tsv", PLAIN, dialect="excel-tab")
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


def settings_of(source: Path, tokenizer: Path = TINY) -> Preparation:
    return Preparation((str(source),), str(tokenizer), Rules(0, 64, "no", "split"))


def make_prepared(root: Path) -> None:
    source = root.parent / f"{root.name}-source.jsonl"
    source.write_bytes(json_lines(ROWS))
    prepare(settings_of(source), root / "data", workers=1, max_drop_fraction=1.0)
    (root / "data" / ".lock").unlink()


def make_unfinished(root: Path) -> None:
    """A folder whose preparation was killed before its last files."""
    source = root.parent / f"{root.name}-source.jsonl"
    source.write_bytes(json_lines(ROWS))

    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    finish, preparing._finish = preparing._finish, kill
    try:
        with contextlib.suppress(Killed):
            prepare(
                settings_of(source), root / "data", workers=1, max_drop_fraction=1.0
            )
    finally:
        preparing._finish = finish
    (root / "data" / ".lock").unlink()


def make_texts(root: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "text").mkdir()
    (root / "text" / "a.txt").write_text(f"é {TEXT}", encoding="utf-8")


def make_workdir(root: Path) -> None:
    folder = root / "run"
    folder.mkdir(parents=True)
    config = own_config(TINY, root.parents[1])
    made = own.choose(config, folder, lambda line: None)
    (folder / "config.json").write_text(json.dumps(made.to_dict()))


def make_run(root: Path) -> None:
    """A run of two steps with two checkpoints, whose base lies elsewhere."""
    base = write_model(root.parent / f"{root.name}-base", LLAMA)
    config = default_config()
    config.init_from, config.data.sources = str(base), (run_text(root.parents[1]),)
    config.beacon.update({"window": 8, "ratios": (2, 4)})
    config.data.stages.stage1 = stage(2, 24, 1)
    config.update({"log_every": 1, "save_every": 1})
    config.mesh.data = 1
    train(config, root / "run")
    shutil.rmtree(root / "run" / "export")


@functools.cache
def run_text(home: Path) -> str:
    """A folder of text to train on; one for all tries."""
    folder = home / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(TEXT * 30)
    return str(folder)


def own_config(base: Path, home: Path) -> Any:
    """configs/own.py, as a user would begin with it."""
    config = runpy.run_path(str(ROOT / "configs/own.py"))["get_config"]()
    config.init_from, config.data.sources = str(base), (run_text(home),)
    return config.lock()
