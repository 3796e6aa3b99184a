"""End tokens are all that a model's files name."""

import dataclasses
import json

import pytest

from beacon_jax.inference.loading import load


@pytest.fixture
def folder(make_folder):
    return make_folder(eos_token_id=[])


def write(folder, value) -> None:
    (folder / "generation_config.json").write_text(json.dumps(value))


def test_generation_ends_at_a_token_that_only_generation_config_names(folder):
    model = load(folder)
    endless = dataclasses.replace(model.config, eos_ids=())
    free = dataclasses.replace(model, config=endless).complete(
        list(b"abc"), max_new_tokens=12
    )
    # The fourth token, or the first of them that is the same.
    end = int(free.tokens[3])
    write(folder, {"eos_token_id": [end, 255]})
    model = load(folder)
    assert {end, 255} <= set(model.config.eos_ids)
    made = model.complete(list(b"abc"), max_new_tokens=12)
    first = list(free.tokens).index(end)
    assert list(made.tokens[:first]) == list(free.tokens[:first])
    assert len(made.tokens) <= first + 1 < len(free.tokens)


def test_all_three_are_one_union_in_order_without_doubles(make_folder):
    folder = make_folder(eos_token_id=[7, 9])
    write(folder, {"eos_token_id": 9, "do_sample": False})
    model = load(folder)
    eos = model.tokenizer.eos_token_id
    assert model.config.eos_ids == tuple(dict.fromkeys((7, 9, eos)))
    described = model.describe()
    assert f"end tokens: {model.tokenizer.convert_ids_to_tokens(7)} (7)" in described
    assert str(folder) in described


@pytest.mark.parametrize(
    ("named", "eos", "left"),
    [
        (9, "<new>", {"the tokenizer": "257"}),
        ([900, 9, 7000], "<eos>", {"generation_config.json": "900, 7000"}),
        (900, "<new>", {"the tokenizer": "257", "generation_config.json": "900"}),
    ],
)
def test_end_tokens_that_the_model_does_not_have_are_left_out_with_a_line(
    make_folder, caplog, named, eos, left
):
    folder = make_folder(eos_token_id=9)
    write(folder, {"eos_token_id": named})
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    if eos == "<new>":
        file.write_text(json.dumps(settings | {"eos_token": eos}))
    model = load(folder)
    assert all(i < model.config.vocab_size for i in model.config.eos_ids)
    assert 9 in model.config.eos_ids
    said = [x.getMessage() for x in caplog.records if "end tokens" in x.getMessage()]
    assert len(said) == len(left)
    for source, ids in left.items():
        assert any(x.startswith(source) and x.endswith(f": {ids}.") for x in said)


@pytest.mark.parametrize("value", ["2", [2.5], [True], -1, 2**31, {}, [[2]]])
def test_what_is_no_id_is_refused_with_its_file(folder, value):
    write(folder, {"eos_token_id": value})
    (folder / "model.safetensors").unlink()  # it is found before they are looked for
    with pytest.raises(ValueError, match=r"generation_config\.json has eos_token_id"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_file_that_is_no_json_object_is_refused_by_name(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json (is not JSON|has )"):
        load(folder)
    write(folder, {})
    load(folder)
