"""What README.md and docs/ print can be pasted, and the site has no broken link."""

import collections
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from beacon_jax import cli
from beacon_jax.cli import options

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLOW = pytest.mark.slow  # compiles a program per memory: README.md alone, 20 s
GENERATE = load(ROOT / "docs" / "generate.py")


def commands():
    """(page, command, its arguments) of every command line in a code block."""
    for page in PAGES:
        text = page.read_text("utf-8")
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
        shell = [block for language, block in blocks if language in ("", "sh")]
        for line in "\n".join(shell).replace("\\\n", " ").splitlines():
            if found := re.match(r"beacon-jax (\w+) *(.*)$", line):
                yield page.name, found[1], found[2]


@pytest.mark.parametrize(
    "page",
    [GENERATE.PAGES[0], *(pytest.param(p, marks=SLOW) for p in GENERATE.PAGES[1:])],
)
def test_the_snippets_of_a_page_run_and_print_what_stands_below_them(page):
    text = (ROOT / page).read_text("utf-8")
    assert "```text" in text
    assert GENERATE.with_outputs(text) == text, "run: python docs/generate.py"


def test_the_readme_fits_and_begins_with_a_short_snippet():
    text = README.read_text("utf-8")
    assert len(text.encode()) <= 12 * 1024
    snippet, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippet.splitlines()) <= 13 and not others


def test_the_readme_begins_with_a_command_and_figures_that_were_measured():
    """No owner is known, and no word of the method stands before the first command."""
    text = README.read_text("utf-8")
    first, said = text.split("## ")[0].split("```\n")[1:]
    assert first.startswith("make setup && ") and "beacon-jax generate" in first
    before = text.split("```")[0]
    assert not re.findall(r"beacons?\b|window|ratio|slot", before)
    assert not [page for page in PAGES if "OWNER" in page.read_text("utf-8")]
    measured = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    figures = re.findall(r"\d[\d,]*[.,]\d+", said.split("**What it saves.**")[1])
    assert len(figures) >= 7
    for figure in {*figures} - {"2,048"}:  # of the report below
        assert re.search(rf"\b{re.escape(figure)} (s|MiB|tokens)", measured), figure
    report = re.search(r"\[(\d+) %\]\((\S+)/report.md\)\s+\[(\d+), (\d+)\]", said)
    assert report
    metrics = json.loads((ROOT / report[2] / "metrics.json").read_text("utf-8"))
    (gap,) = (
        [round(100 * each[key]) for key in ("value", "low", "high")]
        for each in metrics["metrics"]
        if (each["method"], each["metric"]) == ("beacon_x4", "gap_closed")
    )
    assert gap == [int(report[i]) for i in (1, 3, 4)]


@pytest.mark.slow  # compiles two programs
def test_the_first_command_of_the_readme_answers_as_it_says():
    first = README.read_text("utf-8").split("```\n")[1].split("\n", 1)[1]
    command = first.replace("beacon-jax", f"{sys.executable} -m beacon_jax")
    ran = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stdout == "71492\n", ran.stderr
    assert "264 context tokens" in ran.stderr


def test_the_readme_links_to_files_that_are_there():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text("utf-8"))
    assert len(links) > 20
    assert not [link for link in links if not (ROOT / link).exists()]


def test_every_command_has_the_flags_that_a_page_gives_it(monkeypatch):
    """Parsed as the command would, config files and their keys too."""
    monkeypatch.chdir(ROOT)
    checked = collections.Counter()
    for page, name, rest in commands():
        assert name in cli.COMMANDS, (page, name)
        command = importlib.import_module(f"beacon_jax.cli.{name}")
        if not hasattr(command, "define_flags"):
            continue  # lm_eval's own parser
        rest = re.split(r" <\S|  +#", rest)[0]
        rest = re.sub(r"\[(?::arg|--config\.key=value ...)\]| \.\.\.", "", rest)
        rest = re.sub(r"\[(--[^]]*)\]", r"\1", rest).replace("/X.py", "/quickstart.py")
        argv = [name, *shlex.split(rest)]
        monkeypatch.setattr(sys, "argv", argv)  # where config_flags looks for keys
        values = flags.FlagValues()
        command.define_flags(values)
        try:
            options.parse(argv, values)  # a name of a config is found here
        except (SystemExit, flags.Error, AttributeError, ValueError) as error:
            pytest.fail(f"{page}: beacon-jax {name} {rest}: {error}")
        checked[name] += 1
    assert checked["generate"] >= 6 and checked["train"] >= 5
    assert checked["evaluate"] >= 5 and checked["compress"] >= 3


def test_every_module_script_config_and_room_that_a_page_names_exists():
    for page in PAGES:
        text = page.read_text("utf-8")
        for module in re.findall(r"-m ((?:beacon_jax|tests)(?:\.[a-z_]+)+)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), (page, module)
        for path in re.findall(r"\b(?:configs|launch)/\w+\.(?:py|sh|ipynb)", text):
            assert (ROOT / path).is_file() or path == "configs/X.py", (page, path)
    tree = README.read_text("utf-8").split("## What is where")[1].split("```")[1]
    rooms = re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)
    packages = {
        path.parent.name for path in (ROOT / "beacon_jax").glob("*/__init__.py")
    }
    assert packages <= set(rooms)
    for room in rooms:
        assert (ROOT / "beacon_jax" / room).is_dir(), room


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs"
)
def test_a_link_or_an_anchor_that_leads_nowhere_fails_the_build(tmp_path):
    """mkdocs in strict mode, with our hook, on two pages of their own."""
    (tmp_path / "docs").mkdir()
    hooks = ROOT / "docs" / "hooks.py"
    settings = (ROOT / "mkdocs.yml").read_text("utf-8").split("nav:")[0]
    settings = settings.replace("hooks: [docs/hooks.py]", f"hooks: [{hooks}]")
    (tmp_path / "mkdocs.yml").write_text(settings)

    def build(text):
        (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{text}\n")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    good = build("[a](#title) [b](../README.md) [c](changelog.md)")
    assert good.returncode == 0, good.stderr
    site = (tmp_path / "out" / "site" / "index.html").read_text("utf-8")
    assert "/blob/main/README.md" in site
    bad = build("[a](#nowhere) [b](../nothing.md) [c](nothing.md)")
    assert bad.returncode != 0
    for name in ("#nowhere", "links to nothing.md", "'nothing.md'"):
        assert name in bad.stderr, bad.stderr


def test_every_section_of_the_docs_that_the_code_cites_is_there():
    cited = re.compile(r"docs/([\w-]+\.md)(?:[\s#]+sections?[\s#]+([\d.]+\d|\d))?")
    count = 0
    for folder in ("beacon_jax", "configs", "tests", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for page, section in cited.findall(path.read_text("utf-8")):
                if path == Path(__file__):
                    continue
                count += 1
                text = (ROOT / "docs" / page).read_text("utf-8")
                heading = rf"^#+ {re.escape(section)}\b" if section else "^# "
                assert re.search(heading, text, re.MULTILINE), (path, page, section)
    assert count > 40


def test_the_table_of_config_keys_is_that_of_the_code():
    page = (ROOT / "docs" / "config.md").read_text(
        "utf-8"
    )  # a key without meaning raises
    again = GENERATE.with_config_keys(page)
    assert again == page, "run: python docs/generate.py docs/config.md"
    assert page.count("\n| `") > 70


def test_a_key_without_a_comment_is_named():
    source = "def default_config():\n    config.a = 1  # one\n    config.b = 2\n"
    assert GENERATE.config_meanings(source) == {"a": "One"}


@pytest.mark.slow  # six processes: asks, trains, stops, goes on, evaluates
@pytest.mark.timeout(1200)
def test_a_new_users_first_commands_end_as_the_page_shows(tmp_path):
    script = load(ROOT / "docs" / "first_contact.py")
    text = script.transcript(tmp_path)  # raises where a command ends otherwise
    page = script.PAGE.read_text("utf-8")
    for step in script.STEPS:
        assert f"```sh\n{step.command}\n```" in page, "run it with --install --write"
        assert f"```sh\n{step.command}\n```" in text


def test_every_fact_of_the_architecture_is_where_the_page_says():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    places = re.findall(r"\| `(beacon_jax[\w.]*):(\w+)` \|", page)
    assert len(places) >= 10
    for module, name in places:
        assert hasattr(importlib.import_module(module), name), (module, name)
    files = set(re.findall(r"`(\w+/\w+\.py)`", page))
    assert len(files) >= 15
    for file in files:
        assert (ROOT / "beacon_jax" / file).is_file(), file
    for file, name in re.findall(r"`(\w+/\w+\.py)`,\s+`(\w+)`", page):
        module = importlib.import_module(f"beacon_jax.{file[:-3].replace('/', '.')}")
        assert hasattr(module, name), (file, name)
