"""Cuts bytes in constant memory: into lines, JSON values and blocks of text.

Everything works on chunks, keeps at most one row, and no more than `limit` bytes of it.
A longer row is skipped, and a `Bad` in its place says so.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from beacon_jax.data.packed import CHUNK, Bad

_AROUND = b" \t\r\n\x0b\x0c,"  # what an element of an array, or a value, lies between


def longer(what: str, limit: int) -> Bad:
    """Returns the mark for a row beyond the limit of `open_parts`."""
    for unit, name in ((2**20, "MiB"), (2**10, "KiB"), (1, "bytes")):
        if limit % unit == 0:
            return Bad(f"{what} longer than {limit // unit} {name}")
    raise AssertionError(limit)


def lines(source: Iterator[bytes | Bad], limit: int) -> Iterator[bytes | Bad]:
    """Yields lines without their end; blank ones too, so that they can be counted."""
    held: list[bytes] = []
    size = 0
    for chunk in source:
        if isinstance(chunk, Bad):
            yield chunk
            return
        *complete, rest = chunk.split(b"\n")
        if complete:
            size += len(complete[0])
            if size <= limit:
                complete[0] = b"".join((*held, complete[0]))
            yield complete[0] if size <= limit else longer("line", limit)
            for line in complete[1:]:
                yield line if len(line) <= limit else longer("line", limit)
            held, size = [], 0
        size += len(rest)
        if size <= limit:
            held.append(rest)
        else:
            held = []
    if size:
        yield b"".join(held) if size <= limit else longer("line", limit)


def json_kind(head: bytes) -> str:
    """Tells what a JSON file is by its first bytes: "lines", "array" or "values".

    It is one array if it begins with "[", unless the first line is a whole array and
    another one begins behind it. It is objects over several lines ("values") if the
    first line leaves an object open and the second goes on with it.
    """
    line, _, rest = (part.strip() for part in head.lstrip().partition(b"\n"))
    if line.startswith(b"["):
        return "lines" if rest.startswith(b"[") and _is_json(line) else "array"
    goes_on = rest.startswith((b'"', b"}")) or line.endswith((b"[", b":"))
    opened = line.startswith(b"{") and line.endswith((b"{", b"[", b",", b":"))
    return "values" if opened and goes_on and rest else "lines"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def elements(
    source: Iterator[bytes | Bad], limit: int, *, array: bool = True
) -> Iterator[bytes | Bad]:
    """Yields the elements of a JSON array, or the values of a file, not parsed.

    Their ends are found by quotes and brackets alone, so an element that is not JSON or
    not UTF-8 costs only itself, and one beyond the limit is never held. With json.loads
    this makes 180 MB/s of CPU time on rows of 50 KB. ijson 3.6 (yajl2_c) makes 660, but
    ends at the first error and holds any row; json.load holds everything.
    """
    scanner = _Elements(limit, array)
    for chunk in source:
        if isinstance(chunk, Bad):
            yield chunk
            return
        for element in scanner.feed(chunk):
            yield element
            if isinstance(element, Bad) and element.whole:
                return
    yield from scanner.end()


class _Elements:
    """The state of `elements` between chunks."""

    _TOP = re.compile(rb'["{}\[\],]')  # at depth 1 a comma ends an element
    _INNER = re.compile(rb'["{}\[\]]')
    # Possessive, so that nothing is kept to go back to: 230 MB/s where a loop over
    # quotes makes 90 (a quote every 60 bytes).
    _BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)

    def __init__(self, limit: int, array: bool):
        self.limit = limit
        self.closed = False
        self._array = array
        self._depth = 0
        self._string = False
        self._escaped = False  # the last chunk ended within a string, after "\\"
        self._held: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes | Bad]:
        """Yields the elements that end in this chunk."""
        if self.closed:
            if data.strip():
                yield Bad("data after the array", whole=True)
            return
        at = begin = 0
        if self._array and not self._depth:  # blanks so far: `json_kind` looked
            at = begin = data.find(b"[") + 1
            self._depth = int(begin > 0)
            if not begin:
                return
        while at < len(data):
            if self._string:
                at = self._end_of_string(data, at)
                continue
            top = self._array and self._depth == 1
            pattern = self._TOP if top else self._INNER
            if (match := pattern.search(data, at)) is None:
                break
            at = match.end()
            mark = data[at - 1]
            if mark == 0x22:  # "
                self._string, self._escaped = True, False
            elif mark == 0x2C or (mark == 0x5D and top):  # , ]
                yield from self._element(data[begin : at - 1])
                begin = at
                if mark == 0x5D:
                    self.closed = True
                    yield from self.feed(data[at:])
                    return
            elif mark in (0x7B, 0x5B):  # { [
                self._depth += 1
            elif self._depth > 1:  # } ]
                self._depth -= 1
            elif self._depth and not self._array:
                self._depth = 0
                yield from self._element(data[begin:at])
                begin = at
        self._hold(data[begin:])

    def end(self) -> Iterator[bytes | Bad]:
        """Yields what is wrong at the end of the file."""
        if self._array and not self.closed:
            yield Bad("array not closed", whole=True)
        if not self._array and b"".join(self._held).strip(_AROUND):
            yield Bad("object not closed", whole=True)

    def _end_of_string(self, data: bytes, at: int) -> int:
        """Returns the index after the quote that ends the string.

        If the string goes on behind the chunk, it is the end of the chunk.
        """
        match = self._BODY.match(data, at + self._escaped)
        end = match.end() if match else len(data)
        self._escaped = data[end:] == b"\\"
        self._string = end == len(data) or self._escaped
        return len(data) if self._string else end + 1

    def _hold(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= self.limit:
            self._held.append(data)
        else:
            self._held = []

    def _element(self, data: bytes) -> Iterator[bytes | Bad]:
        self._hold(data)
        if self._size > self.limit:
            yield longer("row", self.limit)
        elif element := b"".join(self._held).strip(_AROUND):
            yield element
        self._held, self._size = [], 0


def newlines(path: str, every: int) -> Iterator[tuple[int, int, int]]:
    """Cuts a file at line ends into pieces of about `every` bytes. Reads it once.

    Yields:
      (start, stop, number of the first line, from 1).
    """
    start, line, seen, at = 0, 1, 0, 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            begin = 0
            while at + len(chunk) - start >= every:
                end = chunk.find(b"\n", max(begin, start + every - 1 - at))
                if end < 0:
                    break
                seen += chunk.count(b"\n", begin, end + 1)
                begin = end + 1
                yield start, at + begin, line
                start, line = at + begin, line + seen
                seen = 0
            seen += chunk.count(b"\n", begin)
            at += len(chunk)
    if at > start:
        yield start, at, line


def first_after(file: Any, at: int, reach: int) -> int:
    """Returns where a text may be cut at or after byte `at`.

    That is after a line end within `reach` bytes, else before a character.
    """
    if at <= 0:
        return 0
    file.seek(at - 1)
    data = file.read(reach + 1)
    if (end := data.find(b"\n")) >= 0:
        return at + end
    for skip in range(1, 5):
        # Not within a character; or at the end of the file, after its last one.
        if skip == len(data) or data[skip] & 0xC0 != 0x80:
            return at - 1 + skip
    return at


def text_blocks(source: Iterator[bytes | Bad], size: int) -> Iterator[bytes | Bad]:
    """Yields the blocks of a text that can only be read from its start.

    They are those of `first_after`: block i reaches from there at i * size to the next.
    """
    held, base, number = b"", 0, 1
    for chunk in source:
        if isinstance(chunk, Bad):
            yield held
            yield chunk
            return
        held += chunk
        while base + len(held) > (number + 1) * size + 8:
            end = first_after(io.BytesIO(held), number * size - base, size)
            yield held[:end]
            held, base, number = held[end:], base + end, number + 1
    while base + len(held) > number * size:
        end = first_after(io.BytesIO(held), number * size - base, size)
        yield held[:end]
        held, base, number = held[end:], base + end, number + 1
    if held:
        yield held
