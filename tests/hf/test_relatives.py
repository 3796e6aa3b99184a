"""Folders and tensors that look like a model of ours are refused by what they are."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beacon_jax.hf import load
from beacon_jax.hf.conversion import from_hf, read_config, to_hf
from beacon_jax.model.config import ModelConfig


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
        (
            {"config.json.crdownload": ""},
            r"config\.json\.crdownload, a download that is not finished",
        ),
        (
            {"snapshots/a/config.json": "{}", "refs/main": "a"},
            "none of its one version below .*snapshots is whole: download the model",
        ),
        (
            {"models--org--a--b/refs/main": "a"},
            r"cache of a hub: give the id of a model in it \(org/a--b\)",
        ),
    ],
)
def test_a_folder_without_a_config_is_named_by_what_it_has(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
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
        *(
            ([name], rf"It has {name}, a download that is not finished: finish it")
            for name in (
                "model.safetensors.incomplete",
                "model.safetensors.crdownload",
                "model.Ab1.safetensors.part",
                "model.safetensors.tmp",
                "Unconfirmed 12345.crdownload",
                "pytorch_model.bin.aria2",
                ".cache/huggingface/download/ab12.cd34.incomplete",
            )
        ),
        (["notes.tmp"], "or pytorch_model.bin.$"),
    ],
)
def test_weights_without_an_index_say_what_to_fetch(
    make_checkpoint, config_of, names, message
):
    folder = make_checkpoint(config_of("llama"))
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=rf"has no weights: .*{message}"):
        load(folder)


@pytest.mark.parametrize("below", ["", "snapshots"])
def test_the_cache_of_the_hub_names_the_newest_version_that_is_whole(
    make_checkpoint, config_of, tmp_path, below
):
    root = tmp_path / "models--org--name"
    (root / "snapshots").mkdir(parents=True)
    for age, name in enumerate(["newest", "newer", "old"]):
        version = make_checkpoint(config_of("llama"), shards=2)
        version = version.rename(root / "snapshots" / name)
        if name == "newest":  # a download that stopped
            next(version.glob("model-00002*")).unlink()
        os.utime(version, (1e9 - age, 1e9 - age))
    given = root / below
    with pytest.raises(FileNotFoundError, match="give the version, .*/newer.$") as said:
        read_config(given)
    load(str(said.value).rpartition(", ")[2].removesuffix("."))


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForSequenceClassification",
        "Qwen2ForTokenClassification",
        "MistralForQuestionAnswering",
        "LlamaForRewardModel",
        "Qwen3ForSequenceClassification",
    ],
)
def test_a_classifier_is_named_and_its_base_asked_for(name):
    hf = {"architectures": [name], "model_type": "llama"}
    with pytest.raises(ValueError, match=f"{name} is a classifier .*use its base mod"):
        ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    ("tensors", "config", "remedy"),
    [
        ({"vocab_size": 48}, {}, {"vocab_size": 48}),
        ({"vocab_size": 48, "tie_word_embeddings": True}, {}, None),
        ({"tie_word_embeddings": True}, {}, {"tie_word_embeddings": True}),
        ({}, {"num_hidden_layers": 2}, {"num_hidden_layers": 3}),
        ({}, {"num_hidden_layers": 5}, {"num_hidden_layers": 3}),
        ({}, {"intermediate_size": 32}, {"intermediate_size": 24}),
        ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 2}),
        ({"attention_bias": True}, {}, {"attention_bias": True}),
        ({"mlp_bias": True}, {}, {"mlp_bias": True}),
    ],
)
def test_values_of_config_json_that_tensors_fit_are_named(
    make_checkpoint, config_of, tensors_of, tensors, config, remedy
):
    """And with those values the model is loaded."""
    made = tensors_of(config_of("llama", **tensors))
    rows = tensors.get("vocab_size", 0)
    for name in {"lm_head.weight", "model.embed_tokens.weight"} & made.keys():
        if rows > len(made[name]):
            made[name] = np.resize(made[name], (rows, made[name].shape[1]))
    folder = make_checkpoint(config_of("llama", **config), made)
    with pytest.raises(ValueError, match="not fit config.json") as said:
        load(folder)
    values = re.search(r"They fit (.*): set that in config.json", str(said.value))
    assert values
    named = {
        key: json.loads(value)
        for key, value in (x.split("=") for x in values[1].split(", "))
    }
    assert named == (remedy or tensors)
    fitting = config_of("llama", **(config | named))
    (folder / "config.json").write_text(json.dumps(fitting))
    load(folder)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ("qwen3", {"attention_bias": True}, "They fit attention_bias=true"),
        ("qwen2", {}, "missing: .*q_proj.bias.*another model"),
    ],
)
def test_the_weights_of_a_qwen3_under_another_config_are_named(
    make_checkpoint, config_of, tensors_of, config, tensors, message
):
    made = tensors_of(config_of("qwen3", **tensors))
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load(make_checkpoint(config_of(config), made))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tok_embeddings.weight", r"as their authors name them.*with -hf\)"),
        ("layers.0.attention.wq.weight", r"as their authors name them.*with -hf\)"),
        ("model.layers.0.self_attn.q_norm.weight", "1 tensor does not.*unknown change"),
        ("model.embed_tokens.weight", "1 tensor does not.*config.json of another mo"),
    ],
)
def test_a_tensor_that_does_not_fit_has_a_remedy(
    make_checkpoint, config_of, tensors_of, name, message
):
    tensors = tensors_of(hf := config_of("llama")) | {name: np.ones((3, 3), np.float32)}
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        load(make_checkpoint(hf, tensors))


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
        ("score.weight", "this is a classifier .*: use its base model"),
        ("classifier.bias", "this is a classifier .*: use its base model"),
        ("v_head.summary.weight", "head of a value or reward model .*without the head"),
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
