"""Bytes of files become text, or an error that says what they are."""

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import subprocess
import zipfile

import pytest

from beacon_jax.data.fields import decoded
from beacon_jax.decoding import decode, disguised, guesses, iconv_name

ENGLISH = "The boats left at dawn. " * 5
CHINESE = "今天天气很好，我们去公园散步。" * 5
JAPANESE = "今日はとても良い天気ですね。公園に行きましょう。" * 5
KOREAN = "오늘은 날씨가 아주 좋습니다. 공원에 갑시다. " * 5
RUSSIAN = "Сегодня очень хорошая погода, пойдём в парк. " * 5
UKRAINIAN = "Сьогодні дуже гарна погода, ходімо до парку біля річки. " * 5
GREEK = "Σήμερα ο καιρός είναι πολύ καλός, ας πάμε στο πάρκο. " * 5
HEBREW = "היום מזג האוויר יפה מאוד, בואו נלך לפארק ליד הנהר. " * 5
ARABIC = "الطقس جميل جدا اليوم، هيا نذهب إلى الحديقة قرب النهر. " * 5
THAI = "วันนี้อากาศดีมาก ไปเดินเล่นที่สวนสาธารณะกันเถอะ " * 5
TURKISH = "Bugün hava çok güzel, çocuklar parkta şarkı söylüyor. " * 5
POLISH = "Dzień był piękny, więc poszliśmy nad rzekę, żeby złowić ryby. " * 5
LITHUANIAN = "Šiandien labai gražus oras, eikime į parką prie upės. " * 5
FRENCH = "Le café où nous déjeunâmes était fermé à Noël. " * 5
GERMAN = "Die Straße führt über die Brücke; größere Fahrzeuge warten. " * 5
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy. "


def refused(data: bytes, encoding: str | None = None) -> str:
    with pytest.raises(ValueError, match=r"^--context=a is ") as error:
        decode(data, "--context=a", encoding)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    "text",
    [
        *(ENGLISH, CHINESE, RUSSIAN, "a\ufeffb", "GGUF is a format", "BZh"),
        "A line in \x1b[31mred\x1b[0m, back to \x1b(B\x1b[m.\n\x1b]0;title\x07",
        "UTF-7 writes a as +AGE-, é as +AOk-, and + as +-.",
        "+AOk- is é, +APw- is ü, +AN8- is ß, +IBM- is a dash",
        "C++20, 1+1, a+b-c, q=foo+BAR+baz, +27 or +AND+ me+YOU",
        "Home is ~{nowhere~}; HZ has ~{<:Ky2;~} for eight letters of GB 2312.",
        "PDF begins with %PDF-1.7, RTF with {\\rtf1, PostScript with %!PS.",
        "{\\rm roman} and <html><body>pages</body></html>",
        "MZ, BM, ID3, PAR1, wOFF, qoif and 8BPS: letters of formats",
        "ü \x1b$B in a text that is UTF-8",
        "-----BEGIN-----\nTWFu+aXM/ZGlz+dGlu+Z3Vp+c2hl\nZCwg+bm90/IG9u+bHkg==\n",
    ],
)
def test_utf8_is_read_with_or_without_a_mark(mark, text):
    assert decode(mark + text.encode(), "x") == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((CHINESE, "gb18030"), (JAPANESE, "cp932"), (JAPANESE, "euc_jp")),
        *((KOREAN, "euc_kr"), (RUSSIAN, "cp1251"), (RUSSIAN, "iso8859-5")),
        *((RUSSIAN, "koi8-r"), (RUSSIAN, "cp866"), (UKRAINIAN, "koi8-u")),
        *((GREEK, "cp1253"), (GREEK, "cp737"), (HEBREW, "cp1255"), (HEBREW, "cp862")),
        *((ARABIC, "cp1256"), (ARABIC, "iso8859-6"), (THAI, "cp874")),
        *((TURKISH, "cp1254"), (TURKISH, "cp857"), (POLISH, "cp1250")),
        *((POLISH, "iso8859-2"), (POLISH, "cp852"), (LITHUANIAN, "cp1257")),
        *((FRENCH, "cp1252"), (FRENCH, "cp437"), (FRENCH, "mac-roman")),
        *((GERMAN, "cp1252"), (GERMAN, "cp850"), (GERMAN, "cp500")),
    ],
    ids=lambda given: given[:9],
)
def test_another_encoding_is_an_error_with_byte_and_a_guess_that_reads_it(
    text, encoding
):
    if encoding != "cp500":  # its letters are no ASCII
        text = ENGLISH + text
    data = text.encode(encoding)
    said = refused(data)
    assert "is no text in UTF-8: byte 0x" in said
    first = guesses(data)[0]
    assert f"--encoding={first.name}," in said
    # Not always by that name: others of its family read the same.
    assert decode(data, "--context=a", first.name) == text


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        ("Un café à Paris. " * 40, "latin-1", "cp1252"),
        ("It’s “quoted” — text. " * 40, "cp1252", "cp1252"),
        (FRENCH, "cp1252", "cp1252"),
        ("Perché è così? Città più bella. ", "latin-1", "cp1252"),
        ("Vi går på ängen när det är kväll. ", "latin-1", "cp1252"),
        (RUSSIAN, "cp1251", "cp1251"),
    ],
)
def test_what_people_have_is_guessed_before_what_they_had(text, encoding, name):
    assert guesses(text.encode(encoding))[0].name == name


@pytest.mark.skipif(not shutil.which("iconv"), reason="there is no iconv")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, FRENCH) for name in ("cp1252", "mac-roman", "hp-roman8", "cp850")),
        *((name, CZECH) for name in ("mac-latin2", "iso8859-2", "cp1250")),
        *((name, RUSSIAN) for name in ("mac-cyrillic", "koi8-r", "kz1048", "ptcp154")),
        *(
            (name, JAPANESE)
            for name in ("shift_jis_2004", "euc_jis_2004", "iso2022_jp_2")
        ),
        *((name, KOREAN) for name in ("iso2022_kr", "euc_kr", "cp949", "johab")),
        ("mac-iceland", "Þetta er íslenskur texti."),
    ],
)
def test_iconv_knows_an_encoding_by_the_name_that_is_given(name, text):
    command = ["iconv", "-f", iconv_name(name), "-t", "utf-8"]
    made = subprocess.run(command, input=text.encode(name), capture_output=True)
    assert made.stdout.decode() == text, made.stderr


def test_encodings_that_are_as_likely_are_shown_by_what_they_read():
    said = refused(CZECH.encode("iso8859-2"))
    assert "It may be " in said and "iso8859-2 ('Příliš žluťou')" in said, said
    assert "read it with the name that reads right, as --encoding=" in said
    # One letter tells nothing.
    assert [guess.sure for guess in guesses(b"d\xe4wn")] == [False] * 4


@pytest.mark.parametrize("line", [f"{ENGLISH}\n", ENGLISH])
def test_what_is_no_ascii_is_found_behind_pages_of_it(line):
    data = (line * 1000 + GREEK).encode("cp1253")
    assert "It may be iso8859-7 (" in refused(data)
    assert "is iso2022_jp, not UTF-8" in refused(
        (line * 1000 + JAPANESE).encode("iso2022_jp")
    )
    lines = f"{CHINESE}\n" * 1000  # more than is looked at
    assert guesses(lines.encode("gb18030"))[0].name == "gb18030"


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        *(("utf-16", "utf-16"), ("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")),
        *(("utf-32", "utf-32"), ("utf-32-le", "utf-32-le"), ("utf-32-be", "utf-32-be")),
    ],
)
def test_utf16_and_utf32_are_named(encoding, name):
    data = ENGLISH.encode(encoding)
    assert f"--encoding={name}," in refused(data)
    assert decode(data, "x", name) == ENGLISH


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((JAPANESE, "iso2022_jp"), (KOREAN, "iso2022_kr"), (CHINESE, "hz")),
        *((ENGLISH + JAPANESE, "iso2022_jp"), ("カ", "iso2022_jp")),
        *((CHINESE, "utf-7"), (RUSSIAN, "utf-7"), (FRENCH, "utf-7")),
        ("\ufeffplain", "utf-7"),
    ],
    ids=lambda given: given[:9],
)
def test_encodings_that_are_ascii_are_named(text, encoding):
    data = text.encode(encoding)
    assert data.isascii()
    said = refused(data)
    assert f"not UTF-8: read it with --encoding={encoding}," in said
    assert decode(data, "x", encoding) == text.removeprefix("\ufeff")
    assert disguised(ENGLISH.encode()) is None


def zipped(*names: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name in names:
            file.writestr(name, "application/vnd.oasis.opendocument.text")
    return made.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%PDF-1.7 ...", "is a PDF, no plain text: extract its text"),
        (rb"{\rtf1\ansi Hello.}", "is RTF, no plain text: save it as plain text"),
        (codecs.BOM_UTF8 + b"\r\n{\\rtf1 a}", "is RTF"),
        (b"%!PS-Adobe-3.0\n(a) show", "is PostScript, no plain text: extract its text"),
        (zipped("[Content_Types].xml", "word/document.xml"), "is a Word document"),
        (zipped("mimetype", "content.xml"), "is an OpenDocument file"),
        (zipped("META-INF/container.xml"), "is an e-book (EPUB)"),
        (zipped("a.txt"), "is a zip archive, or a document"),
        (
            gzip.compress(b"abc ", mtime=0),
            "is compressed (application/gzip)",
        ),
        (bz2.compress(b"abc "), "is compressed (application/x-bzip2)"),
        (lzma.compress(b"abc "), "is compressed (application/x-xz)"),
        (b"\x89PNG\r\n\x1a\n\0", "is a picture (image/png)"),
        (b"ID3\x04\0" + bytes(9), "is a recording (audio/mpeg)"),
        (b"\x7fELF\x02\x01\0", "is application/x-elf, no text: give a text file"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(9), "is an old Office document"),
        (b"GGUF\x03\0\0\0", "is a GGUF model"),
        (b'\x08\0\0\0\0\0\0\0{"a":{}}', "a beacon pack is read by --load_memory"),
        (b"abc\0def" * 9, "has a NUL byte at 3. It is binary, or in another encoding"),
        (bytes(range(1, 256)) * 4, "byte 0x80 at 127 is not UTF-8. It is in another"),
        (b"BM, a firm, \xe9t\xe9", "byte 0xe9 at 12 is not UTF-8. It may be "),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_is_no_text_is_named_with_what_to_do(data, words):
    assert words in refused(data)


@pytest.mark.parametrize("data", [b"%PDF-1.7 ...", rb"{\rtf1\ansi Hello.}"])
def test_a_document_is_no_text_in_any_encoding(data):
    assert "no plain text" in refused(data, "cp1252")
    assert "no plain text" in str(disguised(data))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (RUSSIAN.encode() + b"\xff" + ENGLISH.encode(), "1 place"),
        (FRENCH.encode() + b"caf\xe9 " * 2 + FRENCH.encode(), "2 places"),
        (CHINESE.encode()[:-1], "1 place"),
        (b"\xc3\xa9 " + ENGLISH.encode() + b"\xf3 " + ENGLISH.encode(), "1 place"),
    ],
)
def test_damaged_utf8_is_no_other_encoding(data, place):
    assert f"It seems to be UTF-8 that is damaged in {place}: mend that" in refused(
        data
    )


def test_an_unknown_or_wrong_encoding_is_named():
    for name in ("utf16x", "a\udcff"):
        with pytest.raises(ValueError, match=f"--encoding={name} is unknown"):
            decode(b"a", "x", name)
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
