"""The header of a GGUF file: metadata, and where each tensor is.

The `gguf` library keeps views of each string and needs 12 s for the 300,000 of Qwen2's
tokenizer, this 0.2 s (one of two busy cores). The library dequantises well:
`beacon_jax.hf.gguf` calls it for that.
"""

import dataclasses
import math
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beacon_jax.paths import check_fetched

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_AGAIN = "Download it again."
_STRING, _ARRAY = 8, 9
# Number of a metadata type -> how `struct` spells it.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
      shape: as numpy has it, the axis whose elements are next to each other last.
      type: number of its ggml type.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


def is_gguf(path: Path) -> bool:
    """Tells whether a path is a file that is, or is named like, a GGUF file."""
    if not os.path.isfile(path):  # takes names that no file can have
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class Header:
    """The header of a GGUF file. Nothing of the tensors' bytes is read.

    Args:
      path: the file.
      strings: whether to keep arrays of strings (the tokenizer's, 25 MB for Qwen2).

    Attributes:
      values: metadata by key: a number, a string, or a tuple or list of them.
      counts: number of elements of each array, also of those that are not kept.
      tensors: what `Stored` says of each, by name, in the order of the file.

    Raises:
      ValueError: the file is no GGUF file, truncated, a part of one, or of a version
        that is not read; the message names it and the remedy.
    """

    def __init__(self, path: Path, *, strings: bool = False):
        self.path, self.size = path, path.stat().st_size
        self.values: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.tensors: dict[str, Stored] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        check_fetched(path)
        with path.open("rb") as file:
            self._check_start(file.read(24))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                try:
                    self._parse(_Cursor(data), strings)
                except (struct.error, UnicodeDecodeError, _BadError) as error:
                    raise ValueError(
                        f"{path} is truncated or damaged: its header cannot be read "
                        f"({error}). {_AGAIN}"
                    ) from error
        count = self.values.get("split.count", 0)
        if count > 1 or re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name):
            raise ValueError(
                f"{path} is one part of a model that was split into several files, "
                "which are not read: make one of them (llama-gguf-split --merge "
                "FIRST_PART WHOLE.gguf)."
            )

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns a number or a string of the metadata.

        Args:
          kind: int, float, str or bool.
          default: in place of one that is not there; None: it has to be.

        Raises:
          ValueError: it is not there, or of another kind.
        """
        if key not in self.values:
            if default is None:
                raise ValueError(
                    f"{self.path}: {key} is missing from the metadata, without which "
                    "the model is not known: use a file that has it."
                )
            return default
        value = self.values[key]
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
            shown = f"an array of {self.counts[key]}" if key in self.counts else value
            raise ValueError(
                f"{self.path}: {key} is {shown!r}, and only one {kind.__name__} is "
                "supported: use another file of the model."
            )
        return value

    def raw(self, prefix: str) -> Iterator[bytes]:
        """Yields the bytes of the metadata whose keys begin with `prefix`, by key."""
        with self.path.open("rb") as file:
            for key in sorted(k for k in self._spans if k.startswith(prefix)):
                start, stop = self._spans[key]
                file.seek(start)
                yield key.encode() + b"\0" + file.read(stop - start)

    def _check_start(self, start: bytes) -> None:
        if start[:4] != MAGIC:
            raise ValueError(
                f"{self.path} is not a GGUF file: it begins with {start[:4]!r}, not "
                f"{MAGIC!r}. {_AGAIN}"
            )
        if len(start) < 24:
            raise ValueError(
                f"{self.path} is truncated: it has {self.size} bytes. {_AGAIN}"
            )
        version = int.from_bytes(start[4:8], "little")
        if version & 0xFFFF == 0:
            raise ValueError(
                f"{self.path} is big-endian, and only little-endian files are read: "
                "convert it (gguf-convert-endian FILE little)."
            )
        if version not in VERSIONS:
            raise ValueError(
                f"{self.path} has GGUF version {version}, this program reads "
                f"{' and '.join(map(str, VERSIONS))}: use a file of such a version."
            )

    def _parse(self, cursor: "_Cursor", strings: bool) -> None:
        cursor.at = 8
        tensors, pairs = cursor.numbers("QQ")
        for _ in range(pairs):
            key, start = cursor.string(), cursor.at
            (kind,) = cursor.numbers("I")
            if kind == _ARRAY:
                kind, count = cursor.numbers("IQ")
                self.counts[key] = count
                if kind != _STRING:
                    self.values[key] = cursor.numbers(f"{count}{_spelt(kind)}")
                elif strings:
                    self.values[key] = [cursor.string() for _ in range(count)]
                else:
                    cursor.skip_strings(count)
            elif kind == _STRING:
                self.values[key] = cursor.string()
            else:
                (self.values[key],) = cursor.numbers(_spelt(kind))
            self._spans[key] = start, cursor.at
        for _ in range(tensors):
            name = cursor.string()
            (axes,) = cursor.numbers("I")
            if name in self.tensors or axes > 8:
                raise _BadError(f"tensor {name!r} is there twice, or has {axes} axes")
            shape = cursor.numbers("Q" * axes)[::-1]
            kind, offset = cursor.numbers("IQ")
            self.tensors[name] = Stored(shape, kind, offset)
        alignment = self.get("general.alignment", int, 32)
        if alignment < 1:
            raise _BadError(f"general.alignment is {alignment}")
        start = math.ceil(cursor.at / alignment) * alignment
        for name, tensor in self.tensors.items():
            self.tensors[name] = dataclasses.replace(
                tensor, offset=start + tensor.offset
            )


class _BadError(Exception):
    """What is wrong with a header."""


def _spelt(kind: int) -> str:
    if kind not in _SCALARS:
        raise _BadError(f"there is no metadata type {kind}")
    return _SCALARS[kind]


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.size, self.at = data, len(data), 0

    def numbers(self, spelling: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{spelling}", self.data, self.at)
        self.at += struct.calcsize(f"<{spelling}")
        return found

    def string(self) -> str:
        length = int.from_bytes(self.data[self.at : self.at + 8], "little")
        self.at += 8
        self._check(length)
        found = self.data[self.at : self.at + length].decode()
        self.at += length
        return found

    def skip_strings(self, count: int) -> None:
        data, at, size = self.data, self.at, self.size
        for _ in range(count):
            at += 8 + int.from_bytes(data[at : at + 8], "little")
            if at > size:
                break
        self.at = at
        self._check(0)

    def _check(self, length: int) -> None:
        if self.at + length > self.size:
            raise _BadError(
                f"it needs {self.at + length} bytes, the file has {self.size}"
            )
