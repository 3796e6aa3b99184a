"""A tiny random model with a tokenizer, and a text folder, for all evaluation tests."""

from types import SimpleNamespace

import numpy as np
import pytest

from beacon_jax.data.text import load_documents
from beacon_jax.data.tokenizer import train_tokenizer
from beacon_jax.evaluation.inputs import RunSettings, TaskData
from beacon_jax.evaluation.reading import load_model
from beacon_jax.hf.checkpoint import save_hf
from beacon_jax.model.config import BeaconConfig, ModelConfig
from beacon_jax.model.shapes import param_shapes
from tests.evaluation import offline

VOCAB, WINDOW = 400, 32
WORDS = ("window", "beacon", "memory", "slot", "ratio", "digit", "river", "stone")


def random_tree(shapes, rng):
    if isinstance(shapes, dict):
        return {name: random_tree(shape, rng) for name, shape in shapes.items()}
    return rng.normal(0.0, 0.3, shapes).astype(np.float32)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """60 documents of random words, a tenth of them held out."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(60):
        text = " ".join(rng.choice(WORDS, 400))
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, text_folder):
    """An HF folder of a 2-layer model with random weights and beacons."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    train_tokenizer(load_documents(text_folder), tokenizer, VOCAB, 0.3)
    config = ModelConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=512,
        bos_ids=(0,),
        eos_ids=(0,),
        beacon=BeaconConfig(window=WINDOW, ratios=(2, 4)),
    )
    variables = random_tree(param_shapes(config), np.random.default_rng(1))
    save_hf(folder / "hf", config, variables)
    for file in tokenizer.iterdir():
        file.rename(folder / "hf" / file.name)
    return str(folder / "hf")


@pytest.fixture(scope="session")
def settings(text_folder):
    return RunSettings(
        lengths=(96, 128), depths=3, samples=6, text=text_folder, batch_size=4
    )


@pytest.fixture(scope="session")
def model(model_folder):
    return load_model(model_folder, (2, 4))


@pytest.fixture(scope="session")
def inputs(model, settings):
    return TaskData(settings, model.tokenizer)


@pytest.fixture(scope="session", params=["bpe320", "bpe600", "bytes"])
def wanted(request, tmp_path_factory):
    """(stand-in for a model, settings, inputs): generators need no weights."""
    folder = tmp_path_factory.mktemp("prose")
    for i in range(4):
        (folder / f"{i}.txt").write_text(
            f"Part {i}. {offline.PROSE[i:]}", encoding="utf-8"
        )
    if request.param == "bytes":
        tokenizer, lengths = offline.byte_tokenizer(), (1024, 1536)
    else:
        size = int(request.param.removeprefix("bpe"))
        made = tmp_path_factory.mktemp("tokenizer")
        tokenizer = train_tokenizer([offline.PROSE], made, size)
        lengths = (640, 1024)
        tokenizer.chat_template = offline.TEMPLATE if size == 600 else None
    text = str(folder)
    settings = RunSettings(
        lengths=lengths, depths=3, samples=3, text=text, haystack=text
    )
    inputs = TaskData(settings, tokenizer)
    inputs.__dict__["documents"] = inputs.haystack
    return SimpleNamespace(tokenizer=tokenizer, window=32), settings, inputs


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Settings whose text and lengths are enough for all generated tasks."""
    folder = tmp_path_factory.mktemp("long")
    for i in range(20):
        text = f"{i} things. {offline.PROSE}"
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return RunSettings(
        lengths=(384, 512), depths=2, samples=3, text=str(folder), batch_size=2
    )


@pytest.fixture(scope="session")
def long_model(model_folder):
    return load_model(model_folder, (2, 4))


@pytest.fixture(scope="session")
def long_inputs(long_model, small):
    return TaskData(small, long_model.tokenizer)
