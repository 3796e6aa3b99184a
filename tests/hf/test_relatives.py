"""Folders and tensors that look like a model of ours are refused by what they are."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beacon_jax.hf import load
from beacon_jax.hf.conversion import from_hf, read_config, to_hf


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"adapter_config.json": json.dumps({"base_model_name_or_path": "org/b"})},
            r"an adapter of PEFT \(LoRA, QLoRA\) of org/b, no model: merge it",
        ),
        ({"adapter_config.json": "{"}, "an adapter of PEFT.*merge_and_unload"),
        ({"m-Q4.gguf": "GGUF"}, "It has a GGUF file: give that, .*m-Q4.gguf"),
        ({"consolidated.00.pth": "", "params.json": "{}"}, "ends with -hf"),
        ({"tf_model.h5": ""}, "It has tf_model.h5, which is not read"),
        ({"weights.safetensors": ""}, "It has weights.safetensors: fetch config.json"),
        (
            {"pytorch_model.bin": "", "a.safetensors": ""},
            "a.safetensors and 1 more: f",
        ),
        ({"beacons.safetensors": ""}, "It has beacons alone"),
        ({"checkpoint-5/config.json": "{}"}, "Its folder checkpoint-5 has one"),
        ({"snapshots/a1/config.json": "{}"}, "hub's cache: give .*/snapshots/a1"),
    ],
)
def test_a_folder_without_a_config_is_named_by_what_it_has(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=rf"config\.json is not .*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["params.safetensors"], "of a converted folder that is not whole: convert"),
        (["weights.safetensors"], r"read from model\.safetensors; rename it"),
        (["pytorch_model_1.bin"], r"read from pytorch_model\.bin; rename it"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            r"2 of the 3 files model-\*-of-00003\.safetensors, without "
            r"model-00002-of-00003\.safetensors: fetch those, and model\.safetensors\.",
        ),
        (["model-1-of-9.safetensors"], r"5-of-9\.safetensors and 4 more: fetch those"),
        *(
            (
                [f"model.safetensors{end}"],
                rf"It has model\.safetensors\{end}, a download",
            )
            for end in (".incomplete", ".crdownload", ".part", ".aria2")
        ),
        (["a.safetensors", "b.safetensors"], r"a\.safetensors and 1 more: fetch model"),
    ],
)
def test_weights_without_an_index_say_what_to_fetch(
    make_checkpoint, config_of, names, message
):
    folder = make_checkpoint(config_of("llama"))
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"has no weights: .*{message}"):
        load(folder)


def test_the_folder_of_a_run_names_its_export(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"init_from": "x"}')
    with pytest.raises(ValueError, match=r"the --workdir of a training run.*export"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("self_attn.ultragist_q_proj.weight", "this is an UltraGist model"),
        ("self_attn.q_proj.lora_A.weight", "weights of PEFT that are not merged"),
        ("self_attn.q_proj.base_layer.weight", "weights of PEFT that are not merged"),
        ("self_attn.q_proj.weight_scale_inv", r"quantized \(GPTQ, AWQ"),
        ("mlp.experts.0.up_proj.weight", "this is a mixture of experts"),
    ],
)
def test_a_tensor_of_a_relative_names_it(
    make_checkpoint, config_of, tensors_of, name, message
):
    hf = config_of("llama")
    more = {f"model.layers.0.{name}": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=message) as error:
        load(make_checkpoint(hf, tensors_of(hf) | more))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("lm_head.weight", {}, "1 tensor does not fit.*tie_word_embeddings to true"),
        ("lm_head.weight", {"score.weight": (2, 8)}, "2 tensors do not fit.*rewards"),
        ("", {"v_head.summary.weight": (1, 8)}, "1 tensor does not.*head of words"),
        ("", {"model.other.weight": (1, 8)}, "of two models or versions"),
        ("model.norm.weight", {"score.weight": (2, 8)}, "of two models or versions"),
    ],
)
def test_tensors_that_do_not_fit_have_a_remedy(
    make_checkpoint, config_of, tensors_of, drop, add, message
):
    hf = config_of("llama", tie_word_embeddings=False)
    tensors = {k: x for k, x in tensors_of(hf).items() if k != drop}
    tensors |= {k: np.ones(shape, np.float32) for k, shape in add.items()}
    folder = make_checkpoint(hf)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(folder)


def test_a_larger_vocabulary_is_named(make_checkpoint, config_of, tensors_of):
    hf = config_of("llama", tie_word_embeddings=False)
    folder, size = make_checkpoint(hf), hf["vocab_size"] + 3
    more = {
        key: np.concatenate([x, x[:3]]) if x.shape[0] == hf["vocab_size"] else x
        for key, x in tensors_of(hf).items()
    }
    save_file(more, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"(?s)have {size} tokens.*set vocab_size to"):
        load(folder)


def test_an_adapter_beside_weights_is_named(make_checkpoint, config_of, caplog):
    folder = make_checkpoint(config_of("llama"))
    (folder / "adapter_config.json").write_text("{}")
    load(folder)
    assert f"{folder} has an adapter of PEFT" in caplog.text


def test_tied_embeddings_may_have_the_name_of_the_head(
    make_checkpoint, config_of, tensors_of, beacon_fields, tmp_path
):
    hf = config_of("llama", tie_word_embeddings=True, **beacon_fields)
    folder, tensors = make_checkpoint(hf), tensors_of(hf)
    before = load(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    tensors.pop("model.beacon_embed_tokens.weight", None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    after = load(folder, quiet=True)
    np.testing.assert_array_equal(
        *(x.variables["params"]["embed"]["embedding"] for x in (before, after))
    )
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back")
    name = "model.safetensors"
    written = load_file(tmp_path / "back" / name)
    assert written.keys() == tensors.keys()
