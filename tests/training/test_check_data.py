"""Keys of config.data: wrong ones, those without effect, those of earlier versions."""

import sys

import pytest
from absl import flags

from beacon_jax.cli import options
from beacon_jax.cli import train as command
from beacon_jax.data.batches import STAGE_KEYS
from beacon_jax.training.check_data import ROW_KEYS, check_data
from beacon_jax.training.config import default_config, stage


@pytest.fixture
def rows():
    config = default_config()
    config.data.sources = ("stdlib",)
    return config


@pytest.fixture
def staged(rows):
    rows.data.stages.stage1 = stage(2, 96, 2)
    return rows


def test_sources_are_rows_or_stages_of_rows(rows):
    check_data(rows)
    rows.data.stages.stage1 = stage(2, 96, 2)
    check_data(rows)


def test_every_key_of_data_is_for_stages_for_whole_rows_or_for_both():
    both = {"sources", "root", "heldout", "stages"}
    keys = [*ROW_KEYS, *STAGE_KEYS, *both]
    assert sorted(keys) == sorted(default_config().data)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sources", (), "--config.data.sources=FOLDER"),
        ("sources", (2024,), r"2024 is a int; quote it, .*\('2024',\)"),
        ("sources", ("s3:x",), "scheme 's3' is unknown"),
        ("sources", ("long-llm:a.json",), "data.root='': set data.root"),
        ("heldout", 1.0, "data.heldout=1.0 is a share"),
        ("long", "keep", "data.long='keep' is unknown: use split, cut, drop"),
        ("weights", ("a",), r"data.weights=\('a',\) has 'a': use numbers"),
        ("weights", (-1.0,), r"data.weights=\(-1.0,\) must not be negative"),
        ("min_length", 30000, "data.min_length=30000, data.max_length=20480"),
        ("chat_template", "vicuna", "data.chat_template='vicuna'"),
        ("group", "none", "data.group='none'"),
        ("epochs", 0, "never end: set one"),
        ("weights", (1.0, 2.0), "one number for each of the 1 data.sources"),
        ("max_drop_fraction", 2.0, "data.max_drop_fraction=2.0 is a share"),
        ("workers", -1, "data.workers=-1 must be at least 0"),
        ("passkey_questions", 3, "data.passkey_questions=3: without effect.*empty"),
    ],
)
def test_a_wrong_key_is_named_with_the_remedy(rows, key, value, message):
    rows.data[key] = value
    with pytest.raises(ValueError, match=message):
        check_data(rows)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 3, "data.epochs=3: without effect.*stage1.*set steps"),
        ("passkey_questions", 0, "data.passkey_questions=0 must be at least 1"),
        ("stages", {"stage1": {"length": 0}}, "data.stages.stage1.length=0 must be at"),
    ],
)
def test_a_wrong_key_of_stages_is_named(staged, key, value, message):
    staged.data.update({key: value})
    with pytest.raises(ValueError, match=message):
        check_data(staged)


MOVED = [
    ("text.uri", "docs", "config.text.uri is now config.data.sources"),
    ("text.heldout_fraction", "0.2", "heldout_fraction is now config.data.heldout"),
    ("uri", "docs", "config.uri is now config.data.sources"),
    ("heldout_fraction", "0.2", "heldout_fraction is now config.data.heldout"),
    ("data.uri", "docs", "config.data.uri is now config.data.sources"),
    ("data.cut_long", "True", "cut_long is now config.data.long: 'cut' for True"),
]


@pytest.mark.parametrize(("key", "value", "message"), MOVED)
def test_a_key_of_an_earlier_version_names_the_new_one(
    key, value, message, monkeypatch, tmp_path
):
    file = tmp_path / "old.py"
    file.write_text(
        "from beacon_jax.training.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.{key} = {value!r}\n"
        "    return config\n"
    )
    for words in (
        [f"--config={file}"],
        ["--config=configs/quickstart.py:smoke", f"--config.{key}={value}"],
    ):
        argv = ["train", "--workdir=x", *words]
        monkeypatch.setattr(sys, "argv", argv)
        values = flags.FlagValues()
        command.define_flags(values)
        with pytest.raises(SystemExit) as stopped:
            options.parse(argv, values)
        assert message in str(stopped.value.code)
        assert '"' not in str(stopped.value.code)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["my-docs/2024", "b.jsonl"], ("my-docs/2024", "b.jsonl")),
        (["go d.jsonl", "2024"], ("go d.jsonl", "2024")),
        (["a, b.txt"], ("a, b.txt",)),
        (["n (1) [5]"], ("n (1) [5]",)),
        (["it's"], ("it's",)),
        (["None"], ("None",)),
        (["('a b', 'c')"], ("a b", "c")),
        (["'a b'"], ("a b",)),
    ],
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_source_is_named_on_the_command_line_without_quotes(
    monkeypatch, given, names, apart
):
    argv = ["train", "--workdir=x", "--config=configs/quickstart.py:smoke"]
    for name in given:
        key = "--config.data.sources"
        argv += [key, name] if apart else [f"{key}={name}"]
    monkeypatch.setattr(sys, "argv", argv)
    values = flags.FlagValues()
    command.define_flags(values)
    options.parse(argv, values)
    assert values["config"].value.data.sources == names
