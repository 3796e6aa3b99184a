"""Every unusable checkpoint is refused with a message that says what to do."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beacon_jax.hf import load, load_tokenizer
from beacon_jax.hf.conversion import from_hf, to_hf


def test_all_missing_unknown_and_wrongly_shaped_tensors_are_listed(
    tmp_path, make_checkpoint, config_of, tensors_of
):
    hf = config_of("qwen2")
    tensors = tensors_of(hf)
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.0.mlp.magic.weight"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = np.ones((41, 16), np.float32)
    src = make_checkpoint(hf, tensors)
    for read in (lambda: from_hf(src, tmp_path / "ours"), lambda: load(src)):
        with pytest.raises(ValueError, match="4 tensors") as error:
            read()
        for line in (
            "missing: model.norm.weight",
            "missing: model.layers.1.self_attn.k_proj.bias",
            "unknown: model.layers.0.mlp.magic.weight",
            "wrong shape: lm_head.weight is [41, 16], config.json says [40, 16]",
        ):
            assert line in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_a_missing_head_of_an_untied_model_is_an_error(
    make_checkpoint, config_of, tensors_of
):
    tensors = tensors_of(config_of("llama", tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        load(make_checkpoint(config_of("llama"), tensors))


def test_a_tied_model_whose_head_differs_is_an_error(
    make_checkpoint, config_of, tensors_of
):
    tensors = tensors_of(config_of("llama"))
    src = make_checkpoint(config_of("llama", tie_word_embeddings=True), tensors)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*set it to false"):
        load(src)


@pytest.mark.parametrize("param", [["q", "k"], None])
def test_beacon_tensors_of_other_letters_are_listed(
    make_checkpoint, config_of, tensors_of, beacon_fields, param
):
    tensors = tensors_of(config_of("llama", **beacon_fields))
    fields = beacon_fields | {"beacon_param": param} if param else {}
    with pytest.raises(ValueError, match="not in beacon_param") as error:
        load(make_checkpoint(config_of("llama", **fields), tensors))
    for i in range(3):
        key = f"model.layers.{i}.self_attn.beacon_v_proj.weight"
        assert f"not in beacon_param={param}: {key}" in str(error.value)
    assert ("beacon_q_proj" in str(error.value)) == (param is None)


def test_a_beacon_tensor_of_the_wrong_shape_is_an_error(
    make_checkpoint, config_of, tensors_of, beacon_fields
):
    hf = config_of("llama", **beacon_fields)
    tensors = tensors_of(hf)
    tensors["model.beacon_embed_tokens.weight"] = np.ones((2, 16), np.float32)
    with pytest.raises(ValueError, match=r"beacon_embed_tokens.*\[2, 16\].*\[1, 16\]"):
        load(make_checkpoint(hf, tensors))


@pytest.mark.parametrize("left", [-1, 40, 3])
def test_a_truncated_file_is_named_with_expected_and_actual_bytes(
    make_checkpoint, config_of, left
):
    path = make_checkpoint(config_of("llama")) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:left])
    actual = len(data) - 1 if left < 0 else left
    with pytest.raises(ValueError, match=f"{path} is truncated.*has {actual}") as error:
        load(path.parent)
    if left < 0:
        assert f"announces {len(data)} bytes" in str(error.value)


def test_a_truncated_converted_file_is_an_error(tmp_path, make_checkpoint, config_of):
    dst = tmp_path / "ours"
    from_hf(make_checkpoint(config_of("llama")), dst)
    path = dst / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    for read in (lambda: load(dst), lambda: to_hf(dst, tmp_path / "back")):
        with pytest.raises(ValueError, match=r"params\.safetensors is truncated"):
            read()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="convert the model again"):
        load(dst)


@pytest.mark.parametrize(
    "header, said",
    [
        (b"oops", "Expecting value"),
        (b"[1, 2]", r"its header is \[1, 2\], not an object"),
        (b'{"a": [1, 2]}', r"its header.a is \[1, 2\], not an object"),
        (
            b'{"a": {"dtype": "F32", "shape": []}}',
            "its header.a.data_offsets is missing",
        ),
    ],
)
def test_a_file_that_is_not_safetensors_is_an_error(
    header, said, make_checkpoint, config_of
):
    path = make_checkpoint(config_of("llama")) / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=f"is not a safetensors file: {said}"):
        load(path.parent)


def test_quantized_weights_are_an_error(make_checkpoint, config_of, tensors_of):
    hf = config_of("llama")
    tensors = tensors_of(hf) | {"lm_head.weight": np.ones((40, 16), np.int8)}
    with pytest.raises(ValueError, match=r"lm_head\.weight has dtype I8.*unquantized"):
        load(make_checkpoint(hf, tensors))


def test_an_index_must_agree_with_its_files(make_checkpoint, config_of):
    src = make_checkpoint(config_of("llama"), shards=3)
    index = src / "model.safetensors.index.json"
    lost = src / "model-00002-of-00003.safetensors"
    data = load_file(lost)
    kept = {k: v for k, v in data.items() if k != "model.norm.weight"}
    save_file(kept, lost)
    with pytest.raises(ValueError, match=r"do not have: model\.norm\.weight"):
        load(src)
    lost.unlink()
    with pytest.raises(ValueError, match=f"{index.name}.*not there: {lost.name}"):
        load(src)


def test_folders_without_a_model_say_what_is_expected(tmp_path, make_checkpoint):
    with pytest.raises(FileNotFoundError, match=r"config\.json is not there"):
        load(tmp_path / "nowhere")
    src = tmp_path / "empty"
    src.mkdir()
    (src / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(src)


def test_a_folder_without_weights_names_the_files(make_checkpoint, config_of):
    src = make_checkpoint(config_of("llama"))
    (src / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: expected model\.safet"):
        load(src)


def test_an_unknown_dtype_lists_the_known(make_checkpoint, config_of):
    with pytest.raises(ValueError, match=r"dtype='int8'.*float32, float16, bfloat16"):
        load(make_checkpoint(config_of("llama")), dtype="int8")


def test_to_hf_wants_a_converted_folder(tmp_path, make_checkpoint, config_of):
    src = make_checkpoint(config_of("llama"))
    with pytest.raises(FileNotFoundError, match=r"not a converted checkpoint.*from-hf"):
        to_hf(src, tmp_path / "back")


def test_another_version_of_the_format_is_refused(tmp_path, make_checkpoint, config_of):
    from_hf(make_checkpoint(config_of("llama")), tmp_path / "ours")
    path = tmp_path / "ours" / "beacon_jax.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        load(tmp_path / "ours")


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("more", [[], [{"id": 0, "content": "<s>"}]])
def test_an_empty_vocabulary_is_named_by_its_file(tmp_path, more):
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    content = {
        "version": "1.0",
        "added_tokens": [dict.fromkeys(flags, False) | token for token in more],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"vocabulary in tokenizer\.json is empty"):
        load_tokenizer(tmp_path)


def test_an_active_sliding_window_must_be_waved_through(
    tmp_path, make_checkpoint, config_of
):
    src = make_checkpoint(config_of("mistral", sliding_window=32))
    with pytest.raises(ValueError, match=r"sliding_window=32.*ignore_sliding_window"):
        from_hf(src, tmp_path / "ours")
    from_hf(src, tmp_path / "ours", ignore_sliding_window=True)
    load(tmp_path / "ours")  # the manifest remembers
