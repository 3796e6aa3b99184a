"""Fills the parts of README.md and docs/ that code produces.

python docs/generate.py            # rewrites them
python docs/generate.py --check    # exit 1 if that would change a file

In a page, a block ```text behind a block ```python is what it prints. The blocks of a
page run one after the other, like the cells of a notebook, in a folder of their own.
"""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Python, and the output that stands behind it, if any.
SNIPPET = re.compile(
    r"```python\n(.*?)```\n(?:([^`]*?)```text\n(.*?)```\n)?", re.DOTALL
)
PAGES = ("README.md", "docs/memories.md", "docs/asking.md")


def with_outputs(page: str) -> str:
    """The page with what its Python snippets print now."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def run(found: re.Match[str]) -> str:
        code, between, _ = found.groups()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "snippet", "exec"), names)
        if between is None:
            return found[0]
        return f"```python\n{code}```\n{between}```text\n{printed.getvalue()}```\n"

    with _scratch():
        return SNIPPET.sub(run, page)


@contextlib.contextmanager
def _scratch() -> Iterator[None]:
    """A folder to work in that has the assets, as the root of the repository does."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "assets").symlink_to(ROOT / "assets")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def generated() -> dict[str, Callable[[str], str]]:
    """For each file, what makes its new text from its old one."""
    return dict.fromkeys(PAGES, with_outputs)


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"error: unknown arguments {sys.argv[1:]}: use --check or nothing.")
    stale = []
    for name, make in generated().items():
        old = (ROOT / name).read_text("utf-8")
        new = make(old)
        if new == old:
            continue
        stale.append(name)
        if not sys.argv[1:]:
            (ROOT / name).write_text(new, "utf-8")
    print("\n".join(f"changed: {name}" for name in stale) or "nothing changed")
    sys.exit(bool(stale and sys.argv[1:]))


if __name__ == "__main__":
    main()
