"""Opens files as they are found: compressed or not, in UTF-8, UTF-16 or UTF-32.

What a file is follows from its first bytes, not from its name. All readers see plain
UTF-8 without a byte order mark.
"""

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow

from beacon_jax.decoding import SHOWN, disguised, format_of, guesses, iconv_name, wide

CHUNK = 2**20
BOM = codecs.BOM_UTF8
HEAD = CHUNK  # bytes that show what a file is: a first line and what follows it
LOOKED_AT = 2**18  # bytes of a file to guess its encoding from
ENOUGH = 6  # bytes beyond ASCII: a single é may be any of a dozen letters
# First bytes of files that are compressed.
PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
}


class Bad(NamedTuple):
    """Mark in place of a row that cannot be used.

    Attributes:
      whole: whether the mark is about the file, and stands for no row.
    """

    reason: str
    whole: bool = False


class Found(NamedTuple):
    """What a file turned out to be.

    Attributes:
      packed: what it is compressed by, a name of PACKED; "": it is not.
      encoding: UTF-16 or UTF-32, in one of its kinds; "": UTF-8, as far as is known.
      head: first bytes of the text, in UTF-8.
    """

    packed: str
    encoding: str
    head: bytes

    @property
    def plain(self) -> bool:
        """Whether bytes of the file are bytes of the text, so that it can be cut."""
        return not self.packed and not self.encoding


def look(path: str) -> Found:
    """Finds out how a file is packed and encoded; what is damaged is found later."""
    with open(path, "rb") as file:
        start = file.read(16)
    packed = _packing(start)
    raw = b""
    for chunk in _unpacked(path, packed, 0, None):
        raw += b"" if isinstance(chunk, Bad) else chunk
        if len(raw) >= HEAD:
            break
    encoding = wide(raw)
    if encoding:
        raw = codecs.getincrementaldecoder(encoding)("replace").decode(raw).encode()
    return Found(packed, encoding, raw.removeprefix(BOM))


def refusal(found: Found, *, prose: bool = False) -> str:
    """Says what a file is if it is known to be no plain text, and the remedy; else "".

    Args:
      prose: whether it is no JSON or CSV: letters may then be codes of others.
    """
    head = found.head[:SHOWN]
    return (disguised(head) if prose else None) or format_of(head) or ""


def chunks(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes | Bad]:
    """Yields the text of a file in UTF-8, from byte `start` to `stop` of a plain one.

    A byte order mark is left out. A compressed file that is damaged or cut off ends
    with a Bad, after what could be read of it; so does UTF-16 that is none.
    """
    if start:
        yield from _unpacked(path, "", start, stop)
        return
    with open(path, "rb") as file:
        packed = _packing(file.read(16))
    source = _unpacked(path, packed, 0, stop)
    first = list(itertools.islice(source, 1))
    encoding = wide(first[0]) if first and isinstance(first[0], bytes) else ""
    whole = itertools.chain(first, source)
    if encoding:
        whole = _recoded(whole, encoding)
    for number, chunk in enumerate(whole):
        if isinstance(chunk, bytes) and not number:
            chunk = chunk.removeprefix(BOM)
        yield chunk


def _packing(start: bytes) -> str:
    for mark, name in PACKED.items():
        # Prose may begin with "BZh"; the first block of bzip2 begins with digits of pi.
        if start.startswith(mark) and (name != "bzip2" or start[4:7] in _BZIP2):
            return name
    return ""


_BZIP2 = (b"1AY", b"\x17\x72\x45")  # of a block, and of the end of an empty file


def _recoded(source: Iterator[bytes | Bad], encoding: str) -> Iterator[bytes | Bad]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for chunk in source:
            if isinstance(chunk, Bad):
                yield chunk
                return
            yield decoder.decode(chunk).removeprefix("\ufeff").encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError:
        yield Bad(f"damaged {encoding}", whole=True)


def _unpacked(
    path: str, packed: str, start: int, stop: int | None
) -> Iterator[bytes | Bad]:
    if packed == "zstd":
        yield from _zstd(path)
    elif packed:
        yield from _by_python(path, packed)
    else:
        with open(path, "rb", buffering=0) as file:
            at = file.seek(start)
            while chunk := file.read(CHUNK if stop is None else min(CHUNK, stop - at)):
                at += len(chunk)
                yield chunk


# Not read(), which loses what came before the damage.
_OPEN: dict[str, Callable[[str], Any]] = {
    "gzip": gzip.open,
    "bzip2": bz2.open,
    "xz": lzma.open,
}


def _by_python(path: str, packed: str) -> Iterator[bytes | Bad]:
    with _OPEN[packed](path) as file:
        try:
            while chunk := file.read1(CHUNK):
                yield chunk
        except EOFError:
            yield Bad(f"truncated {packed}", whole=True)
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError):
            yield Bad(f"damaged {packed}", whole=True)
        except OSError as error:  # bz2 raises it bare
            if error.errno is not None:
                raise
            yield Bad(f"damaged {packed}", whole=True)


def _zstd(path: str) -> Iterator[bytes | Bad]:
    with pyarrow.OSFile(path) as raw:
        file = pyarrow.CompressedInputStream(raw, "zstd")
        try:
            # Small reads: the one that meets the damage returns nothing.
            while chunk := file.read(2**16):
                yield chunk
        except OSError as error:
            if error.errno is not None:
                raise
            # Its limit keeps memory constant where `zstd --long=31` would take 2 GiB.
            reasons = {
                "Truncated": "truncated zstd",
                "too much memory": "zstd window over 128 MiB",
            }
            known = (why for said, why in reasons.items() if said in str(error))
            yield Bad(next(known, "damaged zstd"), whole=True)
        finally:
            with contextlib.suppress(OSError):
                file.close()


def _is_utf8(head: bytes) -> bool:
    """Tells whether bytes, cut anywhere, are UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


class TextOf(io.RawIOBase):
    """The text of a file in UTF-8, as `io.BufferedReader` takes it.

    Attributes:
      bad: what reading it ended with, if that was early.
    """

    def __init__(self, path: str):
        self.bad: Bad | None = None
        self._source, self._held = chunks(path), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._held:
            chunk = next(self._source, None)
            if isinstance(chunk, Bad):
                self.bad = chunk
            if chunk is None or isinstance(chunk, Bad):
                return 0
            self._held = chunk
        size = min(len(buffer), len(self._held))
        buffer[:size], self._held = self._held[:size], self._held[size:]
        return size


@functools.lru_cache(maxsize=64)
def other_encoding(path: str) -> str:
    """Returns what to say of a file with bytes that are no UTF-8; "": they are damage.

    They are damage if most lines beyond ASCII are UTF-8.
    """
    source = (chunk for chunk in chunks(path) if isinstance(chunk, bytes))
    head = next(source, b"")[:LOOKED_AT]
    lines = [line for line in head.splitlines(keepends=True) if not line.isascii()]
    foreign = [line for line in lines if not _is_utf8(line)]
    if 2 * len(foreign) <= len(lines):
        return ""
    beyond = sum(byte > 127 for line in foreign for byte in line)
    found = guesses(b"".join(foreign)[:SHOWN]) if beyond >= ENOUGH else []
    if not found:
        return ": write the file anew in UTF-8"
    names = [guess.name for guess in found[: 1 if found[0].sure else None]]
    which = "" if len(names) == 1 else " from the one that reads right"
    iconv = next(filter(None, map(iconv_name, names)), "")
    how = iconv and f" (iconv -f {iconv} -t utf-8)"
    return f": the file may be {' or '.join(names)}, write it anew in UTF-8{which}{how}"
