"""The Colab notebook as it is committed; `make notebook` executes it."""

import ast
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "launch/colab_evaluate.ipynb").read_text("utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
BADGE = re.compile(
    r"\[!\[Open In Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg"
    r"\)\]\(https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/"
    r"launch/colab_evaluate\.ipynb\)"
)


def source(cell):
    return "".join(cell["source"])


def test_the_badge_the_clone_and_the_site_name_one_repository():
    """Its owner stands in pyproject.toml, mkdocs.yml and two cells of the notebook."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    owner = project["urls"]["Repository"].removeprefix("https://github.com/")
    first = BADGE.search(source(NOTEBOOK["cells"][0]))
    assert first and first[1] == owner
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert f"repo_url: {project['urls']['Repository']}\n" in site
    assert f'REPOSITORY = "{project["urls"]["Repository"]}"' in source(CODE[0])


def test_every_cell_is_python_with_a_title():
    for cell in CODE:
        ast.parse(source(cell))
        assert source(cell).startswith("# @title ")


def test_results_are_kept_and_nothing_else():
    kept = [cell for cell in CODE if cell["outputs"]]
    tagged = [c for c in CODE if "result" in c["metadata"].get("tags", ())]
    assert kept == tagged and len(kept) >= 3
    pictures = [
        output
        for cell in kept
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
    assert all(cell["execution_count"] is None for cell in CODE)
