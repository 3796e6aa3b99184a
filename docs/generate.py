"""Fills the parts of README.md and docs/ that code produces.

python docs/generate.py [PAGE...]  # rewrites them
python docs/generate.py --check    # exit 1 if that would change one

In a page, a block ```text behind a block ```python is what it prints. The blocks of a
page run one after the other, like the cells of a notebook, in a folder of their own.
"""

import ast
import contextlib
import io
import os
import re
import sys
import tempfile
import tokenize
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


CONFIG = ROOT / "beacon_jax" / "training" / "config.py"
CONFIG_BEGIN, CONFIG_END = "<!-- keys:begin -->", "<!-- keys:end -->"


def with_config_keys(page: str) -> str:
    """The page with the table of every config key between its markers."""
    before, rest = page.split(CONFIG_BEGIN)
    after = rest.split(CONFIG_END)[1]
    return f"{before}{CONFIG_BEGIN}\n{config_tables()}\n{CONFIG_END}{after}"


def config_tables() -> str:
    """A table of keys with type, default and meaning, for each part of the config.

    Raises:
      ValueError: neither a key nor its part has a comment in `default_config`.
    """
    from beacon_jax.training.config import default_config

    meanings = config_meanings(CONFIG.read_text("utf-8"))
    leaves = list(_leaves(default_config(), ""))
    part_of = lambda key: key.rpartition(".")[0]
    bare = [k for k, _ in leaves if k not in meanings and part_of(k) not in meanings]
    if bare:
        raise ValueError(f"{CONFIG.name}: no comment says what {bare} mean.")
    tables: dict[str, list[str]] = {}
    for key, value in leaves:
        part = part_of(key)
        kind = type(value).__name__
        shown = "empty" if kind == "ConfigDict" else f"`{value!r}`"
        meaning = (meanings.get(key) or meanings[part]).replace("|", "\\|")
        row = (
            f"| `{key}` | {kind.replace('ConfigDict', 'keys')} | {shown} | {meaning} |"
        )
        tables.setdefault(part, []).append(row)
    head = "| key | type | default | meaning |\n|---|---|---|---|\n"
    return "\n\n".join(
        f"## {f'config.{part}' if part else 'config'}\n\n{head}" + "\n".join(rows)
        for part, rows in tables.items()
    )


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys and defaults in the order of their definition; empty parts are leaves."""
    for key in config:
        value = config[key]
        if type(value).__name__.endswith("ConfigDict") and len(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_meanings(source: str) -> dict[str, str]:
    """What the comments of `default_config` say of each key.

    A comment stands behind its key or above it. One above several keys that have none
    of their own is that of all of them.
    """
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.string[1:].strip(), token.line.strip())
    alone = {n for n, (_, line) in comments.items() if line.startswith("#")}
    found: dict[str, str] = {}
    shared, last = "", 0  # a comment above keys, and the last line that it covers
    for key, line, end in _assignments(source):
        above, n = [], line - 1
        while n in alone:
            above.insert(0, comments[n][0])
            n -= 1
        behind = comments[line][0] if line in comments and line not in alone else ""
        text = behind or " ".join(above)
        if above:
            shared = " ".join(above) if not behind else ""
        elif not text and line == last + 1:
            text = shared
        elif text:
            shared = ""
        last = end
        if text:
            found[key] = text[0].upper() + text[1:]
    return found


def _assignments(source: str) -> Iterator[tuple[str, int, int]]:
    """(key, first line, last line) of every key that `default_config` sets."""
    functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
    body = next(f for f in functions if f.name == "default_config").body
    for node in body:
        if not isinstance(node, ast.Assign):
            continue
        target = ast.unparse(node.targets[0])
        if not target.startswith("config."):
            continue
        key = target.removeprefix("config.")
        yield key, node.lineno, node.lineno
        given = node.value.args if isinstance(node.value, ast.Call) else []
        if given and isinstance(items := given[0], ast.Dict):
            for name, value in zip(items.keys, items.values, strict=True):
                assert isinstance(name, ast.Constant)
                yield f"{key}.{name.value}", name.lineno, value.end_lineno or 0


def generated() -> dict[str, Callable[[str], str]]:
    """For each file, what makes its new text from its old one."""
    return {"docs/config.md": with_config_keys} | dict.fromkeys(PAGES, with_outputs)


def main() -> None:
    check = "--check" in sys.argv[1:]
    makers = generated()
    names = [name for name in sys.argv[1:] if name != "--check"] or list(makers)
    if unknown := [name for name in names if name not in makers]:
        sys.exit(f"error: {unknown}: the pages are {', '.join(makers)}.")
    stale = []
    for name in names:
        old = (ROOT / name).read_text("utf-8")
        new = makers[name](old)
        if new != old:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(new, "utf-8")
    print("\n".join(f"changed: {name}" for name in stale) or "nothing changed")
    sys.exit(bool(stale and check))


if __name__ == "__main__":
    main()
