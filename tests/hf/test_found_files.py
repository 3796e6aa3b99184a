"""Files as they are found: pointers of git-lfs, old indexes, broken tokenizers."""

import importlib.machinery
import json
import logging
import shutil
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beacon_jax.hf import load, load_tokenizer
from beacon_jax.hf.conversion import from_hf, to_hf
from beacon_jax.hf.reader import TorchReader
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
    "content",
    [
        *("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', "{"),
        *(f'{{"weight_map": {{"a": "{x}"}}}}' for x in ("/b", "c/../../b", "..", ".")),
        *(f'{{"weight_map": {{"a": {x}}}}}' for x in ('""', '"\\u0000"', "5")),
        f'{{"weight_map": {{"a": "{"b" * 256}"}}}}',
    ],
)
def test_an_index_of_another_structure_is_named(folder, content):
    index = folder / "model.safetensors.index.json"
    index.write_text(content)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load(folder)
    (folder / "model-1.safetensors").rename(folder / "model.safetensors")
    load(folder)  # a whole file needs none


@pytest.mark.parametrize("below", ["shards", "./shards", "a/b"])
def test_an_index_may_name_files_below_its_folder(
    tmp_path, make_checkpoint, config_of, below
):
    folder = make_checkpoint(config_of("llama"), shards=2)
    expected = load(folder).identity.base
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (folder / below).mkdir(parents=True)
    for path in folder.glob("model-*"):
        path.rename(folder / below / path.name)
    files = content["weight_map"].items()
    content["weight_map"] = {key: f"{below}/{name}" for key, name in files}
    index.write_text(json.dumps(content))
    assert load(folder).identity.base == expected
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert load(tmp_path / "back").identity.base == expected
    assert (tmp_path / "back" / below / "model-00001-of-00002.safetensors").exists()


def test_shards_that_are_all_there_need_no_index(
    tmp_path, make_checkpoint, config_of, caplog
):
    folder = make_checkpoint(config_of("llama"), shards=3)
    expected = load(folder).identity.base
    (folder / "model.safetensors.index.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert load(folder).identity.base == expected
    assert caplog.text.count("has no model.safetensors.index.json: all 3 files") == 1
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors.index.json").exists()
    for path in folder.glob("model-*"):
        shutil.copyfile(path, path.with_name(path.name.replace("model", "ema")))
    with pytest.raises(ValueError, match=r"2 models and no index, ema-\*-of-0000"):
        load(folder)


@pytest.mark.parametrize("index", [True, False])
def test_a_shard_that_is_a_copy_of_another_is_to_be_downloaded_again(
    make_checkpoint, config_of, index
):
    folder = make_checkpoint(config_of("llama"), shards=2)
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    one, two = sorted(folder.glob("model-*"))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"same tensors as model-00001.*both again"):
        load(folder)


def test_a_tensor_in_two_shards_without_an_index_is_an_error(
    make_checkpoint, config_of
):
    folder = make_checkpoint(config_of("llama"), shards=2)
    (folder / "model.safetensors.index.json").unlink()
    one, two = sorted(folder.glob("model-*"))
    save_file(load_file(one) | load_file(two), two)
    with pytest.raises(ValueError, match=r"is in model-00001-of-00002.*remove the"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embeddings.position_ids", np.arange(8)[None]),
        ("model.layers.0.attn.bias", np.ones((1, 1, 8, 8), np.bool_)),
        ("model.layers.0.self_attn.bias", np.ones((1, 1, 8, 8), np.float32)),
        ("model.layers.0.attn.masked_bias", np.float32(-1e9)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(3, np.float64)),
        ("model.rotary_emb.original_inv_freq", np.ones(3, np.float32)),
        ("model.layers.1.self_attn.rotary_emb.cos_cached", np.ones((8, 6), np.float32)),
        ("rope.freqs", np.ones(3, np.int32)),
        ("model.causal_mask", np.ones((8, 8), np.uint8)),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_buffers_are_ignored_whatever_type_they_have(
    tmp_path, make_checkpoint, config_of, tensors_of, name, value, shards
):
    hf = config_of("llama")
    expected = load(make_checkpoint(hf, name="plain")).identity.base
    tensors = {name: np.asarray(value), **tensors_of(hf)}
    folder = make_checkpoint(hf, tensors, shards=shards)
    assert load(folder).identity.base == expected
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert load(tmp_path / "back").identity.base == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "model.step",
            np.int64(3),
            "step has dtype I64, .*no buffer that is known",
        ),
        ("model.layers.0.attn.bias", np.ones(16, np.int32), "I32, .*no buffer"),
        (
            "model.layers.0.mlp.up_proj.qweight",
            np.ones(16, np.int32),
            "quantized .G",
        ),
        ("lm_head.weight", np.ones((40, 16), np.uint8), "U8, .* an unquantized check"),
        (
            "model.layers.0.self_attn.bias",
            np.ones(16, np.float32),
            "unknown: .*bias",
        ),
    ],
)
def test_other_tensors_are_named(
    make_checkpoint, config_of, tensors_of, name, value, message
):
    hf = config_of("llama")
    folder = make_checkpoint(hf, tensors_of(hf) | {name: np.asarray(value)})
    with pytest.raises(ValueError, match=message):
        load(folder)


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


@pytest.mark.parametrize("kind", ["YiTokenizer", "LlamaTokenizer", None])
def test_a_whole_tokenizer_needs_no_code_that_its_config_names(tokenizer, kind):
    expected = load_tokenizer(asset("tiny-base"))
    file = tokenizer / "tokenizer_config.json"
    code = {"AutoTokenizer": ["tokenization_yi.YiTokenizer", None]}
    settings = json.loads(file.read_text()) | {"auto_map": code}
    file.write_text(json.dumps(settings | {"tokenizer_class": kind}))
    found = load_tokenizer(tokenizer)
    assert found("The boats left.").input_ids == expected("The boats left.").input_ids
    assert found.eos_token == expected.eos_token


def test_a_lone_tokenizer_model_says_what_is_needed(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00")
    with pytest.raises(ValueError, match=r"a tokenizer\.json is needed"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_loads_without_the_config_of_a_model(tokenizer):
    expected = load_tokenizer(asset("tiny-base"))("The boats left.")["input_ids"]
    assert load_tokenizer(tokenizer)("The boats left.")["input_ids"] == expected


def test_a_whole_file_wins_over_the_same_tensors_in_parts(
    tmp_path, make_checkpoint, config_of, tensors_of, caplog
):
    hf = config_of("llama")
    folder = make_checkpoint(hf, shards=2)
    expected = load(folder).identity.base
    save_file(tensors_of(hf), folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        assert load(folder).identity.base == expected
    assert "is read, not what" in caplog.text
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert not list((tmp_path / "back").glob("*.index.json"))
    # One that lacks tensors of the index is left alone.
    some = {"model.norm.weight": np.zeros(16, np.float32)}
    save_file(some, folder / "model.safetensors")
    assert load(folder).identity.base == expected


def test_a_tensor_in_two_parts_or_twice_in_one_header_is_an_error(
    make_checkpoint, config_of
):
    folder = make_checkpoint(config_of("llama"), shards=2)
    parts = sorted(folder.glob("model-*"))
    twice = load_file(parts[0]) | load_file(parts[1])
    save_file(twice, parts[1])
    with pytest.raises(
        ValueError, match=r"tensor .* is in model-00001.*download both again"
    ):
        load(folder)
    header = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    header += '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    header += " " * (-len(header) % 8)
    file = folder / "model.safetensors"
    for path in (*parts, folder / "model.safetensors.index.json"):
        path.unlink()
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4)
    with pytest.raises(ValueError, match=r"the header of .* has the key 'a' more than"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        "[" * 10_000,
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": [0, "x"]}}',
        "[1]",
    ],
)
def test_a_header_of_another_structure_is_no_safetensors_file(folder, header):
    data = len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is (not a|corrupt)"):
        load(folder)


@pytest.mark.parametrize(
    "metadata", [{}, {"format": "pt"}, None, dict(zip("zyxwv", "abcde", strict=True))]
)
def test_the_metadata_of_a_file_comes_back_as_it_was(
    tmp_path, folder, config_of, tensors_of, metadata
):
    save_file(tensors_of(config_of("llama")), folder / "model.safetensors", metadata)
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    before, after = (
        (x / "model.safetensors").read_bytes() for x in (folder, tmp_path / "back")
    )
    assert before == after


def test_only_small_files_of_a_model_are_copied(tmp_path, folder, caplog):
    more = ("LICENSE", "modeling_qwen2.py", "tokenizer.model.v3", "merges.txt")
    left = ("notes.txt", "trainer_state.json", "data/rows.jsonl", ".env")
    (folder / "data").mkdir()
    for name in (*more, *left, "optimizer.pt"):
        (folder / name).write_text("x")
    with (folder / "README.md").open("wb") as file:
        file.truncate(17 << 20)
    with caplog.at_level(logging.WARNING):
        from_hf(folder, tmp_path / "ours")
    copied = {path.name for path in (tmp_path / "ours").iterdir()}
    assert copied == {
        *more,
        "additional_chat_templates",
        "beacon_jax.json",
        "config.json",
        "generation_config.json",
        "params.safetensors",
        "tokenizer.json",
    }
    assert (
        "need them: README.md, data/rows.jsonl, notes.txt, trainer_state.json"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1"}, r"\.version is '1', not a whole number"),
        ({"base_hash": 5}, r"\.base_hash is 5, not a text"),
        ({"dtype": "int7"}, r"\.dtype is 'int7', not one of"),
        ({"beacon_from_base": ["z"]}, r"\.beacon_from_base\[0\] is 'z'"),
        ({"files": {"a": {"metadata": None}}}, r"\.files\.a\.tensors is missing"),
        ({"files": {"../a": {"metadata": None, "tensors": []}}}, r"no names of files"),
        ({"index": 3}, r"\.index is 3"),
    ],
)
def test_a_manifest_of_another_form_is_named(tmp_path, folder, changes, message):
    from_hf(folder, tmp_path / "ours")
    file = tmp_path / "ours" / "beacon_jax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=rf"beacon_jax\.json.*{message}"):
        load(tmp_path / "ours")


class FakeTensor:
    """What the reader asks a tensor of torch for."""

    shape = (2, 3)

    def __init__(self, dtype):
        self.dtype = f"torch.{dtype}"


def _fail(*_, **__):
    raise RuntimeError("PytorchStreamReader failed reading zip archive")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.bin cannot be read by torch \(RuntimeError: PytorchStream.*again"),
        ({"state_dict": {}}, r"a\.bin does not hold tensors by name alone"),
        ({"x": FakeTensor("int64")}, "tensor x has dtype I64, only"),
        ({"x": FakeTensor("bfloat16")}, r"b\.bin has the same tensors as a\.bin"),
    ],
)
def test_what_a_file_of_torch_may_not_hold_is_named(
    tmp_path, monkeypatch, content, message
):
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    loaded = _fail if content is None else lambda *_, **__: content
    vars(torch).update(Tensor=FakeTensor, load=loaded)
    monkeypatch.setitem(sys.modules, "torch", torch)
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for file in files:
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        TorchReader(files, tmp_path)


def test_lost_beacons_of_a_converted_folder_are_named(
    tmp_path, make_checkpoint, config_of, beacon_fields
):
    dst = tmp_path / "ours"
    from_hf(make_checkpoint(config_of("llama", **beacon_fields)), dst)
    (dst / "beacon.safetensors").unlink()
    for read in (lambda: load(dst), lambda: to_hf(dst, tmp_path / "back")):
        with pytest.raises(FileNotFoundError, match=r"beacon\.safetensors is not th"):
            read()
    (dst / "beacon.safetensors").symlink_to("beacon.safetensors")
    with pytest.raises(ValueError, match=r"beacon\.safetensors is a link to a file"):
        load(dst)


@pytest.mark.parametrize("tensors", [["x"], [], ["model.norm.weight"] * 2])
def test_a_manifest_has_each_tensor_once(tmp_path, folder, tensors):
    from_hf(folder, tmp_path / "ours")
    file = tmp_path / "ours" / "beacon_jax.json"
    files = {"model.safetensors": {"metadata": None, "tensors": tensors}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"files": files}))
    with pytest.raises(ValueError, match=r"do not have each tensor of the model once"):
        to_hf(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "has list where a JSON object"),
        ("tokenizer_config.json", '{"a": 1, "a": 2}', "has the key 'a' more than once"),
        ("tokenizer_config.json", '{"eos_token": 5}', r"\.eos_token is 5, not"),
        ("tokenizer_config.json", '{"model_max_length": "x"}', r"\.model_max_length"),
        ("tokenizer_config.json", '{"chat_template": [1]}', r"\.chat_template is"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', r"\.tokenizer_class is 5"),
        ("special_tokens_map.json", '{"eos_token": ', "is not JSON"),
        ("special_tokens_map.json", '{"pad_token": 7}', r"\.pad_token is 7"),
        ("added_tokens.json", "[3]", "has list where"),
        ("added_tokens.json", '{"<x>": "5"}', r".*<x> is '5', not a whole number"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"template": "x"}]}',
            r"\.chat_template is",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"2": "<x>"}}',
            r"\.added_tokens_decoder is",
        ),
        ("chat_template.jinja", "\ufeffhi", "begins with a byte order mark"),
        ("chat_template.jinja", "caf\udce9", "is no text in UTF-8: byte 0xe9 at 3"),
        ("tokenizer.json", "\ufeff{}", "begins with a byte order mark"),
        ("config.json", "{", "is not JSON"),
    ],
)
def test_a_tokenizers_file_of_another_form_is_named(tokenizer, name, content, message):
    data = content.encode(errors="surrogateescape")
    (tokenizer / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} ?{message}"):
        load_tokenizer(tokenizer)


PAD = {"content": "<|pad|>", "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("more", [{}, {"__type": "AddedToken"}, {"single_word": False}])
def test_special_tokens_may_be_objects(tokenizer, file, more):
    path = tokenizer / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= {"eos_token": PAD | more}
    content |= {"additional_special_tokens": ["<|endoftext|>", PAD | more]}
    path.write_text(json.dumps(content))
    found = load_tokenizer(tokenizer)
    assert (found.eos_token, found.eos_token_id, len(found)) == ("<|pad|>", 1, 512)
    assert {"<|endoftext|>", "<|pad|>"} <= set(found.all_special_tokens)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token", {}),
        ("pad_token", {"content": 5}),
        ("additional_special_tokens", ["<a>", {"lstrip": True}]),
        ("additional_special_tokens", [7]),
    ],
)
def test_a_special_token_without_its_text_is_named(tokenizer, file, key, value):
    (tokenizer / file).write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=rf"{file}\.{key} has .*, which is no token"):
        load_tokenizer(tokenizer)


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "newkind"}',
        '{"model_type": "llama", "hidden_size": "a"}',
        '{"model_type": 5}',
        '{"tokenizer_class": "NewTokenizer"}',
    ],
)
def test_a_tokenizer_does_not_depend_on_the_settings_of_a_model(tokenizer, content):
    expected = load_tokenizer(asset("tiny-base"))("The boats left.")["input_ids"]
    (tokenizer / "config.json").write_text(content)
    assert load_tokenizer(tokenizer)("The boats left.")["input_ids"] == expected


@pytest.mark.parametrize("name", ["special_tokens_map.json", "chat_template.jinja"])
def test_a_tokenizers_link_to_nothing_is_named(tokenizer, name):
    (tokenizer / name).symlink_to(tokenizer / "gone")
    with pytest.raises(ValueError, match=rf"{name} is a link to a file that is gone"):
        load_tokenizer(tokenizer)
