"""Bytes of files become text, or an error that says what they are."""

import codecs

import pytest

from beacon_jax.data.fields import decoded
from beacon_jax.decoding import decode, guess

ENGLISH = "The boats left at dawn. " * 5
CHINESE = "今天天气很好，我们去公园散步。" * 5
JAPANESE = "今日はとても良い天気ですね。公園に行きましょう。" * 5
KOREAN = "오늘은 날씨가 아주 좋습니다. 공원에 갑시다. " * 5
RUSSIAN = "Сегодня очень хорошая погода, пойдём в парк. " * 5
FRENCH = "Le café où nous déjeunâmes était fermé à Noël. " * 5


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_utf8_is_read_with_or_without_a_mark(mark):
    for text in (ENGLISH, CHINESE, RUSSIAN, "a\ufeffb", "GGUF is a format", "BZh"):
        assert decode(mark + text.encode(), "x") == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (CHINESE, "gb18030"),
        (JAPANESE, "cp932"),
        (JAPANESE, "euc_jp"),
        (KOREAN, "euc_kr"),
        (RUSSIAN, "cp1251"),
        (FRENCH, "cp1252"),
    ],
)
def test_another_encoding_is_an_error_with_byte_and_guess_and_can_be_read(
    text, encoding
):
    data = (ENGLISH + text).encode(encoding)
    with pytest.raises(
        ValueError, match="--context=a is no text in UTF-8: byte 0x"
    ) as error:
        decode(data, "--context=a")
    assert f"--encoding={encoding}" in str(error.value)
    assert guess(data) == encoding
    assert decode(data, "--context=a", encoding) == ENGLISH + text


def test_long_and_short_texts_are_guessed_too():
    assert guess("今天天氣很好，我們去公園散步。".encode("big5")) == "big5"
    assert guess(f"{ENGLISH * 9}d\xe4wn".encode("cp1252")) == "cp1252"
    lines = f"{CHINESE}\n" * 1000  # more than is looked at
    assert guess(lines.encode("gb18030")) == "gb18030"


@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "utf-16"), ("utf-32", "utf-32"), ("utf-16-le", "utf_16_le")],
)
def test_utf16_and_utf32_are_named(encoding, name):
    data = ENGLISH.encode(encoding)
    with pytest.raises(ValueError, match=rf"--encoding={name}"):
        decode(data, "x")
    assert decode(data, "x", name) == ENGLISH


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%PDF-1.7 ...", "is a PDF, no text"),
        (b"PK\x03\x04\x00 ...", "is a zip archive"),
        (b"abc\x00def" * 9, r"has a NUL byte at 3\. It is binary"),
        (bytes(range(1, 256)) * 4, "byte 0x80 at 127 is not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        decode(data, "x")


def test_an_unknown_or_wrong_encoding_is_named():
    with pytest.raises(ValueError, match="--encoding=utf16x is unknown"):
        decode(b"a", "x", "utf16x")
    with pytest.raises(ValueError, match="x is not ascii: .* at byte 1"):
        decode(b"a\xff", "x", "ascii")


def test_a_row_of_json_may_have_a_mark():
    assert decoded(codecs.BOM_UTF8 + b'{"text": "a"}') == {"text": "a"}


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("hex", "--encoding=hex is unknown"),
        ("zlib", "--encoding=zlib is unknown"),
        ("undefined", "is not undefined: undefined encoding"),
        ("punycode", "is not punycode"),
        ("latin-1", "has a NUL character at 1"),
    ],
)
def test_an_encoding_that_gives_no_text_is_refused(encoding, said):
    with pytest.raises(ValueError, match=said):
        decode(b"a\0\xff-b!", "notes.txt", encoding)
