"""Choices for a user's model and text: from facts, printed, overridable, recorded."""

import json
import runpy
import shlex
from pathlib import Path

import pytest

from beacon_jax.training import hardware, own
from beacon_jax.training.check_data import check_data
from beacon_jax.training.config import OPEN, lookup

ROOT = Path(__file__).parents[2]
BASE = str(ROOT / "assets/tiny-base")


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        line = f"Line {i} of a text about rivers and stones.\n"
        (text / f"{i}.txt").write_text(line * 100)
    config = runpy.run_path(str(ROOT / "configs/own.py"))["get_config"]()
    config.init_from, config.data.sources = BASE, (str(text),)
    return config.lock()


def chosen(config, tmp_path):
    lines = []
    made = own.choose(config, tmp_path / "run", lines.append)
    return made, lines


def test_every_open_key_is_chosen_and_printed_with_its_reason(config, tmp_path):
    made, lines = chosen(config, tmp_path)
    check_data(made)
    for key in OPEN:
        assert lookup(made, key) is not None
        assert sum(line.startswith(f"  {key}=") for line in lines) == 1
    assert all(lookup(config, key) is None for key in OPEN)
    assert any("512 positions" in line for line in lines)
    window, length = made.beacon.window, made.data.stages.stage1.length
    assert all(window % ratio == 0 for ratio in made.beacon.ratios)
    assert length % window == 0 and length >= 3 * window


def test_what_is_set_by_hand_stays_and_the_rest_suits_it(config, tmp_path):
    config.beacon.window = 32
    config.data.stages.stage1.steps = 7
    made, lines = chosen(config, tmp_path)
    assert (made.beacon.window, made.data.stages.stage1.steps) == (32, 7)
    assert made.data.stages.stage1.length % 32 == 0
    assert not any("stage1.steps=" in line for line in lines)


@pytest.mark.parametrize("name", ["steps", "length", "batch_size"])
def test_a_number_that_cannot_work_is_named(config, tmp_path, name):
    config.data.stages.stage1[name] = 0
    with pytest.raises(ValueError, match=rf"stage1\.{name}=0 must be at least 1"):
        chosen(config, tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("", "{", r"config\.json is not JSON.*use another --workdir"),
        ("", "[]", r"config\.json has list where a JSON object"),
        ("beacon", [], r"damaged: config.beacon is \[\], not an object"),
        ("seed", "0", "damaged: config.seed is '0', not a whole number"),
        ("optimizer.lr", "fast", "damaged: config.optimizer.lr is 'fast', not a numb"),
        ("dtype", None, "damaged: config.dtype is None, not a text"),
        ("data.stages.stage1.steps", True, "damaged: .*steps is True, not a whole"),
        ("data.stages.stage1", 7, "damaged: data.stages.stage1.length is None, not a"),
    ],
)
def test_damaged_choices_of_a_run_are_named(config, tmp_path, key, value, message):
    made, _ = chosen(config, tmp_path)
    record = made.to_dict()
    if key:
        group, _, name = key.rpartition(".")
        (lookup(record, group) if group else record)[name] = value
        value = json.dumps(record)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(value)
    with pytest.raises(ValueError, match=message):
        chosen(config, tmp_path)


def test_less_memory_means_smaller_rows_and_then_an_error(
    config, tmp_path, monkeypatch
):
    whole, _ = chosen(config, tmp_path)
    monkeypatch.setattr(own, "PROCESS_BYTES", 0)
    tokens = lambda c: c.data.stages.stage1.length * c.data.stages.stage1.batch_size
    room = [2**40]
    monkeypatch.setattr(own, "device_bytes", lambda device: room[0])
    while tokens(chosen(config, tmp_path)[0]) == tokens(whole):
        room[0] //= 2
    assert room[0] > 1e6
    monkeypatch.setattr(own, "device_bytes", lambda device: int(1e6))
    with pytest.raises(ValueError, match="no window and row fit: the device's 0.0 GiB"):
        chosen(config, tmp_path)


def test_a_run_that_goes_on_takes_what_it_recorded(config, tmp_path):
    made, _ = chosen(config, tmp_path)
    record = made.to_dict()
    record["data"]["stages"]["stage1"]["steps"] = 123
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    again, lines = chosen(config, tmp_path)
    assert again.data.stages.stage1.steps == 123
    assert len(lines) == 1 and "going on" in lines[0]


def test_a_config_without_open_keys_is_left_alone(config, tmp_path):
    made, _ = chosen(config, tmp_path)
    assert own.choose(made, tmp_path / "run") is made


def test_what_is_missing_is_named(config, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A short text.\n" * 5)
    empty = tmp_path / "empty"
    empty.mkdir()
    config.data.heldout = 0.0
    for key, value, error, message in (
        ("init_from", "", ValueError, "init_from='': name a folder with a model"),
        ("init_from", str(tmp_path / "no"), FileNotFoundError, "config.json"),
        ("data.sources", (), ValueError, "--config.data.sources=FOLDER"),
        ("data.sources", (str(short),), ValueError, "tokens of text allow no larg"),
        ("data.sources", (str(empty),), FileNotFoundError, "no text among its 0"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict({key: value})
        with pytest.raises(error, match=message):
            chosen(wrong, tmp_path)


def test_a_model_with_too_few_positions_is_an_error(config, tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for file in Path(BASE).glob("*"):
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    fields = json.loads((Path(BASE) / "config.json").read_text())
    fields["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(fields))
    config.init_from = str(folder)
    with pytest.raises(ValueError, match="has 64 positions: beacons need at least 128"):
        chosen(config, tmp_path)


def test_the_next_commands_have_real_paths(config, tmp_path):
    made, _ = chosen(config, tmp_path)
    export = tmp_path / "a run" / "export"
    words = shlex.split(own.next_commands(made, export))  # as a shell reads it
    assert words.count(f"--model={export}") == 2
    assert f"--out={export.parent / 'evaluation'}" in words
    (context,) = [w for w in words if w.startswith("--context=")]
    assert Path(context.removeprefix("--context=")).is_file()
    assert "--ratios=2,4,8" in words
    (lengths,) = [w for w in words if w.startswith("--lengths=")]
    window = made.beacon.window
    for length in map(int, lengths.removeprefix("--lengths=").split(",")):
        assert length % window == 0 and length >= 2 * window  # what `evaluate` asks


def test_evaluation_is_of_the_text_only_if_enough_of_it_is_held_out(config, tmp_path):
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text("A line of text.\n" * 10_000)
    made, _ = chosen(config, tmp_path)
    text = own.next_commands(made, tmp_path / "run" / "export")
    assert f"--text={made.data.sources[0]} " in text
    few = tmp_path / "few"
    few.mkdir()
    for name in ("argparse", "inspect"):  # neither name is in the held-out tenth
        (few / f"{name}.txt").write_text("A line of text.\n" * 20_000)
    config.data.sources = (str(few),)
    made, shown = chosen(config, tmp_path)
    assert any(
        "data.heldout=0.1 holds out none of its documents" in line for line in shown
    )
    assert "--text=" not in own.next_commands(made, tmp_path / "run" / "export")


@pytest.mark.parametrize("gain, dtype", [(1.4, "float32"), (4.0, "bfloat16")])
def test_a_cpu_trains_in_the_dtype_whose_products_are_much_faster(
    config, tmp_path, monkeypatch, gain, dtype
):
    rates = {"float32": 1e11, "bfloat16": gain * 1e11}
    for module in (hardware, own):
        monkeypatch.setattr(module, "product_rate", lambda _, dtype, *__: rates[dtype])
    made, lines = chosen(config, tmp_path)
    assert made.dtype == dtype
    line = f"  dtype={dtype}: bfloat16 products are {gain:g} times as fast"
    assert line in lines
