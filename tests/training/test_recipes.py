"""The recipes in configs/: what they resolve to, their docstrings, their smoke runs.

`python -m tests.training.test_recipes` writes the resolved configs anew.
"""

import ast
import difflib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from beacon_jax import hf
from beacon_jax.cli import options
from beacon_jax.cli import train as command
from beacon_jax.data.sources import parse_uri
from beacon_jax.training.trainer import train

ROOT = Path(__file__).parents[2]
RESOLVED = Path(__file__).parent / "resolved"
STAGED = ("llama2_7b", "qwen2_7b", "llama3_8b", "mistral_7b")
RECIPES = (
    *(f"{model}_{stage}" for model in STAGED for stage in ("pretrain", "finetune")),
    "llama2_7b_full_ft",
    "qwen2_7b_full_ft",
    "qwen2_0_5b_colab",
)
REGENERATE = "python -m tests.training.test_recipes"


def path_of(recipe):
    return ROOT / "configs" / f"{recipe}.py"


def config_of(recipe, arg=""):
    return runpy.run_path(str(path_of(recipe)))["get_config"](arg)


def resolved(recipe):
    return json.dumps(config_of(recipe).to_dict(), indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_resolves_to_its_committed_settings(recipe):
    file = RESOLVED / f"{recipe}.json"
    committed = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    now = resolved(recipe).splitlines()
    diff = difflib.unified_diff(
        committed, now, f"committed {file.name}", f"configs/{recipe}.py", lineterm=""
    )
    text = "\n".join(diff)
    assert not text, f"{text}\nIf the change is meant: {REGENERATE}"


def test_every_committed_file_has_a_recipe():
    assert sorted(f.stem for f in RESOLVED.glob("*")) == sorted(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_in_the_docstring_is_accepted(recipe, monkeypatch):
    doc = ast.get_docstring(ast.parse(path_of(recipe).read_text(encoding="utf-8")))
    assert doc is not None
    found = re.search(r"^python -m (beacon_jax\.train .*)$", doc, re.MULTILINE)
    assert found, f"no command in the docstring of configs/{recipe}.py"
    words = shlex.split(found[1])
    assert f"--config=configs/{recipe}.py" in words
    argv = [word.replace("--config=", f"--config={ROOT}/") for word in words]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    command.define_flags(values)
    options.parse(argv, values)
    config: Any = values["config"].value
    assert values["workdir"].value == f"out/{recipe}"
    # What cannot have a default is named in the command.
    assert config.init_from
    assert config.data.root == ("" if config.data.stages else "DIR")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_docstring_names_hardware_and_marks_estimates(recipe):
    doc = ast.get_docstring(ast.parse(path_of(recipe).read_text(encoding="utf-8")))
    text = " ".join((doc or "").split())
    for words in ("Hardware: ", " tokens, ", "Estimate, not measured: ", " FLOPs, "):
        assert words in text
    assert f"configs/{recipe}.py:smoke" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_unknown_argument_is_an_error(recipe):
    with pytest.raises(ValueError, match=f"{recipe}:long is unknown: use :smoke"):
        config_of(recipe, "long")


def test_the_colab_recipe_has_a_variant_for_gpus_without_bfloat16():
    whole, t4 = (config_of("qwen2_0_5b_colab", arg) for arg in ("", "t4"))
    assert (whole.dtype, t4.dtype) == ("bfloat16", "float16")
    steps = lambda config: [s.steps for s in config.data.stages.values()]
    assert [4 * n for n in steps(t4)] == steps(whole)


TEMPLATES = {"llama2": "llama-2", "qwen2": "qwen", "llama3": "llama-3"}


@pytest.mark.parametrize("model", STAGED)
def test_the_stages_have_the_data_of_the_paper(model):
    first, second = (
        config_of(f"{model}_pretrain").data,
        config_of(f"{model}_finetune").data,
    )
    assert first.sources == ("long-llm:redpajama/train.json",)
    assert (first.tokens, first.min_length, first.max_length) == (10**9, 2400, 20480)
    assert not first.chat_template
    counts = [parse_uri(uri).count for uri in second.sources]
    assert counts == [None, None, 5000, 2000, 5000]  # 13,000 and 3,000 are whole files
    assert {parse_uri(uri).scheme for uri in second.sources} == {"long-llm"}
    assert (second.tokens, second.min_length, second.max_length) == (0, 7200, 20480)
    name = model.split("_")[0]
    assert second.chat_template == TEMPLATES.get(name, name)
    for data in (first, second):
        assert (data.batch_size, data.group, data.epochs) == (8, "strict", 1)
        assert (data.long, data.heldout) == ("cut", 0.0)
        assert not data.stages and not data.weights


@pytest.mark.parametrize(
    ("recipe", "family", "beacons"),
    [
        pytest.param("qwen2_7b_finetune", "qwen2", True, marks=pytest.mark.slow),
        pytest.param("llama2_7b_pretrain", "llama", True, marks=pytest.mark.slow),
        pytest.param("llama2_7b_full_ft", "llama", False, marks=pytest.mark.slow),
    ],
)
def test_smoke_trains_and_exports(recipe, family, beacons, tmp_path):
    config = config_of(recipe, "smoke")
    config.beacon.ratios = (4,)  # each ratio is a branch that takes 4 s to compile
    summary = train(config, tmp_path)
    assert summary["steps_of_this_process"] == 6
    assert (summary["base_hash_before"] is not None) == beacons
    model = hf.load(tmp_path / "export").config
    assert model.family == family
    assert model.qkv_bias == (family == "qwen2")
    assert (model.num_kv_heads < model.num_heads) == (family == "qwen2")
    assert (model.beacon is not None) == beacons


if __name__ == "__main__":
    RESOLVED.mkdir(exist_ok=True)
    for name in RECIPES:
        file = RESOLVED / f"{name}.json"
        file.write_text(resolved(name), encoding="utf-8")
    print(f"wrote {len(RECIPES)} files to {RESOLVED.relative_to(ROOT)}")
