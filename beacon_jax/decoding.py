"""Turns the bytes of a user's file into text, or says what they are instead.

Text is UTF-8, with or without a byte order mark. Bytes in another encoding, read as
UTF-8 with replacements, would be a text of question marks that a model remembers
without a word.
"""

import codecs

from beacon_jax.names import meant

# Encodings that a file may turn out to have, as charset_normalizer names them: among
# all that it knows, short Western texts look like a dozen rare ones.
GUESSES = (
    "gb18030",
    "big5",
    "cp932",
    "euc_jp",
    "euc_kr",
    "cp1251",
    "cp1252",
    "utf_16_le",
    "utf_16_be",
)
SHOWN = 65536  # bytes to guess from
# First bytes of files that are no text.
PDF = b"%PDF-"
KINDS = {
    PDF: "a PDF",
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
    for mark, name in _MARKS:
        if data.startswith(mark):
            raise ValueError(f"{where} is {name.upper()}, not UTF-8: {_remedy(name)}")
    try:
        text, fault = data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        text = ""
        fault = f"byte {data[error.start]:#04x} at {error.start:,} is not UTF-8"
    if (at := data.find(0)) >= 0:
        fault = f"it has a NUL byte at {at:,}"
    if not fault and not data.startswith(PDF):
        return text
    for start, kind in KINDS.items():  # prose, too, may begin with such letters
        if data.startswith(start):
            raise ValueError(f"{where} is {kind}, no text: give the text in it.")
    if name := guess(data):
        remedy = f"It seems to be {name}: {_remedy(name)}"
    elif at >= 0:
        remedy = "It is binary: give a text file."
    else:
        remedy = f"It is in another encoding, or damaged: {_remedy('NAME')}"
    raise ValueError(f"{where} is no text in UTF-8: {fault}. {remedy}")


def guess(data: bytes) -> str | None:
    """Guesses the encoding of bytes that are no UTF-8; None: none is plausible."""
    from charset_normalizer import from_bytes

    # In whole lines, so that no character is cut.
    head = data[: data.rfind(b"\n", 0, SHOWN) + 1] if len(data) > SHOWN else data
    found = from_bytes(head or data, cp_isolation=[*GUESSES], enable_fallback=False)
    best = found.best()
    return best.encoding if best else None


def _decode_as(data: bytes, where: str, encoding: str) -> str:
    text = ""
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except LookupError:  # also of one that makes no text, as hex
        near = meant(encoding, ("utf-8", "utf-16", "utf-32", "latin-1", *GUESSES))
        raise ValueError(
            f"--encoding={encoding} is unknown: {near}use a name that Python knows, as "
            f"utf-16 or {', '.join(GUESSES)}."
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
