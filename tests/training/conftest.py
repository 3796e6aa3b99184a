"""A tiny text folder and a tiny base model trained on it, shared by the tests."""

import copy

import pytest
from ml_collections import ConfigDict

from beacon_jax.training.config import default_config, stage
from beacon_jax.training.trainer import train


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        words = " ".join(f"word{(i * j) % 7} and {j}" for j in range(60))
        (folder / f"{i}.txt").write_text(words, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def base(text, tmp_path_factory):
    """The workdir of a plain model's run of 25 steps."""
    config = default_config()
    config.trainable = "all"
    config.beacon.use = False
    config.data.sources = (str(text),)
    config.tokenizer.update({"train": True, "vocab_size": 300})
    config.model = ConfigDict(
        {
            "family": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 8,
            "max_position": 64,
        }
    )
    config.data.stages.stage1 = stage(25, 24, 4)
    config.optimizer.update({"name": "muon", "lr": 2e-2, "adam_lr": 2e-2})
    config.log_every = 5
    workdir = tmp_path_factory.mktemp("base")
    train(config, workdir)
    return workdir


@pytest.fixture(scope="session")
def six_steps(base, text):
    config = default_config()
    config.init_from = str(base / "export")
    config.data.sources = (str(text),)
    config.beacon.update({"window": 8, "ratios": (2, 4)})
    config.data.stages.stage1 = stage(6, 24, 2)
    config.optimizer.update({"lr": 1e-3, "warmup": 2, "decay_start": 0.5})
    config.update({"log_every": 1, "save_every": 2, "keep": 3})
    return config


@pytest.fixture
def config(six_steps):
    """Six steps of beacons on the base."""
    return copy.deepcopy(six_steps)


@pytest.fixture(scope="session")
def finished(six_steps, tmp_path_factory):
    """The workdir of these steps, with checkpoints of 2, 4 and 6: not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    train(copy.deepcopy(six_steps), workdir)
    return workdir
