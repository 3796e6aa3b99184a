"""`beacon-jax`: its commands, their --help, and what wrong words end with."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from beacon_jax import __version__, cli, resources
from beacon_jax.cli import options

ROOT = Path(__file__).parents[2]
WITH_FLAGS = [name for name in cli.COMMANDS if name != "lm_eval"]


def module_of(name: str):
    return importlib.import_module(f"beacon_jax.cli.{name}")


def defined(name: str) -> flags.FlagValues:
    values = flags.FlagValues()
    module_of(name).define_flags(values)
    return values


def ends(name: str, *words: str) -> str:
    """What the parser ends the program with."""
    with pytest.raises(SystemExit) as stopped:
        options.parse([f"beacon-jax {name}", *words], defined(name))
    return str(stopped.value.code)


def test_every_file_of_a_command_is_in_the_overview_and_has_a_module_of_its_name():
    shared = {"__init__", "options", "context", "answers"}
    files = {path.stem for path in (ROOT / "beacon_jax" / "cli").glob("*.py")}
    commands = {name for name in files - shared if hasattr(module_of(name), "main")}
    assert commands == set(cli.COMMANDS)
    for name, what in cli.COMMANDS.items():
        assert f"{name:<12}{what}" in cli.overview()
        shim = ROOT / "beacon_jax" / f"{name}.py"
        if name == "bench":  # what it runs is a package of that name
            shim = shim.with_suffix("") / "__main__.py"
        assert len(shim.read_text().splitlines()) <= 6


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_help_has_every_flag_in_a_group_and_an_example_that_parses(name, capsys):
    module, values = module_of(name), defined(name)
    with pytest.raises(SystemExit) as stopped:
        options.parse([f"beacon-jax {name}", "--help"], values, module.__doc__)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for flag in values:
        assert hasattr(values[flag], "group"), f"--{flag} is in no group"
        assert re.search(rf"^  --{flag}\b", shown, re.M), flag
    assert max(map(len, shown.splitlines())) <= options.WIDTH
    examples = re.findall(
        rf"^  beacon-jax {name} (.*)$", shown.replace("\\\n", " "), re.M
    )
    assert examples
    for example in examples:
        words = shlex.split(example)
        for word in words:
            if flag := re.match(r"--(\w+)", word):
                assert flag[1] in values, word


def test_help_of_all_commands_loads_nothing_slow():
    code = f"""
import contextlib, io, sys
from absl import flags
from beacon_jax import cli
for name in {list(cli.COMMANDS)}:
    module = __import__("beacon_jax.cli." + name, fromlist=["x"])
    if hasattr(module, "define_flags"):
        from beacon_jax.cli import options
        values = flags.FlagValues()
        module.define_flags(values)
        options.describe(values, module.__doc__)
print({{"jax", "transformers", "matplotlib", "numpy", "pyarrow"}} & set(sys.modules))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr


def test_defaults_choices_and_required_flags_are_shown():
    shown = options.describe(defined("generate"), "What it does.")
    assert shown.startswith("What it does.\n\nModel\n")
    assert re.search(r"--model=TEXT +.* Required\.\n", shown)
    assert "--lossless=windows|slots" in shown and "Default: windows." in shown
    assert "--logtostderr" not in shown


def test_help_with_a_config_shows_all_its_keys(capsys, monkeypatch):
    words = ["beacon-jax train", "--config=quickstart:smoke", "--help"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        options.parse(words, defined("train"), "Trains.")
    shown = capsys.readouterr().out
    assert "\n  beacon.window=32\n" in shown and "\n  seed=0\n" in shown


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("generate", ["--modl=x"], "--modl: no such flag; did you mean --model?"),
        ("generate", ["--zzz"], "--zzz: no such flag; beacon-jax generate --help"),
        ("generate", [], "--model is missing (HF or converted folder"),
        ("compress", ["--top_k=1"], "--top_k: no such flag"),
        ("compress", [], "--model, --out are missing."),
        ("generate", ["--model=x", "--dtype=f"], "--dtype=f: value should be one of"),
        ("generate", ["--model=x", "--seed=-1"], "--seed=-1: give a whole number from"),
        ("generate", ["--top_k=1.5"], "--top_k=1.5: give a whole number."),
        ("generate", ["--top_p=x"], "--top_p=x: give a number."),
        ("generate", ["--json=maybe"], "--json=maybe: give nothing, true or false."),
        ("generate", ["--nojson=1"], "--nojson takes no value: give --nojson alone."),
        ("generate", ["--ratio"], "--ratio has no value: give it as --ratio=..."),
        (
            "generate",
            ["--flagfile=no/such"],
            "--flagfile=no/such cannot be read (No such file or directory): name a te",
        ),
        ("train", ["--config=quikstart"], "did you mean quickstart?"),
        *(
            (
                "train",
                ["--config=quickstart", *more, "--config.data.sources=a.txt"],
                "quickstart.py: name one config; --config.KEY=VALUE changes",
            )
            for more in (["--config=quickstart"], ["-config", "quickstart"])
        ),
        ("train", ["--config=no/such.py"], "The named ones are llama2_7b_finetune"),
        (
            "train",
            ["--config=quickstart:no"],
            "=quickstart:no is unknown: use :long",
        ),
        (
            "train",
            ["--config=quickstart:smok"],
            "did you mean smoke? use :long",
        ),
        (
            "train",
            ["--config=llama2_7b_pretrain:smok"],
            "unknown: did you mean smoke?",
        ),
        ("train", ["--config=quickstart"], "--workdir is missing (Folder of the run)"),
        (
            "train",
            ["--config=quickstart", "--workdir=x", "--config.xyzzy=1"],
            "--config.xyzzy: no such key; --config=NAME --help lists them",
        ),
        *(
            ("train", ["--config=quickstart:smoke", f"--config.{given}"], message)
            for given, message in (
                (
                    "optimizer.lrr=1",
                    "lrr: no such key; did you mean --config.op",
                ),
                (
                    "lr=1",
                    "no such key; did you mean --config.optimizer.lr?",
                ),
                ("heldout=0", "did you mean --config.data.heldout?"),
                ("batch_size=1", "did you mean --config.data.batch_size?"),
                ("stages.stage1.steps=4", "mean --config.data.stages.stage1.steps?"),
                ("optimizer.lr.x=1", "--config.optimizer.lr.x: no such key; did you"),
                (
                    "optimizer.lr=a:b",
                    "optimizer.lr=a:b: the value must be a number.",
                ),
                ("seed=1.5", "--config.seed=1.5: the value must be a whole number."),
                ("beacon.use=maybe", "beacon.use=maybe: the value must be True or Fal"),
                ("mesh=data:1", "set one: --config.mesh.KEY=VALUE."),
            )
        ),
    ],
)
def test_wrong_flags_end_with_one_line(name, words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"beacon-jax {name}", *words])
    said = ends(name, *words)
    assert said.startswith("error: ") and message in said
    assert "\n" not in said


@pytest.mark.parametrize("name", ["generate", "train"])
def test_a_file_of_flags_that_is_no_text_is_named(name, tmp_path):
    (tmp_path / "flags").write_bytes(b"--prompt=caf\xe9\n")
    given = f"--flagfile={tmp_path / 'flags'}"
    assert ends(name, given).startswith(f"error: {given} is no text in UTF-8: name a")


@pytest.mark.parametrize(
    ("name", "words", "flag"),
    [
        ("evaluate", ["--model=tiny-beacon"], "out"),
        ("evaluate", ["--report"], "out"),
        ("bench", [], "out"),
        ("bench", ["--plan"], "out"),
        ("convert", ["--src=tiny-beacon", "from-hf"], "dst"),
        ("convert", ["--src=tiny-beacon", "to-hf"], "dst"),
        ("prepare", ["--config=llama2_7b_pretrain:smoke"], "out"),
        ("inspect", ["--config=llama2_7b_pretrain:smoke"], "out"),
        ("train", ["--config=llama2_7b_pretrain:smoke"], "workdir"),
    ],
)
def test_what_cannot_be_written_is_named_before_anything_is_done(
    name, words, flag, tmp_path, monkeypatch
):
    file, values = tmp_path / "file", defined(name)
    file.write_text("kept")
    words = [f"beacon-jax {name}", *words, f"--{flag}={file}"]
    rest = options.parse(words, values)
    monkeypatch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit) as stopped:
        module_of(name).main(rest)
    assert stopped.value.code == f"error: --{flag}={file} is a file: name a folder."
    assert file.read_text() == "kept"


def test_commands_are_found_by_name(capsys, monkeypatch):
    for words in ([], ["--help"]):
        cli.main(words)
        assert capsys.readouterr().out == cli.overview() + "\n"
    cli.main(["--version"])
    assert capsys.readouterr().out == f"beacon-jax {__version__}\n"
    with pytest.raises(SystemExit, match="no command 'trian': did you mean train. the"):
        cli.main(["trian"])
    called = []
    monkeypatch.setattr(cli, "start", lambda *given: called.append(given))
    cli.main(["compress", "--out=x"])
    assert called == [("compress", ["--out=x"])]


def test_ctrl_c_is_one_line(monkeypatch, capfd):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(module_of("lm_eval"), "main", interrupt)
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stopped:
        cli.start("lm_eval", [])
    assert stopped.value.code == 130
    assert capfd.readouterr().err == "\nlm_eval: stopped by Ctrl-C\n"


# --- files that come with the package ----------------------------------------------


@pytest.mark.parametrize(
    ("given", "letters"),
    [("q,k", ("q", "k")), ("v", ("v",)), ("('q', 'o')", ("q", "o")), ("()", ())],
)
def test_letters_of_projections_need_no_quotes(monkeypatch, given, letters):
    words = ["train", "--config=quickstart", f"--config.beacon.param={given}"]
    monkeypatch.setattr(sys, "argv", words)
    values = defined("train")
    options.parse([*words, "--workdir=w"], values)
    assert values.config.beacon.param == letters


def test_a_config_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = resources.config("quickstart:smoke")
    assert packaged == f"{resources.folder('configs') / 'quickstart.py'}:smoke"
    assert resources.config("configs/quickstart.py") == packaged.removesuffix(":smoke")
    Path("quickstart").write_text("")
    assert resources.config("quickstart:smoke") == "quickstart:smoke"


def test_models_are_found_by_name_and_paths_that_exist_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = str(resources.folder("assets") / "tiny-beacon")
    assert resources.asset("tiny-beacon") == own
    assert resources.asset(Path("assets/tiny-beacon")) == own
    for other in ("no-such", "", "../assets/tiny-beacon", "/tiny-beacon"):
        assert resources.asset(other) == other
    Path("tiny-beacon").mkdir()
    assert resources.asset("tiny-beacon") == "tiny-beacon"


def test_a_missing_package_is_an_error_that_names_its_extra():
    resources.require("absl", extra="x", for_="this")
    with pytest.raises(ImportError, match=r'^a thing needs no_such: pip install "beac'):
        resources.require("no_such", extra="plots", for_="a thing")
