"""`load` reads the same model from either format; `save_hf` writes what it is given."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from beacon_jax.hf import load, load_tokenizer, save_hf, tree_hash
from beacon_jax.hf.conversion import from_hf
from beacon_jax.hf.keys import flatten
from beacon_jax.model.beacon import init_beacon
from beacon_jax.model.config import BeaconConfig
from beacon_jax.model.shapes import param_shapes


def assert_same(a, b):
    a, b = dict(flatten(a)), dict(flatten(b))
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]))
        assert a[name].dtype == b[name].dtype


@pytest.fixture
def both(tmp_path, make_checkpoint, config_of, beacon_fields):
    """The same model as an HF folder and as a converted folder."""
    hf = config_of("qwen2", **beacon_fields)
    src = make_checkpoint(hf, shards=2)
    from_hf(src, tmp_path / "ours")
    return src, tmp_path / "ours"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_both_formats_load_as_the_same_model(both, dtype):
    hf, ours = (load(path, dtype=dtype) for path in both)
    assert hf.config == ours.config
    assert_same(hf.variables, ours.variables)
    shapes = param_shapes(hf.config)
    assert {k: x.shape for k, x in flatten(hf.variables)} == dict(flatten(shapes))
    assert hf.base_hash == ours.base_hash == tree_hash(ours.variables["params"])
    assert hf.beacon_hash == ours.beacon_hash == tree_hash(ours.variables["beacon"])


def test_a_cast_model_has_another_hash(both):
    assert load(both[1], dtype="bfloat16").base_hash != load(both[1]).base_hash


@pytest.mark.parametrize("converted", [False, True])
def test_beacon_settings_can_be_replaced_without_losing_the_weights(both, converted):
    path = both[converted]
    before = load(path)
    after = load(path, beacon=BeaconConfig(window=64, ratios=(8,), sink=1))
    assert after.config.beacon == BeaconConfig(window=64, ratios=(8,), sink=1)
    assert_same(after.variables, before.variables)
    more = load(path, beacon=BeaconConfig(param=("q", "k", "v", "o")))
    attention = more.variables["beacon"]["layers"]["attention"]
    o_proj = before.variables["params"]["layers"]["attention"]["o_proj"]
    assert_same(attention["o_proj"], o_proj)
    assert_same(
        attention["q_proj"],
        before.variables["beacon"]["layers"]["attention"]["q_proj"],
    )
    assert more.beacon_hash == tree_hash(more.variables["beacon"])
    with pytest.raises(ValueError, match=r"not in beacon_param=\['q'\].*v_proj") as e:
        load(path, beacon=BeaconConfig(param=("q",)))
    assert "k_proj" in str(e.value) and "q_proj" not in str(e.value)


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("embed_init", ["eos", "bos"])
def test_a_base_checkpoint_gets_fresh_beacons(
    tmp_path, make_checkpoint, config_of, converted, embed_init
):
    path = make_checkpoint(config_of("llama", attention_bias=True, eos_token_id=[7, 2]))
    assert load(path).variables["beacon"] == {}
    assert load(path).beacon_hash is None
    if converted:
        from_hf(path, tmp_path / "ours")
        path = tmp_path / "ours"
    beacon = BeaconConfig(param=("k", "o"), embed_init=embed_init)
    model = load(path, beacon=beacon)
    assert_same(
        model.variables["beacon"], init_beacon(model.variables["params"], model.config)
    )
    token = {"eos": 7, "bos": 1}[embed_init]
    np.testing.assert_array_equal(
        model.variables["beacon"]["embed"]["embedding"][0],
        model.variables["params"]["embed"]["embedding"][token],
    )


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("lost", ["weight", "bias"])
def test_a_letter_that_one_layer_lacks_starts_from_the_base_in_all(
    tmp_path,
    make_checkpoint,
    config_of,
    tensors_of,
    beacon_fields,
    caplog,
    converted,
    lost,
):
    caplog.set_level(logging.WARNING)
    hf = config_of("qwen2", **beacon_fields)
    tensors = tensors_of(hf)
    del tensors[f"model.layers.1.self_attn.beacon_k_proj.{lost}"]
    path = make_checkpoint(hf, tensors)
    if converted:
        from_hf(path, tmp_path / "ours")
        path = tmp_path / "ours"
    model = load(path)
    assert "beacon k: start from the base model, since 1 of 6 tensors" in caplog.text
    assert "beacon q" not in caplog.text
    beacon = model.variables["beacon"]["layers"]["attention"]
    base = model.variables["params"]["layers"]["attention"]
    assert_same(beacon["k_proj"], base["k_proj"])
    q = tensors["model.layers.0.self_attn.beacon_q_proj.weight"]
    np.testing.assert_array_equal(beacon["q_proj"]["kernel"][0].reshape(16, -1).T, q)


def test_the_embedding_of_a_checkpoint_without_one_is_the_eos_row(
    make_checkpoint, config_of, tensors_of, beacon_fields
):
    hf = config_of("llama", **beacon_fields)
    tensors = tensors_of(hf)
    del tensors["model.beacon_embed_tokens.weight"]
    found = load(make_checkpoint(hf, tensors)).variables["beacon"]["embed"]["embedding"]
    np.testing.assert_array_equal(found, tensors["model.embed_tokens.weight"][2:3])


@pytest.mark.parametrize("from_converted", [False, True])
def test_a_trained_model_is_saved_with_beacon_keys_and_the_tokenizer(
    tmp_path, both, beacon_fields, from_converted
):
    source = both[from_converted]
    model = load(source)
    beacon = dataclasses.replace(model.config.beacon or BeaconConfig(), window=32)
    config = dataclasses.replace(model.config, beacon=beacon)
    variables = dict(model.variables)
    row = jnp.asarray(variables["beacon"]["embed"]["embedding"])
    variables["beacon"] = {**variables["beacon"], "embed": {"embedding": row + 1}}
    save_hf(tmp_path / "saved", config, variables, source)
    again = load(tmp_path / "saved")
    assert again.config == config
    assert_same(again.variables, variables)
    assert again.base_hash == model.base_hash
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    original = {}
    for path in both[0].glob("*.safetensors"):
        original |= load_file(path)
    assert set(tensors) == set(original)
    changed = [k for k in tensors if not np.array_equal(tensors[k], original[k])]
    assert changed == ["model.beacon_embed_tokens.weight"]
    hf = json.loads((both[0] / "config.json").read_text())
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    fields = {k: saved.pop(k) for k in list(saved) if k.startswith("beacon_")}
    assert fields["beacon_window"] == fields["beacon_stride"] == 32
    assert saved == {k: v for k, v in hf.items() if not k.startswith("beacon_")}
    for name in ("tokenizer.json", "additional_chat_templates/chat.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (both[0] / name).read_bytes()


def test_a_large_model_is_saved_in_shards(tmp_path, both, monkeypatch):
    monkeypatch.setattr("beacon_jax.hf.checkpoint.SHARD_BYTES", 8000)
    model = load(both[0], dtype="bfloat16")
    save_hf(tmp_path / "saved", model.config, model.variables)
    files = sorted(p.name for p in (tmp_path / "saved").glob("model-*"))
    assert len(files) > 1 and files[-1].endswith(f"-of-{len(files):05}.safetensors")
    assert_same(load(tmp_path / "saved").variables, model.variables)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["torch_dtype"] == "bfloat16"


def test_another_model_does_not_get_the_card_of_its_source(tmp_path, both):
    card = both[0] / "README.md"
    card.write_text("what this model is")
    try:
        model = load(both[0])
        save_hf(tmp_path / "saved", model.config, model.variables, both[0])
    finally:
        card.unlink()
    assert (tmp_path / "saved" / "tokenizer.json").exists()
    assert not (tmp_path / "saved" / "README.md").exists()


def test_saving_an_unchanged_model_keeps_config_json_byte_for_byte(tmp_path, both):
    model = load(both[0])
    save_hf(tmp_path / "saved", model.config, model.variables, both[0])
    expected = (both[0] / "config.json").read_bytes()
    assert (tmp_path / "saved" / "config.json").read_bytes() == expected


def test_variables_that_do_not_fit_are_listed(tmp_path, both):
    model = load(both[0])
    params = dict(model.variables["params"])
    params["final_norm"] = {"scale": np.ones(3)}
    del params["lm_head"]
    variables = {**model.variables, "params": params}
    with pytest.raises(ValueError, match="variables do not fit config") as error:
        save_hf(tmp_path / "saved", model.config, variables)
    assert "params/final_norm/scale: (3,), expected (16,)" in str(error.value)
    assert "params/lm_head/kernel: missing" in str(error.value)
    assert not (tmp_path / "saved").exists()


def test_the_hash_depends_on_values_names_shapes_and_dtypes_only(monkeypatch):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    tree = {"a": {"b": x}, "c": x[:2]}
    expected = tree_hash(tree)
    assert tree_hash({"c": jnp.asarray(x[:2]), "a": {"b": jnp.asarray(x)}}) == expected
    assert tree_hash({"a": {"b": np.asfortranarray(x)}, "c": x[:2]}) == expected
    monkeypatch.setattr("beacon_jax.hf.reader.BLOCK_BYTES", 16)
    assert tree_hash(tree) == expected
    for other in (
        {"a": {"b": x + 1}, "c": x[:2]},
        {"a": {"d": x}, "c": x[:2]},
        {"a": {"b": x.reshape(4, 3)}, "c": x[:2]},
        {"a": {"b": x.view(np.int32)}, "c": x[:2]},
        {"a": {"b": x}},
    ):
        assert tree_hash(other) != expected


def test_the_tokenizer_of_either_folder_is_the_same(
    tmp_path, make_checkpoint, config_of
):
    from tokenizers import Tokenizer, models, pre_tokenizers

    path = make_checkpoint(config_of("llama"))
    tokenizer = Tokenizer(models.BPE({"b": 0, "e": 1, "be": 2}, [("b", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    from_hf(path, tmp_path / "ours")
    for folder in (path, tmp_path / "ours"):
        loaded = load_tokenizer(folder)
        assert loaded.is_fast
        assert loaded.encode("beeb") == [2, 1, 0]
