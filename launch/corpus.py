"""Turns folders of manuals and books into a folder of long documents, plain text.

python launch/corpus.py DIR [NAME=]FOLDER ...

HTML, POD, reStructuredText, Markdown and text, each also as .gz. A document's file is
named by its source's name and path, never by a number: which documents are held out for
evaluation is decided by a hash of that name (beacon_jax.data.heldout), so a document
must keep its name whatever else is in the folder. Documents shorter than 8,000
characters, copies of another one, and translations are left out and counted.
"""

import gzip
import hashlib
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from beacon_jax.data.heldout import is_heldout

MIN_CHARACTERS = 8_000  # about 2,000 tokens: a row of training
HELDOUT = 0.1  # the default of config.data.heldout
# Folders of the kernel's and Perl's documents that are not English.
TRANSLATIONS = re.compile(r"(^|/)(translations/|perl(cn|jp|ko|tw)\.pod)")
BLOCKS = re.compile(r"p|div|br|li|[uod]l|dt|dd|h[1-6r]|pre|table|tr|blockquote")
SKIPPED = frozenset(["script", "style", "nav", "head"])


class Words(HTMLParser):
    """Collects the text of a page; blocks begin on a line of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0
        self.literal = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in SKIPPED
        self.literal += tag == "pre"
        if BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in SKIPPED))
        self.literal = max(0, self.literal - (tag == "pre"))
        if BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.literal else re.sub(r"\s+", " ", data))


def from_html(raw: str) -> str:
    page = Words()
    page.feed(raw)
    page.close()
    return re.sub(r"(?m)^ +(?=\S)", "", "".join(page.parts))


def from_pod(raw: str) -> str:
    """Keeps headings and paragraphs; C<code> and L<text|page> leave what they hold."""
    raw = re.sub(r"(?m)^=(over|back|cut|pod|encoding|for|begin|end)\b.*\n", "", raw)
    raw = re.sub(r"(?m)^=(head\d|item) *", "", raw)
    raw = re.sub(r"(?s)[BCFIL]<<+\s+(.*?)\s+>>+", r"\1", raw)  # C<< $a->[0] >>
    inner = re.compile(r"[BCFIL]<((?:[^<>|]|(?<=[-=])>)*)(?:\|[^<>]*)?>")
    for _ in range(3):  # nested
        raw = inner.sub(r"\1", raw)
    raw = re.sub(r"[SXZ]<[^<>]*>", "", raw)
    names = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}
    return re.sub(r"E<(\w+)>", lambda found: names.get(found[1], ""), raw)


def from_rst(raw: str) -> str:
    """Drops labels, fields and the roles of references: :ref:`text` becomes text."""
    raw = re.sub(r"(?m)^\.\. (_|SPDX|contents|toctree|include).*\n", "", raw)
    return re.sub(r":[\w:]+:`([^`<]*?)(?: ?<[^`]*>)?`", r"\1", raw)


READERS = {
    ".html": from_html,
    ".htm": from_html,
    ".xhtml": from_html,
    ".pod": from_pod,
    ".rst": from_rst,
    ".txt": str,
    ".md": str,
}


def text_of(path: Path) -> str:
    """Returns a document as text: no blanks at line ends, no runs of empty lines."""
    raw = (
        gzip.decompress(path.read_bytes())
        if path.suffix == ".gz"
        else path.read_bytes()
    )
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    text = READERS[kind](raw.decode("utf-8", errors="replace").replace("\r\n", "\n"))
    text = re.sub(r"[ \t\xa0]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def documents(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields (path in the folder without its ending, file), in order of the paths."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix().removesuffix(".gz")
        if path.is_file() and Path(name).suffix.lower() in READERS:
            yield name, path


def slug(source: str, path: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{source}-{path}") + ".txt"


def main(out: Path, sources: list[tuple[str, Path]]) -> None:
    part = out.with_name(out.name + ".part")  # a broken run leaves no half corpus
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    seen: set[bytes] = set()
    total: Counter[str] = Counter()
    for source, folder in sources:
        count: Counter[str] = Counter()
        for name, path in documents(folder):
            text = "" if TRANSLATIONS.search(name) else text_of(path)
            digest = hashlib.sha256(text.encode()).digest()
            if not text:
                count["translations"] += 1
            elif len(text) < MIN_CHARACTERS:
                count["short"] += 1
            elif digest in seen:
                count["copies"] += 1
            else:
                seen.add(digest)
                file = slug(source, name.removesuffix(Path(name).suffix))
                if (part / file).exists():  # README.rst beside README.txt
                    file = slug(source, name)
                (part / file).write_text(text, encoding="utf-8")
                count["documents"] += 1
                count["bytes"] += len(text.encode())
                count["held out"] += is_heldout(file, HELDOUT)
        print(line(source, count), flush=True)
        total += count
    if not total["documents"]:
        shutil.rmtree(part)
        raise SystemExit(
            f"error: no document of {MIN_CHARACTERS:,} characters among the files "
            f"({' '.join(READERS)}, also .gz); name folders of longer text"
        )
    part.rename(out)
    print(line("all", total))


def line(name: str, count: Counter[str]) -> str:
    left = ", ".join(f"{count[k]} {k}" for k in ("short", "copies", "translations"))
    return (
        f"{name:16} {count['documents']:5} documents {count['bytes'] / 1e6:7.1f} MB, "
        f"{count['held out']} held out; left out: {left}"
    )


def parse(arguments: list[str]) -> tuple[Path, list[tuple[str, Path]]]:
    """Returns DIR and the (name, folder) of the sources.

    Raises:
      SystemExit: DIR exists, or a FOLDER is none.
    """
    if len(arguments) < 2:
        raise SystemExit("usage: python launch/corpus.py DIR [NAME=]FOLDER ...")
    out = Path(arguments[0])
    if out.exists():
        raise SystemExit(f"error: DIR={out} exists; name a new folder")
    sources = []
    for text in arguments[1:]:
        name, equals, folder = text.rpartition("=")
        path = Path(folder if equals else text)
        if not path.is_dir():
            raise SystemExit(f"error: FOLDER={path} is not a folder; name one of text")
        sources.append((name or path.resolve().name, path))
    return out, sources


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
