"""Settings that cannot work are found before any data is read."""

import re

import pytest

from beacon_jax.training import trainer
from beacon_jax.training.check import check_settings
from beacon_jax.training.trainer import train


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainable", "base", "trainable='base' is unknown: use 'beacon' or 'all'"),
        ("trainable", "becon", "trainable='becon' is unknown: did you mean beacon"),
        ("optimizer.name", "adam", "optimizer.name='adam' is .*did you mean adamw"),
        ("optimizer.schedule", "cosin", "'cosin' is unknown: did you mean cosine"),
        ("beacon.placement", "apend", "placement='apend' is .*did you mean append"),
        ("dtype", "float8", "dtype='float8' is unknown"),
        ("remat", "full", "remat='full' is unknown: use 'auto' or 'lean' or"),
        ("attention", "flash", "attention='flash' is unknown"),
        ("loss.average", "mean", "loss.average='mean' is unknown"),
        ("loss.kind", "distill", "loss.kind='distill' is unknown: did you mean distil"),
        ("loss.label_weight", -1.0, "loss.label_weight=-1.0 must not be negative"),
        ("loss.label_weight", 0.5, "loss.label_weight=0.5 is for loss.kind='distil'"),
        ("loss.attention_weight", -1.0, "loss.attention_weight=-1.0 must not be neg"),
        ("loss.attention_queries", 0, "loss.attention_queries=0 must be at least 1"),
        ("init_from", "", "init_from=''"),
        ("log_every", 0, "log_every=0 must be at least 1"),
        ("memory_slots", -1, "memory_slots=-1 must not be negative"),
        ("memory_slots", 1, "memory_slots=1 does not hold one window at the highest"),
        ("profile_steps", (3, 2), r"profile_steps=\(3, 2\) is no range of steps"),
        ("peak_tflops", -1.0, "peak_tflops=-1.0 must not be negative"),
        ("uniform_plans", 50.0, "uniform_plans=50.0 is a share of the steps"),
        ("beacon.ratios", ("a", 2), r"beacon.ratios=\('a', 2\) has 'a': use whole num"),
        ("profile_steps", ("a",), r"profile_steps=\('a',\) has 'a': use whole numbers"),
        ("data.dummy_every", ("x",), "data.dummy_every=.* has 'x': use whole numbers"),
        ("beacon.ratios", (3,), "beacon: window=8 .* 3 does not divide"),
        ("beacon.param", ("w",), r"beacon: param=\('w',\) must be different letters"),
        ("beacon.sink", 9, "beacon: sink=9 must be between 0 and window=8"),
        ("optimizer.name", "sgd", "optimizer.name='sgd' is unknown"),
        ("optimizer.schedule", "step", "optimizer.schedule='step' is unknown"),
        ("optimizer.lr", 0.0, "optimizer.lr=0.0 must be more than 0"),
        ("optimizer.b2", 1.0, r"optimizer.b2=1.0 must lie in \[0, 1\)"),
        ("optimizer.max_nonfinite", 0, "optimizer.max_nonfinite=0 must be at least 1"),
        ("mesh.data", 99, "mesh=.*needs 99 devices, there are 8"),
        ("mesh.fsdp", 0, "mesh.fsdp=0 must be a number of devices"),
        ("accumulate", 3, "3 does not divide data.stages.stage1.batch_size=2"),
        ("data.passkey_questions", 0, "data.passkey_questions=0 must be at least 1"),
        ("data.passkey_tail", -1, "data.passkey_tail=-1 must not be negative"),
        ("data.copy_weight", -1.0, "data.copy_weight=-1.0 must not be negative"),
        ("data.dummy_every", (), r"data.dummy_every=\(\) must be numbers of at least"),
        ("data.stages.stage1.steps", 0, "data.stages.stage1.steps=0 must be at least"),
        ("data.stages.stage1.length", -8, "data.stages.stage1.length=-8 must be at"),
        ("data.stages.stage1.batch_size", 0, "data.stages.stage1.batch_size=0 must be"),
        ("data.stages.stage1.dummies", 2.0, "data.stages.stage1.dummies=2.0 must lie"),
        (
            "data.stages.stage1.mix.text",
            -1.0,
            "data.stages.stage1.mix=.* needs",
        ),
    ],
)
def test_a_wrong_setting_is_named_before_data_is_read(
    config, tmp_path, monkeypatch, key, value, message
):
    monkeypatch.setattr(trainer, "make_data", lambda *_: pytest.fail("data is read"))
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path)


@pytest.mark.parametrize("change", [{"trainable": "all"}, {"mesh.stage": 2}])
def test_attention_is_held_to_that_of_a_base_that_stays(config, change, tmp_path):
    config.loss.attention_weight = 0.1
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match="loss.attention_weight=0.1 .*or loss.attent"):
        check_settings(config, tmp_path / "run")


def test_a_folder_that_is_not_there_is_named_with_its_key(config, tmp_path):
    good = config.init_from
    (tmp_path / "empty").mkdir()
    for key, value, message in (
        ("init_from", "/nope", "init_from=/nope: there is no such folder. Give a fol"),
        ("init_from", str(tmp_path / "empty"), "has no config.json"),
        ("tokenizer.path", "meta/llama", "tokenizer.path='meta/llama' does not exist"),
        ("tokenizer.path", str(tmp_path / "empty"), "has no tokenizer files"),
    ):
        config.init_from, config.tokenizer.path = good, ""
        config.update_from_flattened_dict({key: value})
        with pytest.raises(FileNotFoundError, match=re.escape(message)):
            check_settings(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--workdir=.*file is a file: name a folder"):
        check_settings(config, tmp_path / "file")
    with pytest.raises(OSError, match="--workdir=/proc/run cannot be written"):
        check_settings(config, "/proc/run")


def test_a_run_writes_nothing_where_it_reads(config, tmp_path):
    (tmp_path / "a.jsonl").touch()
    config.data.stages = {}
    config.data.sources = (str(tmp_path),)
    with pytest.raises(ValueError, match=r"--workdir=.* lies in data\.sources="):
        check_settings(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config.data.sources = (f"{tmp_path}/*.jsonl",)
    check_settings(config, tmp_path / "run")


def test_fields_of_a_random_model_are_checked(config, tmp_path):
    config.init_from, config.tokenizer.train = "", True
    config.model.update({"family": "llama", "hidden_sise": 8})
    with pytest.raises(ValueError, match="config.model: .*hidden_sise"):
        check_settings(config, tmp_path)
    config.tokenizer.vocab_size = 256
    with pytest.raises(ValueError, match="tokenizer.vocab_size=256 must be at least"):
        check_settings(config, tmp_path)
