"""Turns the bytes of a user's file into text, or says what they are instead.

Text is UTF-8, with or without a byte order mark. Bytes in another encoding, read as
UTF-8 with replacements, would be a text of question marks that a model remembers
without a word.
"""

import codecs
import re
import unicodedata

from beacon_jax.names import meant

# Encodings to guess from: the first whose text is most plausible.
GUESSES = (
    "gb18030",
    "big5",
    "shift_jis",
    "euc_jp",
    "euc_kr",
    "cp1251",
    "cp1252",
)
# The most frequent characters of Chinese, simplified and traditional.
_FREQUENT = {
    "gb18030": set(
        "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生"
        "会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手用主行"
    ),
    "big5": set(
        "的一是不了在人有我他這中大來上國個到說們為子和你地出道也時年得就那要下以生"
        "會自著去之過家學對可她裡後小麼心多天而能好都然沒日於起還發成事只作當想看文無開手用主行"
    ),
}
# First bytes of files that are no text.
KINDS = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive, or a document of an office program",
    b"\x1f\x8b": "compressed by gzip",
    b"\xfd7zXZ": "compressed by xz",
    b"BZh": "compressed by bzip2",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x7fELF": "a program",
    b"GGUF": "a GGUF model",
    b"SQLite format 3": "a database",
}
# Longest first: that of UTF-32 begins as that of UTF-16 does.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode(data: bytes, where: str, encoding: str | None = None) -> str:
    """Decodes a text; a byte order mark is no part of it.

    Args:
      where: what the bytes are of, as "--context=notes.txt".
      encoding: a name that Python knows; None: UTF-8.

    Raises:
      ValueError: no text, or one in another encoding; the message has the first bad
        byte and what the file seems to be.
    """
    if encoding is not None:
        return _decode_as(data, where, encoding)
    if kind := kind_of(data):
        raise ValueError(f"{where} is {kind}, no text: give the text in it.")
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise ValueError(f"{where} is {name.upper()}, not UTF-8: {_remedy(name)}")
    if (at := data.find(0)) >= 0:
        if name := _wide(data):
            raise ValueError(f"{where} seems to be {name}, not UTF-8: {_remedy(name)}")
        raise ValueError(
            f"{where} has a NUL byte at {at:,}: it is binary, no text. Give a text "
            "file."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = guess(data)
        seems = f"seems to be {name}" if name else "is in another encoding, or damaged"
        raise ValueError(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}. "
            f"It {seems}: {_remedy(name or 'NAME')}"
        ) from None


def kind_of(data: bytes) -> str | None:
    """Names what a file is by its first bytes; None: nothing that is known, or text."""
    found = (kind for start, kind in KINDS.items() if data.startswith(start))
    return next(found, None)


def guess(data: bytes, size: int = 65536) -> str | None:
    """Guesses the encoding of bytes that are no UTF-8; None: none is plausible."""
    best, score = None, 0.5
    for name in GUESSES:
        text = None
        for cut in range(4):  # the last character may be cut off
            try:
                text = data[: min(size, len(data)) - cut].decode(name)
                break
            except UnicodeDecodeError:
                continue
        if text and (plausible := _plausible(text, name)) > score:
            best, score = name, plausible
    return best


def _plausible(text: str, encoding: str) -> float:
    """Returns the share of characters beyond ASCII that are usual in such texts."""
    others = [c for c in text if ord(c) > 127]
    if not others:
        return 0.0
    if encoding == "cp1252":  # letters with accents among many without
        good = [c for c in others if unicodedata.category(c)[0] in "LPS"]
        return 0.6 * len(good) / len(others) if len(others) < len(text) / 4 else 0.0
    if encoding == "cp1251":
        good = [c for c in others if "\u0410" <= c <= "\u044f"]
        words = re.findall("[\u0410-\u044f]{3,}", text)  # not single accents
        inside = sum(map(len, words)) / len(others)
        return 0.9 * len(good) / len(others) * min(1.0, 1.5 * inside)
    usual = {
        "gb18030": (("\u4e00", "\u9fa5"), ("\u3000", "\u3011"), ("\uff01", "\uff5e")),
        "big5": (("\u4e00", "\u9fa5"), ("\u3000", "\u3011"), ("\uff01", "\uff5e")),
        "euc_kr": (("\uac00", "\ud7a3"),),
    }.get(encoding, (("\u3040", "\u30ff"), ("\u4e00", "\u9fa5"), ("\u3000", "\u3002")))
    # Not an accent and the letter behind it, taken for one character.
    runs = "".join(re.findall("[^\x00-\x7f]{2,}", text))
    good = [c for c in runs if any(a <= c <= b for a, b in usual)]
    share = len(good) / len(others)
    if encoding in ("shift_jis", "euc_jp"):  # Japanese has kana, Chinese none
        kana = sum("\u3040" <= c <= "\u30ff" for c in others) / len(others)
        return share * min(1.0, 0.4 + 2 * kana)
    if encoding in _FREQUENT:  # other bytes make rare ones
        frequent = sum(c in _FREQUENT[encoding] for c in others) / len(others)
        return share * (1.0 if frequent > 0.1 else 0.6)
    return share


def _decode_as(data: bytes, where: str, encoding: str) -> str:
    try:
        codecs.lookup(encoding)
    except LookupError:
        near = meant(encoding, ("utf-8", "utf-16", "utf-32", "latin-1", *GUESSES))
        raise ValueError(
            f"--encoding={encoding} is unknown: {near}use a name that Python knows, as "
            f"utf-16 or {', '.join(GUESSES)}."
        ) from None
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not {encoding}: {error.reason} at byte {error.start:,}."
        ) from None


def _wide(data: bytes) -> str | None:
    """Guesses UTF-16 without a mark: in Latin text every other byte is 0."""
    head = data[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    most = len(head) // 2
    if max(even, odd) < 0.4 * most or min(even, odd) > 0.05 * most:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _remedy(encoding: str) -> str:
    return f"read it with --encoding={encoding}, or write it anew in UTF-8."
