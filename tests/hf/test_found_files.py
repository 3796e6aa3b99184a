"""Files as they are found: pointers of git-lfs, old indexes, broken tokenizers."""

import json
import logging
import shutil

import pytest

from beacon_jax.hf import load, load_tokenizer
from beacon_jax.resources import asset

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:0123456789abcdef0123456789abcdef\nsize 123456\n"
)


@pytest.fixture
def folder(make_checkpoint, config_of):
    return make_checkpoint(config_of("llama"))


@pytest.fixture
def tokenizer(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(f"{asset('tiny-base')}/{name}", tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_no_file(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name} is a pointer of git-lfs"):
        load(folder)


def test_a_pointer_may_be_a_gguf_file_an_index_or_a_tokenizer(folder, tokenizer):
    gguf = folder.parent / "model.gguf"
    gguf.write_text(POINTER)
    with pytest.raises(ValueError, match=r"model\.gguf is a pointer of git-lfs"):
        load(gguf)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"index\.json is a pointer of git-lfs"):
        load(folder)
    (tokenizer / "tokenizer.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer\.json is a pointer of git-lfs"):
        load_tokenizer(tokenizer)


def test_a_whole_file_wins_over_an_index_of_files_that_are_gone(folder, caplog):
    gone = {"model.norm.weight": "model-00001-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": gone}))
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert "model-00001-of-00002.safetensors" in caplog.text
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="names files that are not there"):
        load(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', "{"]
)
def test_an_index_of_another_structure_is_named(folder, content):
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(folder)
    (folder / "model-1.safetensors").rename(folder / "model.safetensors")
    load(folder)  # a whole file needs none


@pytest.mark.parametrize("content", ["[1]", "null", '"llama"', "{", ""])
def test_a_config_that_is_no_object_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|has )"):
        load(folder)


def test_a_config_may_have_a_byte_order_mark(folder):
    text = (folder / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    load(folder)


@pytest.mark.parametrize(
    "content",
    [
        '{"version": "2.0", "model": {"type": "NewKind"}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": [], "merges": 3}}',
        "[]",
        "{",
        "",
    ],
)
def test_a_tokenizer_that_the_library_cannot_read_says_so(tokenizer, content):
    (tokenizer / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json.* cannot be read") as error:
        load_tokenizer(tokenizer)
    assert "pip install -U tokenizers transformers" in str(error.value)


def test_a_lone_tokenizer_model_says_what_is_needed(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00")
    with pytest.raises(ValueError, match=r"a tokenizer\.json is needed"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_loads_without_the_config_of_a_model(tokenizer):
    expected = load_tokenizer(asset("tiny-base"))("The boats left.")["input_ids"]
    assert load_tokenizer(tokenizer)("The boats left.")["input_ids"] == expected
