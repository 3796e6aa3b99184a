"""Beacons of an adapter folder, on the command line and in evaluation."""

import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from beacon_jax.cli import compress, evaluate, generate
from beacon_jax.evaluation import reading
from beacon_jax.hf import load, save_hf
from beacon_jax.hf.adapter import write_adapter
from beacon_jax.inference import loading, merging
from beacon_jax.inference.memory import Memory
from beacon_jax.model.config import BeaconConfig

TEXT = "Boats left the harbour at dawn. " * 3


@pytest.fixture(scope="module")
def base(make_folder):
    return make_folder(beacons=False)


@pytest.fixture(scope="module", params=["none", "last"])
def adapter(request, base, tmp_path_factory):
    beacon = BeaconConfig(window=8, ratios=(2, 4), rank=2, anchor=request.param)
    model = load(base, beacon=beacon, quiet=True)
    rng = np.random.default_rng(0)
    for part in model.variables["beacon"]["layers"]["attention"].values():
        b = part["lora_b"]
        part["lora_b"] = rng.standard_normal(b.shape).astype(b.dtype)
    folder = tmp_path_factory.mktemp("low")
    save_hf(folder / "whole", model.config, model.variables, base)
    write_adapter(folder / "whole", folder / "adapter")
    return folder / "adapter"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "context.txt").write_text(TEXT)

    def call(module, *arguments):
        values = flags.FlagValues()
        module.define_flags(values)
        values(["command", *map(str, arguments)])
        code: object = 0
        try:
            module.main(["command"], values)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


def test_generate_and_compress_take_beacons_beside_the_model(run, base, adapter):
    model = loading.load(base, beacons=adapter)
    where = f"--model={base}", f"--beacons={adapter}", "--context=context.txt"
    options = "--ratio=4", "--prompt=At dawn", "--max_new_tokens=6"
    code, out, err = run(generate, *where, *options)
    expected = model.generate("At dawn", context=TEXT, ratio=4, max_new_tokens=6)
    assert (code, out) == (0, expected + "\n"), err
    code, _, err = run(compress, *where, "--ratio=4", "--out=text.beacon")
    assert code == 0, err
    # The pack is known by the hash of the beacons, wherever they were read from.
    whole = loading.load(adapter.with_name("whole"))
    memory = Memory.load("text.beacon", whole)
    assert memory.identity == whole.identity == model.identity


def test_anchored_beacons_have_no_form_that_the_release_reads(adapter, tmp_path):
    src = adapter.with_name("whole")
    beacon = load(src).config.beacon
    assert beacon is not None
    if beacon.anchor == "none":
        assert "KL per token" in merging.merge(src, tmp_path / "released")
    else:
        with pytest.raises(ValueError, match=r"beacon_anchor='last'.*Use --adapter"):
            merging.merge(src, tmp_path / "released")
        assert not (tmp_path / "released").exists()


def test_another_base_ends_in_one_line_unless_allowed(run, base, adapter, make_folder):
    other = make_folder(beacons=False)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, other / "model.safetensors")
    where = f"--model={other}", f"--beacons={adapter}", "--context=context.txt"
    options = "--ratio=4", "--prompt=At dawn", "--max_new_tokens=1"
    code, out, _ = run(generate, *where, *options)
    assert isinstance(code, str) and out == ""
    assert code.startswith(f"error: --beacons={adapter} were trained on another base")
    assert "--allow_other_base" in code
    code, _, err = run(generate, *where, *options, "--allow_other_base")
    assert code == 0
    assert f"warning: --beacons={adapter} were trained on another base" in err
    code, _, _ = run(generate, f"--model={adapter}", "--prompt=At dawn")
    assert isinstance(code, str) and "has beacons alone: load the base" in code


def test_evaluate_loads_them_too(base, adapter, monkeypatch, tmp_path):
    expected = loading.load(base, beacons=adapter).identity
    model = reading.load_model(str(base), (2,), beacons=str(adapter))
    assert model.identity == expected
    values = flags.FlagValues()
    evaluate.define_flags(values)
    given = f"--model={base}", f"--beacons={adapter}", f"--out={tmp_path}"
    values(["evaluate", *given, "--allow_other_base", "--ratios=2", "--tasks=needle"])
    asked = {}

    def caught(path, ratios, **options):
        asked.update(options, path=path)
        raise ValueError("enough")

    monkeypatch.setattr(reading, "load_model", caught)
    with pytest.raises(ValueError, match="enough"):
        evaluate.run(values)
    assert asked["path"] == str(base) and asked["beacons"] == str(adapter)
    assert asked["allow_other_base"] is True
