"""Lets pages of the site link to files of the repository, as they do on GitHub.

A link that leaves docs/ goes to the file in the repository on GitHub, and a picture is
copied. A file that is not there is a warning, which `mkdocs build --strict` fails on.
CHANGELOG.md and CONTRIBUTING.md are pages, too.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger("mkdocs.hooks.repository")
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
# [text](../path) and ![alt](../path), from a page that lies directly in docs/.
OUTSIDE = re.compile(r"(?P<image>!?)\[(?P<text>[^]]*)\]\(\.\./(?P<path>[^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the root, and the pictures outside docs/ that pages show."""
    for name in ROOT_PAGES:
        source = str(ROOT / name)
        files.append(File.generated(config, name.lower(), abs_src_path=source))
    for page in files.documentation_pages():
        for found in OUTSIDE.finditer(page.content_string):
            path = found["path"]
            known = files.get_file_from_path(path)
            if found["image"] and not known and (ROOT / path).is_file():
                source = str(ROOT / path)
                files.append(File.generated(config, path, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links that leave docs/ to a picture's copy, or to GitHub."""

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(found["path"])
        if not (ROOT / path).exists():
            LOG.warning("%s links to %s, which is not there", page.file.src_uri, path)
        if found["image"]:
            return f"![{found['text']}]({path})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{found['text']}]({config.repo_url}/{kind}/main/{path})"

    return OUTSIDE.sub(link, markdown)
