"""Values that no good file of weights has: NaN, only zeros, and what a cast loses."""

import logging

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from beacon_jax.hf import load
from beacon_jax.hf.conversion import from_hf
from beacon_jax.hf.values import finite

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(make_checkpoint, config_of):
    return make_checkpoint(config_of("qwen2"))


@pytest.fixture
def change(folder):
    def change(name, value, dtype=np.float32):
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: x.astype(dtype) for k, x in tensors.items()}
        tensors[name].reshape(-1)[...] = value
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32, float])
def test_finite_is_that_of_numpy(kind):
    largest = ml_dtypes.finfo(kind).max
    for value in (0.0, -0.0, largest, -largest, np.inf, -np.inf, np.nan, -np.nan):
        values = np.zeros((3, 5), kind)
        values[2, 1] = value
        for array in (values, values.T, values[:0]):
            assert finite(array) == np.isfinite(array).all(), value


@pytest.mark.parametrize("stored", ["hf", "converted"])
@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "zero from end to end"), (np.nan, "not finite"), (-np.inf, "not finite")],
)
def test_tensors_without_values_are_named(
    change, folder, tmp_path, caplog, stored, value, said
):
    change(DOWN, value)
    name = DOWN
    with caplog.at_level(logging.WARNING):
        if stored == "converted":
            from_hf(folder, tmp_path / "new")
            assert f"{DOWN} is {said}" in caplog.text
            folder, name = tmp_path / "new", "down_proj/kernel[1]"
            caplog.clear()
        load(folder)
    assert f"{name} is {said}" in caplog.text
    assert caplog.text.count("end to end") + caplog.text.count("not finite") == 1


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.v_proj.bias"])
def test_a_bias_may_be_zero(change, folder, caplog, name):
    change(f"model.layers.0.{name}", 0)
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert not caplog.text


@pytest.mark.parametrize(
    ("dtype", "value", "remedy"),
    [
        ("float16", 65520.0, "float32 or bfloat16"),
        ("float16", -1e6, "float32 or bfloat16"),
        ("bfloat16", 3.4e38, "float32"),
    ],
)
def test_a_value_beyond_a_dtype_is_an_error(
    change, folder, tmp_path, dtype, value, remedy
):
    change(DOWN, value)
    said = rf"{DOWN} has a value of size .*{dtype}: use dtype {remedy}\."
    with pytest.raises(ValueError, match=said):
        load(folder, dtype=dtype)
    with pytest.raises(ValueError, match=said):
        from_hf(folder, tmp_path / "new", dtype=dtype)
    assert not (tmp_path / "new").exists()
    from_hf(folder, tmp_path / "new")
    with pytest.raises(ValueError, match=r"down_proj/kernel\[1\] has a value"):
        load(tmp_path / "new", dtype=dtype)


def test_the_largest_values_of_a_dtype_are_kept(change, folder):
    change(DOWN, 65504.0, ml_dtypes.bfloat16)  # 65,536 there
    with pytest.raises(ValueError, match="float16"):
        load(folder, dtype="float16")
    change(DOWN, 65504.0)
    load(folder, dtype="float16")
