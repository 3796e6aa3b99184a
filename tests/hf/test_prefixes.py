"""Names of tensors with what wrappers of PyTorch put in front of them."""

import numpy as np
import pytest

from beacon_jax.hf import identity, load
from beacon_jax.hf.conversion import from_hf, to_hf
from beacon_jax.hf.prefixes import stripped


def wrapped(prefix):
    return lambda name: f"{prefix}{name}"


def inside(name):
    return name.replace("self_attn", "_orig_mod.self_attn").replace(
        "mlp", "_orig_mod.mlp"
    )


CASES = {
    "module.": wrapped("module."),
    "_orig_mod.": wrapped("_orig_mod."),
    "model.": wrapped("model."),
    "module._orig_mod.": wrapped("module._orig_mod."),
    "base_model.model.": wrapped("base_model.model."),
    "": lambda name: name.removeprefix("model."),
    "module.,_orig_mod.": lambda name: f"module.{inside(name)}",
}


@pytest.mark.parametrize("prefix", CASES)
def test_a_prefix_is_named_in_one_line_with_what_strips_it(
    tmp_path, make_checkpoint, config_of, tensors_of, prefix
):
    hf = config_of("llama")
    tensors = tensors_of(hf)
    plain = make_checkpoint(hf, tensors, name="plain")
    renamed = {CASES[prefix](name): x for name, x in tensors.items()}
    folder = make_checkpoint(hf, renamed)
    with pytest.raises(ValueError, match=f"--strip_prefix={prefix} to `conv") as error:
        load(folder)
    assert str(error.value).startswith(f"{folder}: tensors are named with")
    assert len(str(error.value).splitlines()) == 1
    found = load(folder, strip_prefix=prefix)
    expected = load(plain)
    np.testing.assert_array_equal(
        found.variables["params"]["layers"]["attention"]["q_proj"]["kernel"],
        expected.variables["params"]["layers"]["attention"]["q_proj"]["kernel"],
    )
    assert found.identity == expected.identity
    from_hf(folder, tmp_path / "ours", strip_prefix=prefix)
    assert identity(tmp_path / "ours") == expected.identity
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert load(tmp_path / "back").identity == expected.identity


def test_a_prefix_that_no_tensor_has_is_an_error(make_checkpoint, config_of):
    folder = make_checkpoint(config_of("llama"))
    with pytest.raises(ValueError, match=r"strip_prefix='modul\.' changes no tensor's"):
        load(folder, strip_prefix="modul.")


def test_two_tensors_of_one_name_are_an_error(make_checkpoint, config_of, tensors_of):
    hf = config_of("llama")
    tensors = tensors_of(hf)
    tensors["ema.model.norm.weight"] = tensors["model.norm.weight"]
    folder = make_checkpoint(hf, tensors)
    with pytest.raises(ValueError, match=r"makes model\.norm\.weight of two tensors"):
        load(folder, strip_prefix="ema.")


def test_a_class_without_a_head_is_told_apart(make_checkpoint, config_of, tensors_of):
    hf = config_of("llama")
    tensors = {
        name.removeprefix("model."): x
        for name, x in tensors_of(hf).items()
        if name != "lm_head.weight"
    }
    with pytest.raises(ValueError, match=r"no lm_head\.weight either\. Save the model"):
        load(make_checkpoint(hf, tensors))


def test_names_that_fit_stay_as_they_are():
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        assert stripped(name, "module.") == name


@pytest.mark.parametrize(
    "given",
    ["module", "module,_orig_mod", " module. , _orig_mod.", "_orig_mod\nmodule"],
)
def test_a_prefix_may_lack_its_dot_and_have_blanks_around(given):
    assert stripped("module.lm_head.weight", given) == "lm_head.weight"
    assert stripped("modules.lm_head.weight", given) == "modules.lm_head.weight"


def test_blanks_alone_are_no_prefix():
    for given in ("", " ", ",", "."):
        assert stripped("norm.weight", given) == "model.norm.weight"
