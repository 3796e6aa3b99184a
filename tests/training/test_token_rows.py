"""Tokens that the base has no embedding of end a run before its first step."""

from types import SimpleNamespace

import numpy as np
import pytest

from beacon_jax import hf
from beacon_jax.cli import prepare as command
from beacon_jax.data.batches import BatchConfig, Batches
from beacon_jax.data.tokenizer import encode_stream
from beacon_jax.training.config import stage
from beacon_jax.training.initial import embedding_rows
from beacon_jax.training.trainer import train

ROWS = 290
SAID = r"the model has 0 to 289: 290 \('<tool>'\) has no row in its embedding"


@pytest.fixture
def longer(base, tmp_path):
    """The base's tokenizer with a token more, in a folder of its own."""
    tokenizer = hf.load_tokenizer(base / "export")
    assert len(tokenizer) == ROWS
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    return tmp_path / "tokenizer"


@pytest.fixture
def config(config, longer, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "word1 and 2"}\n{"text": "word3 <tool> and 4"}\n' * 40)
    config.tokenizer.path = str(longer)
    config.data.sources = (str(file),)
    return config


def whole_rows(config):
    del config.data.stages["stage1"]
    config.data.update({"group": "pad", "workers": 1, "heldout": 0.0})
    return config


def test_a_run_on_cut_text_does_not_begin(config, tmp_path):
    assert embedding_rows(config) == ROWS
    with pytest.raises(ValueError, match=f"the text of data.sources has .*{SAID}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run/export").exists()


def test_a_run_on_whole_rows_does_not_begin(config, tmp_path):
    with pytest.raises(ValueError, match=f"text.jsonl:2 has .*{SAID}"):
        train(whole_rows(config), tmp_path / "run")
    assert not (tmp_path / "run/export").exists()


def test_preparing_by_a_command_says_so_too(config, tmp_path):
    values = SimpleNamespace(config=whole_rows(config), workers=1, overwrite=False)
    with pytest.raises(ValueError, match=f"text.jsonl:2 has .*{SAID}"):
        command.from_flags(values, tmp_path / "data")


def test_rows_that_are_drawn_have_tokens_of_the_embedding(config, longer):
    tokenizer = hf.load_tokenizer(longer)
    stream = encode_stream(["word1 and 2 " * 300], tokenizer)
    config.data.stages.stage1 = stage(20, 24, 4, text=0.0, repeat=1.0)
    made = Batches(stream, tokenizer, BatchConfig.of(config), 280)
    tokens = np.concatenate([made.batch(i)["tokens"] for i in range(20)])
    assert tokens.max() == 279
    config.data.stages.stage1 = stage(20, 64, 4, text=0.0, passkey=1.0)
    digits = tokenizer.convert_tokens_to_ids([*"0123456789"])
    few = Batches(stream, tokenizer, BatchConfig.of(config), min(digits))
    with pytest.raises(ValueError, match="the batch of step 1 has .* has no row"):
        few.batch(0)


def test_without_a_base_the_embedding_is_made_for_the_tokenizer(config, tmp_path):
    config.init_from = ""
    assert embedding_rows(config) is None
    config.init_from = "nobody/nothing"  # on another machine: its own tokenizer is here
    assert embedding_rows(config) is None
    config.init_from = config.tokenizer.path  # tokenizer files alone
    assert embedding_rows(config) is None
