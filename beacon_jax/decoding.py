"""Turns the bytes of a user's file into text, or says what they are instead.

Text is UTF-8, with or without a byte order mark. Bytes in another encoding, read as
UTF-8 with replacements, would be a text of question marks that a model remembers
without a word. So would the codes of what is written in ASCII alone and is no plain
text: RTF, or an encoding of 7 bits. HTML, LaTeX and source code are text.
"""

import codecs
import re
from collections.abc import Iterator
from typing import NamedTuple

from beacon_jax.names import meant

SHOWN = 65536  # bytes to guess from
COMMON = (
    "utf-16",
    "gb18030",
    "big5",
    "cp932",
    "euc_jp",
    "euc_kr",
    "cp1251",
    "cp1252",
)
# Longest first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    ("\ufeff".encode("gb18030"), "gb18030"),
    *((b"+/v" + last, "utf-7") for last in (b"8", b"9", b"+", b"/")),
)
# chardet names the largest of a family; the plainest that reads the same is shown.
_PLAIN = {
    "iso2022_jp_2": "iso2022_jp",
    "iso2022_jp_ext": "iso2022_jp",
    "euc_jis_2004": "euc_jp",
    "shift_jis_2004": "cp932",
    "big5hkscs": "big5",
    "cp949": "euc_kr",
}
_SURE = 0.9  # from here on chardet has seen structure; below it counts letters
# Of the best one's confidence, and at most four: of 118 texts of 20, 40 and up to 700
# characters in 20 languages and their old encodings the right one was always among
# them, and first in 113.
_NEAR = 0.6
# Encodings of DOS and old Macs, and of few users: a file is seldom in one of them, and
# they read the letters of a western text as likely ones of their own.
_RARE = (
    (re.compile(r"cp(437|7\d\d|8[56]\d)"), 0.8),
    (re.compile(r"mac|hp|kz|pt|koi8-t|cp(?!125|874|9)|iso8859-(3|4|6|1[0-46])"), 0.7),
)
_BEYOND = re.compile(r"[^\x00-\x7f]+")
# A letter of ASCII beside one of Greek, Cyrillic, Hebrew, Arabic and such.
_SCRIPTS = re.compile("[A-Za-z][\u0370-\u1dff]|[\u0370-\u1dff][A-Za-z]")
# Names of iconv (glibc 2.36) that are not those of Python; "": it does not know it.
_ICONV = {
    "mac-roman": "macintosh",
    "mac-latin2": "mac-centraleurope",
    "mac-iceland": "mac-is",
    "kz1048": "rk1048",
    "ptcp154": "pt154",
    "iso2022_jp_2": "iso-2022-jp-2",
    "iso2022_jp": "iso-2022-jp",
    "iso2022_kr": "iso-2022-kr",
    "euc_jis_2004": "euc-jisx0213",
    "shift_jis_2004": "shift_jisx0213",
    **dict.fromkeys(
        ("cp1006", "cp720", "hz", "mac-greek", "mac-turkish", "iso2022_jp_2004"), ""
    ),
}
_BEFORE = 256  # bytes in front of the first that is no ASCII
_MOST = 4

_SAVE = "save it as plain text (.txt) in UTF-8"
_UNPACK = "unpack it, and give the text in it"
_OTHER = "give a text file"
# Documents that may be ASCII from end to end: no prose begins so.
_DOCUMENTS = (
    (re.compile(rb"%PDF-\d"), "a PDF", "extract its text, as pdftotext does"),
    (re.compile(rb"\{\\rtf(\d|\\)"), "RTF", _SAVE),
    (re.compile(rb"%!PS"), "PostScript", "extract its text, as ps2ascii does"),
)
# By the media type that chardet finds. Prose, too, may begin with some of the letters.
_TYPES = (
    (r"wordprocessingml", "a Word document", _SAVE),
    (r"spreadsheetml", "an Excel sheet", _SAVE),
    (r"presentationml", "a PowerPoint presentation", _SAVE),
    (r"oasis\.opendocument", "an OpenDocument file", _SAVE),
    (r"epub", "an e-book (EPUB)", _SAVE),
    (r"/zip$", "a zip archive, or a document of an office program", _UNPACK),
    (r"gzip|bzip2|x-xz|zstd", "compressed ({})", _UNPACK),
    (r"7z|rar$|x-tar|java-archive|wheel", "an archive ({})", _UNPACK),
    (r"image/", "a picture ({})", _OTHER),
    (r"audio/|video/", "a recording ({})", _OTHER),
    (r"sqlite", "a database", _OTHER),
    (r"", "{}", _OTHER),
)
# What chardet does not know.
_MORE = (
    (
        re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
        "an old Office document (doc, xls, ppt)",
        _SAVE,
    ),
    (re.compile(rb"GGUF.\0\0\0", re.S), "a GGUF model", _OTHER),
    (
        re.compile(rb'.{5}\0\0\0\{"', re.S),
        "a safetensors file",
        f"{_OTHER}; a beacon pack is read by --load_memory of generate and --memory of "
        "compress",
    ),
)
# No text has these. 0x85 is the end of a line in EBCDIC.
_UNLIKELY = re.compile("[\0\x80-\x84\x86-\x9f]")
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x19\x1c-\x1f]")
_BEGINS = [re.compile(x) for x in (rb"\x1b[$(]", rb"~\{", rb"\+[A-Za-z0-9/]{3}")]
_SHIFT = re.compile(rb"([A-Za-z]?)\+([A-Za-z0-9/][A-Za-z0-9+/]*)-?([A-Za-z]?)")


class Guess(NamedTuple):
    """An encoding that bytes may be in.

    Attributes:
      sure: the bytes have its structure, not only likely letters.
      text: what the guess was made from, read so.
    """

    name: str
    sure: bool
    text: str


def decode(data: bytes, where: str, encoding: str | None = None) -> str:
    """Decodes a text; a byte order mark is no part of it.

    Args:
      where: what the bytes are of, as "--context=notes.txt".
      encoding: a name that Python knows; None: UTF-8.

    Raises:
      ValueError: no text, or one in another encoding; the message has the first bad
        byte and what the file seems to be.
    """
    if found := _document(data):
        raise ValueError(f"{where} is {found[0]}, no plain text: {found[1]}.")
    if encoding is not None:
        return _decode_as(data, where, encoding)
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise ValueError(f"{where} is {name.upper()}, not UTF-8: {_remedy(name)}")
    try:
        text, bad = data.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        text, bad = "", error.start
    nul = data.find(0)
    if bad is None and nul < 0:
        if name := seven_bits(data):
            raise ValueError(f"{where} is {name}, not UTF-8: {_remedy(name)}")
        return text
    if found := _binary(data):
        raise ValueError(f"{where} is {found[0]}, no text: {found[1]}.")
    fault = f"it has a NUL byte at {nul:,}"
    if nul < 0 and bad is not None:
        fault = f"byte {data[bad]:#04x} at {bad:,} is not UTF-8"
    raise ValueError(f"{where} is no text in UTF-8: {fault}. {_likely(data, bad, nul)}")


def disguised(data: bytes) -> str | None:
    """Names what is valid UTF-8 and no plain text, and the remedy; None: it is text.

    Args:
      data: the beginning of a file, up to an end of a line.
    """
    if found := _document(data):
        return f"{found[0]}, no plain text: {found[1]}"
    if name := seven_bits(data):
        return f"{name}, not UTF-8: write it anew in UTF-8"
    return None


def seven_bits(data: bytes) -> str | None:
    """Names the encoding of ASCII bytes that stand for other letters; None: for none.

    Those of ISO 2022 begin with an escape, which no text has in front of a $ (colours
    of a terminal have a bracket there). The others are letters and signs that a text
    may have, and one about encodings does: there most of the text must be in them.
    """
    if not data.isascii():
        return None
    begins = filter(None, (begin.search(data) for begin in _BEGINS))
    names = (_seven_bits(_part(data, found.start())) for found in begins)
    return next(filter(None, names), None)


def _seven_bits(data: bytes) -> str | None:
    found = next(_guesses(data), None)
    if found is None:
        return None
    coded = sum(not letter.isascii() for letter in found.text)
    most = coded > sum(letter.isalpha() for letter in found.text) / 2
    if found.name.startswith("iso2022") and coded:
        return found.name
    if found.name == "hz" and most:
        return found.name
    if found.name == "utf-7" and coded > 2:
        # "d+AOk-j+AOA- vu": inside of words, or words. Prose about them has signs.
        shifts = _SHIFT.findall(data)
        inside = sum(bool(before or behind) for before, _, behind in shifts)
        words = sum(len(code) > 5 for _, code, _ in shifts)  # more than one sign
        often = coded * 100 > len(found.text)
        if (most and words * 2 > len(shifts)) or (often and inside * 2 > len(shifts)):
            return found.name
    return None


def guesses(data: bytes) -> list[Guess]:
    """Returns the encodings that bytes may be in, the likeliest first; at most four.

    Those that give one text count as one, and those that are less likely are left out.
    """
    return [*_guesses(data)]


def _guesses(data: bytes) -> Iterator[Guess]:
    from chardet import detect_all

    found: dict[str, tuple[float, bool, str]] = {}  # by the text
    for guess in detect_all(
        data, ignore_threshold=True, compat_names=False, max_bytes=SHOWN
    ):
        name, confidence = guess["encoding"], guess["confidence"]
        if name is None or (name := codecs.lookup(name).name) in ("utf-8", "ascii"):
            continue
        text = _beginning(data, name)
        if text is None or _UNLIKELY.search(text) or _mixed(text):
            continue
        weights = (weight for names, weight in _RARE if names.match(name))
        made = confidence * next(weights, 1.0), confidence >= _SURE, name
        # Of those that give one text, the one that people know.
        rank = lambda x: (x[2] in COMMON, x[0])
        found[text] = max(found.get(text, made), made, key=rank)
    likely = sorted(found.items(), key=lambda item: -item[1][0])
    for text, (weight, sure, name) in likely[:_MOST]:
        if weight >= likely[0][1][0] * _NEAR:
            plain = _PLAIN.get(name, name)
            name = plain if _beginning(data, plain) == text else name
            yield Guess(name, sure, text)


def _mixed(text: str) -> bool:
    """Tells whether words have letters of Latin and of another script, as "caf\u0439".

    A text of a western language is so in an encoding of the Greek or Russian.
    """
    runs = len(_BEYOND.findall(text))
    return runs > 0 and len(_SCRIPTS.findall(text)) * 3 >= runs


def iconv_name(encoding: str) -> str:
    """Returns what iconv calls an encoding of Python; "": it does not know it."""
    return _ICONV.get(encoding, encoding.replace("_", "-"))


def _part(data: bytes, at: int) -> bytes:
    """Returns what to guess from: the line that has byte `at`, and those behind it.

    What is in front of `at` is ASCII, which may go on for pages.
    """
    begin = max(data.rfind(b"\n", 0, at) + 1, at - _BEFORE)
    return data[begin : begin + SHOWN]


def _beginning(data: bytes, encoding: str) -> str | None:
    """Reads bytes that may end within a character; None: they are not so encoded."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except (UnicodeError, LookupError):
        return None


def _reads(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeError:
        return False
    return True


def _document(data: bytes) -> tuple[str, str] | None:
    """Returns what a document is, and the remedy."""
    head = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip()
    return next(((kind, do) for x, kind, do in _DOCUMENTS if x.match(head)), None)


def format_of(data: bytes) -> str | None:
    """Names the format of a file that is no plain text, and the remedy, if known.

    Args:
      data: the beginning of a file.
    """
    found = _document(data) or _binary(data)
    return found and f"{found[0]}, no plain text: {found[1]}"


def wide(head: bytes) -> str:
    """Returns the encoding that the first bytes of a text prove; "": UTF-8, perhaps.

    A byte order mark does, and so do two letters of ASCII with their NUL bytes, those
    of UTF-16 and UTF-32.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if any(0 < byte < 32 and byte not in b"\t\n\r" for byte in head[:4]):
        return ""
    letters = "".join("a" if byte else "0" for byte in head[:4])
    return {
        "a0a0": "utf-16-le",
        "0a0a": "utf-16-be",
        "a000": "utf-32-le",
        "000a": "utf-32-be",
    }.get(letters, "")


def _binary(data: bytes) -> tuple[str, str] | None:
    """Returns what a file is that has bytes that no text has, and the remedy."""
    if not _CONTROL.search(data[:SHOWN]):
        return None  # a text that begins with the letters of a format
    for pattern, kind, remedy in _MORE:
        if pattern.match(data):
            return kind, remedy
    from chardet import detect

    only = {"include_encodings": ["utf-8"], "no_match_encoding": "utf-8"}
    media = detect(data[:SHOWN], **only)["mime_type"] or ""
    if media.startswith("text/") or media in ("", "application/octet-stream"):
        return None  # of no format
    for pattern, kind, remedy in _TYPES:
        if re.search(pattern, media):
            return kind.format(media), remedy
    return None


def _likely(data: bytes, bad: int | None, nul: int) -> str:
    """Says what bytes seem to be that are neither UTF-8 nor a format that is known."""
    parts = [data[:SHOWN]]
    if bad is not None and nul < 0:
        text = data.decode("utf-8", "replace")
        places = text.count("\ufffd")
        plain = len(text.encode("ascii", "ignore"))
        valid = len(text) - plain - places
        # By chance 1 letter of CJK in 7 is valid UTF-8, and hardly one among ASCII.
        if valid >= places * 4 or (valid >= places and plain > len(text) / 2):
            one = "1 place" if places == 1 else f"{places:,} places"
            return (
                f"It seems to be UTF-8 that is damaged in {one}: mend that, or leave "
                "the bad bytes out (iconv -c -f UTF-8 -t UTF-8)."
            )
        # A part that begins with the letters of a format has no guess.
        parts = [_part(data, bad), data[bad : bad + SHOWN]]
    found = next(filter(None, map(guesses, parts)), [])
    found = [guess for guess in found if _reads(data, guess.name)]
    if not found:
        if nul >= 0:
            return "It is binary, or in another encoding: give a text file in UTF-8."
        return f"It is in another encoding, or damaged: {_remedy('NAME')}"
    first = found[0].name
    if found[0].sure:
        return f"It seems to be {first}: {_remedy(first)}"
    at = _differ([x.text for x in found])
    shown = [f"{x.name} ({_excerpt(x.text, at)})" for x in found]
    names = " or ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown)
    which = "" if len(shown) == 1 else "with the name that reads right, as "
    return (
        f"It may be {names}: read it {which or 'with '}--encoding={first}, or write it "
        "anew in UTF-8."
    )


def _differ(texts: list[str]) -> int:
    """Returns where texts first differ; of one, where it is first not ASCII."""
    for at, letters in enumerate(zip(*texts, strict=False)):
        if len(set(letters)) > 1 or (len(texts) == 1 and not letters[0].isascii()):
            return at
    return 0


def _excerpt(text: str, at: int) -> str:
    return repr(" ".join(text[max(at - 8, 0) : at + 12].split()))


def _decode_as(data: bytes, where: str, encoding: str) -> str:
    text = ""
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    # A name that is no text, or an encoding that makes none, as hex.
    except (LookupError, UnicodeEncodeError):
        near = meant(encoding, ("utf-8", "utf-32", "latin-1", *COMMON))
        raise ValueError(
            f"--encoding={encoding} is unknown: {near}use a name that Python knows, as "
            f"{', '.join(COMMON)}."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not {encoding}: {error.reason} at byte {error.start:,}."
        ) from None
    except UnicodeError as error:
        raise ValueError(f"{where} is not {encoding}: {error}.") from None
    if (at := text.find("\0")) >= 0:
        raise ValueError(
            f"{where} has a NUL character at {at:,}, read as {encoding}: it is binary, "
            "or in another encoding."
        )
    return text


def _remedy(encoding: str) -> str:
    return f"read it with --encoding={encoding}, or write it anew in UTF-8."
