"""Folders and tensors that look like a model of ours are refused by what they are."""

import json

import numpy as np
import pytest

from beacon_jax.hf import load
from beacon_jax.hf.conversion import read_config


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
    ],
)
def test_a_folder_without_a_config_is_named_by_what_it_has(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
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
